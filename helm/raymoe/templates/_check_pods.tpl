{{- /* What cannot work of a pod. */ -}}

{{- define "raymoe.checkPods" -}}
{{- $head := include "raymoe.head" . | fromYaml -}}
{{- $volumes := include "raymoe.volumes" (dict "root" . "group" $head "head" true) | fromYamlArray -}}
{{- $mounts := include "raymoe.mounts" (dict "root" . "group" dict "head" true) | fromYamlArray -}}
{{- include "raymoe.checkPod" (dict "root" . "path" "head" "values" $head "volumes" $volumes "mounts" $mounts) -}}
{{- include "raymoe.checkRay" (dict "root" . "path" "head" "group" $head "head" true) -}}
{{- range $name, $group := include "raymoe.groups" . | fromYaml -}}
{{- $path := printf "workerGroups.%s" $name -}}
{{- $own := include "raymoe.volumes" (dict "root" $ "group" $group "head" false) | fromYamlArray -}}
{{- $at := include "raymoe.mounts" (dict "root" $ "group" dict "head" false) | fromYamlArray -}}
{{- include "raymoe.checkPod" (dict "root" $ "path" $path "values" $group "volumes" $own "mounts" $at) -}}
{{- include "raymoe.checkRay" (dict "root" $ "path" $path "group" $group "head" false) -}}
{{- include "raymoe.checkGroup" (dict "root" $ "path" $path "name" $name "group" $group) -}}
{{- end -}}
{{- if .Values.autoscaling.enabled -}}{{- include "raymoe.checkAutoscaler" (dict "root" . "volumes" (concat $volumes (default list $head.extraVolumes))) -}}{{- end -}}
{{- if and (eq .Values.mode "train") (eq .Values.train.submissionMode "K8sJobMode") -}}
{{- $values := include "raymoe.podValues" (dict "root" . "own" .Values.train.submitter) | fromYaml -}}
{{- $tmp := list (dict "name" "scratch" "mountPath" "/tmp") -}}
{{- include "raymoe.checkPod" (dict "root" . "path" "train.submitter" "values" $values "volumes" $tmp "mounts" $tmp) -}}
{{- end -}}
{{- if .Values.tests.enabled -}}
{{- $values := include "raymoe.podValues" (dict "root" . "own" .Values.tests) | fromYaml -}}
{{- $keys := list -}}
{{- if include "raymoe.keysSecret" . -}}{{- $keys = list (dict "name" "api-keys" "mountPath" "/etc/raymoe-keys") -}}{{- end -}}
{{- include "raymoe.checkPod" (dict "root" . "path" "tests" "values" $values "volumes" $keys "mounts" $keys) -}}
{{- end -}}
{{- end -}}

