{{- /* What cannot work of the head and of a worker group. */ -}}
{{- /* What head and workers have in common. */ -}}
{{- define "raymoe.checkPod" -}}
{{- $path := .path -}}
{{- range $key := list "num-cpus" "num-gpus" "memory" "resources" -}}
{{- if hasKey $.group.rayStartParams $key -}}
{{- fail (printf "%s.rayStartParams.%s contradicts the group's resources, and KubeRay takes only one of them: set %s.resources%s." $path $key $path (ternary "" (printf " and %s.rayResources" $path) (eq $path "head"))) -}}
{{- end -}}
{{- end -}}
{{- if hasKey .group.rayStartParams "labels" -}}
{{- fail (printf "%s.rayStartParams.labels is not taken by KubeRay: set %s.rayLabels." $path $path) -}}
{{- end -}}
{{- range $key := list "redis-password" "redis-username" -}}
{{- if hasKey $.group.rayStartParams $key -}}
{{- fail (printf "%s.rayStartParams.%s is not taken by KubeRay: set clusterSpec.gcsFaultToleranceOptions." $path $key) -}}
{{- end -}}
{{- end -}}
{{- $names := keys .group.env -}}
{{- range .group.extraEnv -}}{{- $names = append $names .name -}}{{- end -}}
{{- range $name := list "RAY_REDIS_ADDRESS" "REDIS_PASSWORD" "REDIS_USERNAME" "RAY_GCS_STORAGE" "RAY_GCS_STORAGE_PATH" "RAY_external_storage_namespace" -}}
{{- if has $name $names -}}
{{- fail (printf "%s.env sets %s, which KubeRay refuses: set clusterSpec.gcsFaultToleranceOptions." $path $name) -}}
{{- end -}}
{{- end -}}
{{- $ours := list "RAY_enable_autoscaler_v2" "RAY_AUTH_MODE" "RAY_AUTH_TOKEN" "RAY_ADDRESS" "RAY_CLUSTER_NAME" "KUBERAY_GEN_RAY_START_CMD" "HOME" "NUMBA_CACHE_DIR" "RAY_USAGE_STATS_ENABLED" -}}
{{- /* Without the chart's TLS it may name certificates that volumes of your own bring. */ -}}
{{- if .root.Values.tls.enabled -}}{{- $ours = append $ours "RAYMOE_TLS_DIR" -}}{{- end -}}
{{- range $name := $ours -}}
{{- if has $name $names -}}
{{- fail (printf "%s.env sets %s, which the chart or KubeRay sets: remove it (autoscaling, auth and tls have sections of their own)." $path $name) -}}
{{- end -}}
{{- end -}}
{{- range $key := list "podLabels" "rayLabels" -}}
{{- range $label, $value := get $.group $key -}}
{{- if not (regexMatch "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$" $label) -}}
{{- fail (printf "%s.%s has the key %q, which is no name of a Kubernetes label: change it." $path $key $label) -}}
{{- end -}}
{{- if not (regexMatch "^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$" $value) -}}
{{- fail (printf "%s.%s.%s is %q, which is no value of a Kubernetes label: change it." $path $key $label $value) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $label := list "ray.io/cluster" "ray.io/group" "ray.io/node-type" "ray.io/serve" "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/component" "app.kubernetes.io/created-by" -}}
{{- if or (hasKey $.group.podLabels $label) (hasKey $.group.rayLabels $label) -}}
{{- fail (printf "%s sets the label %s, by which the chart or KubeRay finds its pods: remove it." $path $label) -}}
{{- end -}}
{{- end -}}
{{- include "raymoe.checkResources" (dict "path" (printf "%s.resources" $path) "resources" .group.resources) -}}
{{- include "raymoe.checkVolumes" . -}}
{{- end -}}