{{- /* What all pods have in common. `volumes` and `mounts` are the chart's own. */ -}}
{{- define "raymoe.checkPod" -}}
{{- $path := .path -}}
{{- range $key := list "podLabels" "rayLabels" -}}
{{- range $label, $value := default dict (get $.values $key) -}}
{{- if not (regexMatch "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$" $label) -}}
{{- fail (printf "%s.%s has the key %q, which is no name of a Kubernetes label: change it." $path $key $label) -}}
{{- end -}}
{{- if not (regexMatch "^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$" $value) -}}
{{- fail (printf "%s.%s.%s is %q, which is no value of a Kubernetes label: change it." $path $key $label $value) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $label := list "ray.io/cluster" "ray.io/group" "ray.io/node-type" "ray.io/serve" "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/component" "app.kubernetes.io/created-by" -}}
{{- if or (hasKey (default dict $.values.podLabels) $label) (hasKey (default dict $.values.rayLabels) $label) -}}
{{- fail (printf "%s sets the label %s, by which the chart or KubeRay finds its pods: remove it." $path $label) -}}
{{- end -}}
{{- end -}}
{{- include "raymoe.checkResources" (dict "path" (printf "%s.resources" $path) "resources" .values.resources) -}}
{{- include "raymoe.checkVolumes" . -}}
{{- include "raymoe.checkContainers" . -}}
{{- $claims := list -}}{{- range .values.resourceClaims -}}{{- $claims = append $claims .name -}}{{- end -}}
{{- range dig "claims" list (default dict .values.resources) -}}
{{- if not (has .name $claims) -}}
{{- fail (printf "%s.resources.claims has the name %s and the pod has no such claim: add it to %s.resourceClaims." $path .name $path) -}}
{{- end -}}
{{- end -}}
{{- $own := dict "volumes" "extraVolumes" "securityContext" "podSecurityContext" -}}
{{- range $key := list "priorityClassName" "runtimeClassName" "schedulerName" "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "dnsPolicy" "dnsConfig" "hostAliases" "resourceClaims" -}}
{{- $_ := set $own $key $key -}}
{{- end -}}
{{- include "raymoe.checkExtras" (dict "path" $path "field" "podSpec" "given" .values.podSpec "own" $own) -}}
{{- $own = dict "env" "extraEnv" "volumeMounts" "extraVolumeMounts" "image" "image" "envFrom" "envFrom" "resources" "resources" "securityContext" "securityContext" -}}
{{- include "raymoe.checkExtras" (dict "path" $path "field" "containerSpec" "given" .values.containerSpec "own" $own) -}}
{{- if hasKey (default dict .values.containerSpec) "name" -}}
{{- fail (printf "%s.containerSpec.name is that by which KubeRay and the chart find the container: remove it." $path) -}}
{{- end -}}
{{- end -}}

{{- /* Fields that are passed on and have a value of their own. */ -}}
{{- define "raymoe.checkExtras" -}}
{{- range $key, $value := .own -}}
{{- if hasKey (default dict $.given) $key -}}
{{- fail (printf "%s.%s.%s is the chart's own field: set %s.%s instead." $.path $.field $key $.path $value) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.checkResources" -}}
{{- $limits := dig "limits" dict (default dict .resources) | default dict -}}
{{- range $name, $request := dig "requests" dict (default dict .resources) -}}
{{- if and (hasKey $limits $name) (lt (include "raymoe.amount" (get $limits $name) | float64) (include "raymoe.amount" $request | float64)) -}}
{{- fail (printf "%s.limits.%s (%v) is less than requests.%s (%v): raise the one or lower the other." $.path $name (get $limits $name) $name $request) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Kubernetes takes no name of a volume twice, nothing twice at a path, and no volume that there is not. */ -}}
{{- define "raymoe.checkVolumes" -}}
{{- $path := .path -}}
{{- $names := list -}}{{- range .volumes -}}{{- $names = append $names .name -}}{{- end -}}
{{- range .values.extraVolumes -}}
{{- if has .name $names -}}
{{- fail (printf "%s.extraVolumes has the name %s, which another volume of the pod has: take another one." $path .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- include "raymoe.checkMounts" (dict "path" $path "names" $names "mounts" .mounts "own" .values.extraVolumeMounts) -}}
{{- range $key := list "initContainers" "extraContainers" -}}
{{- range default list (get $.values $key) -}}{{- $container := . -}}
{{- range .volumeMounts -}}
{{- if not (has .name $names) -}}
{{- fail (printf "%s.%s: %s mounts %s, and the pod has no such volume: add it to %s.extraVolumes." $path $key $container.name .name $path) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.checkMounts" -}}
{{- $taken := list -}}{{- range .mounts -}}{{- $taken = append $taken (clean .mountPath) -}}{{- end -}}
{{- range .own -}}
{{- if has (clean .mountPath) $taken -}}
{{- fail (printf "%s.extraVolumeMounts has the path %s, where the pod has another volume: take another one." $.path .mountPath) -}}
{{- end -}}
{{- $taken = append $taken (clean .mountPath) -}}
{{- if not (has .name $.names) -}}
{{- fail (printf "%s.extraVolumeMounts names %s, and the pod has no such volume: add it to %s.extraVolumes." $.path .name (ternary "head" $.path (eq $.path "autoscaling"))) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Names of containers, and of variables: each once. */ -}}
{{- define "raymoe.checkContainers" -}}
{{- $taken := list "ray-head" "ray-worker" "autoscaler" "wait-gcs-ready" "ray-job-submitter" "client" "fetch-weights" -}}
{{- range $key := list "initContainers" "extraContainers" -}}
{{- range default list (get $.values $key) -}}
{{- if has .name $taken -}}
{{- fail (printf "%s.%s has the name %s, which another container of the pod has: take another one." $.path $key .name) -}}
{{- end -}}
{{- $taken = append $taken .name -}}
{{- end -}}
{{- end -}}
{{- $variables := list -}}
{{- range .values.extraEnv -}}
{{- if has .name $variables -}}
{{- fail (printf "%s.extraEnv sets %s twice: remove one of them." $.path .name) -}}
{{- end -}}
{{- $variables = append $variables .name -}}
{{- end -}}
{{- end -}}