{{- define "raymoe.checkResources" -}}
{{- $limits := dig "limits" dict (default dict .resources) | default dict -}}
{{- range $name, $request := dig "requests" dict (default dict .resources) -}}
{{- if and (hasKey $limits $name) (lt (include "raymoe.amount" (get $limits $name) | float64) (include "raymoe.amount" $request | float64)) -}}
{{- fail (printf "%s.limits.%s (%v) is less than requests.%s (%v): raise the one or lower the other." $.path $name (get $limits $name) $name $request) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* Kubernetes takes no name of a volume twice and nothing twice at a path; what the pods have is what they render. */ -}}
{{- define "raymoe.checkVolumes" -}}
{{- $names := list -}}{{- $paths := list -}}
{{- range include "raymoe.mounts" (dict "root" .root "head" (eq .path "head") "group" dict) | fromYamlArray -}}
{{- $names = append $names .name -}}{{- $paths = append $paths (clean .mountPath) -}}
{{- end -}}
{{- range .group.extraVolumes -}}
{{- if has .name $names -}}
{{- fail (printf "%s.extraVolumes has the name %s, which a volume of the chart has: take another one." $.path .name) -}}
{{- end -}}
{{- end -}}
{{- range .group.extraVolumeMounts -}}
{{- if has (clean .mountPath) $paths -}}
{{- fail (printf "%s.extraVolumeMounts has the path %s, where the chart mounts a volume: take another one." $.path .mountPath) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.checkGroup" -}}
{{- $path := printf "workerGroups.%s" .name -}}{{- $group := .group -}}{{- $root := .root -}}
{{- include "raymoe.checkPod" (dict "root" $root "path" $path "group" $group) -}}
{{- if or (not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" .name)) (gt (len .name) 30) (has .name (list "head" "headgroup" "submitter" "test")) -}}
{{- fail (printf "%s: a group's name has to begin with a letter, hold only lower-case letters, digits and '-', have 30 characters at most and be none of head, headgroup, submitter and test." $path) -}}
{{- end -}}
{{- if gt (int $group.minReplicas) (int $group.maxReplicas) -}}
{{- fail (printf "%s.minReplicas (%d) is more than maxReplicas (%d): lower the one or raise the other." $path (int $group.minReplicas) (int $group.maxReplicas)) -}}
{{- end -}}
{{- $replicas := not (kindIs "invalid" $group.replicas) -}}
{{- if $root.Values.autoscaling.enabled -}}
{{- if $replicas -}}
{{- fail (printf "%s.replicas is the autoscaler's to set, and an upgrade would set it back: set minReplicas and maxReplicas, or autoscaling.enabled to false." $path) -}}
{{- end -}}
{{- if and $group.priority (semverCompare "<2.56.0-0" $root.Values.rayVersion) -}}
{{- fail (printf "%s.priority needs Ray 2.56 or later and rayVersion is %s: remove it or use a later image." $path $root.Values.rayVersion) -}}
{{- end -}}
{{- else -}}
{{- if and $replicas (or (lt (int $group.replicas) (int $group.minReplicas)) (gt (int $group.replicas) (int $group.maxReplicas))) -}}
{{- fail (printf "%s.replicas (%d) is not between minReplicas (%d) and maxReplicas (%d): change one of them." $path (int $group.replicas) (int $group.minReplicas) (int $group.maxReplicas)) -}}
{{- end -}}
{{- if not (kindIs "invalid" $group.idleTimeoutSeconds) -}}
{{- fail (printf "%s.idleTimeoutSeconds needs the autoscaler: remove it or set autoscaling.enabled to true." $path) -}}
{{- end -}}
{{- if $group.priority -}}
{{- fail (printf "%s.priority needs the autoscaler: remove it or set autoscaling.enabled to true." $path) -}}
{{- end -}}
{{- end -}}
{{- range $key := list $root.Values.expertResource.name "CPU" "cpu" -}}
{{- if hasKey $group.rayResources $key -}}
{{- fail (printf "%s.rayResources.%s is what the chart sets from hostsPerPod and resources: set those." $path $key) -}}
{{- end -}}
{{- end -}}
{{- if and (ne $group.role "expert") (gt (int $group.hostsPerPod) 1) -}}
{{- fail (printf "%s.hostsPerPod is for expert groups, and its role is %s: remove it or set role to expert." $path $group.role) -}}
{{- end -}}
{{- if ge (int $group.drainSeconds) (int $group.terminationGracePeriodSeconds) -}}
{{- fail (printf "%s.terminationGracePeriodSeconds (%d) leaves no time after drainSeconds (%d): raise it." $path (int $group.terminationGracePeriodSeconds) (int $group.drainSeconds)) -}}
{{- end -}}
{{- if and (not (kindIs "invalid" $group.minAvailable)) (gt (int $group.minAvailable) (int $group.minReplicas)) -}}
{{- fail (printf "%s.minAvailable (%d) is more than minReplicas (%d), so that no pod could ever be evicted: lower it." $path (int $group.minAvailable) (int $group.minReplicas)) -}}
{{- end -}}
{{- end -}}
