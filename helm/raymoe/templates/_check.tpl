{{- /* What cannot work is refused here, in a sentence, and not by an operator in its log an hour later. */ -}}
{{- define "raymoe.check" -}}
{{- include "raymoe.checkName" . -}}
{{- include "raymoe.checkVersion" . -}}
{{- include "raymoe.checkClusterSpec" . -}}
{{- include "raymoe.checkPod" (dict "path" "head" "group" .Values.head) -}}
{{- $groups := include "raymoe.groups" . | fromYaml -}}
{{- range $name, $group := $groups -}}
{{- include "raymoe.checkGroup" (dict "root" $ "name" $name "group" $group) -}}
{{- end -}}
{{- include "raymoe.checkMode" . -}}
{{- include "raymoe.checkHosts" . -}}
{{- include "raymoe.checkObjects" . -}}
{{- end -}}

{{- define "raymoe.checkName" -}}
{{- $name := include "raymoe.fullname" . -}}
{{- $most := ternary 53 47 (eq .Values.mode "cluster") -}}
{{- if gt (len $name) $most -}}
{{- fail (printf "The name %q has %d characters and a %s may have %d, since KubeRay adds to it: set fullnameOverride." $name (len $name) (include "raymoe.kind" .) $most) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "The name %q has to begin with a letter and hold only lower-case letters, digits and '-' (DNS-1035): set fullnameOverride." $name) -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.checkVersion" -}}
{{- if semverCompare "<2.52.0-0" .Values.rayVersion -}}
{{- if .Values.auth.enabled -}}
{{- fail (printf "rayVersion is %s and auth.enabled needs Ray 2.52 or later: set rayVersion to that of the image, or auth.enabled to false." .Values.rayVersion) -}}
{{- end -}}
{{- end -}}
{{- if semverCompare "<2.53.0-0" .Values.rayVersion -}}
{{- fail (printf "rayVersion is %s and the pods' probes ask for /api/healthz, which Ray 2.53 and later has: use an image with a later Ray." .Values.rayVersion) -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.checkClusterSpec" -}}
{{- $spec := .Values.clusterSpec -}}
{{- $own := dict "headGroupSpec" "head" "workerGroupSpecs" "workerGroups" "rayVersion" "rayVersion" "authOptions" "auth" "autoscalerOptions" "autoscaling" "enableInTreeAutoscaling" "autoscaling.enabled" "upgradeStrategy" "serve.upgradeStrategy or cluster.upgradeStrategy" -}}
{{- range $key, $value := $own -}}
{{- if hasKey $spec $key -}}
{{- fail (printf "clusterSpec.%s is the chart's own field: set %s instead." $key $value) -}}
{{- end -}}
{{- end -}}
{{- $gated := dict "networkPolicy" "RayClusterNetworkPolicy" "tlsOptions" "RayClusterMTLS" "historyServerOptions" "RayClusterHistoryServer" -}}
{{- range $key, $gate := $gated -}}
{{- if and (hasKey $spec $key) (not (has $gate $.Values.kuberay.featureGates)) -}}
{{- fail (printf "clusterSpec.%s needs KubeRay's feature gate %s: switch it on in the operator and name it in kuberay.featureGates." $key $gate) -}}
{{- end -}}
{{- end -}}
{{- with $spec.gcsFaultToleranceOptions -}}
{{- $backend := default "redis" .backend -}}
{{- if eq $backend "rocksdb" -}}
{{- if not (has "GCSFaultToleranceEmbeddedStorage" $.Values.kuberay.featureGates) -}}
{{- fail "clusterSpec.gcsFaultToleranceOptions.backend rocksdb needs KubeRay's feature gate GCSFaultToleranceEmbeddedStorage: switch it on in the operator and name it in kuberay.featureGates." -}}
{{- end -}}
{{- range $key := list "redisAddress" "redisUsername" "redisPassword" "externalStorageNamespace" -}}
{{- if hasKey $spec.gcsFaultToleranceOptions $key -}}
{{- fail (printf "clusterSpec.gcsFaultToleranceOptions.%s belongs to the backend redis and the backend is rocksdb: remove one of them." $key) -}}
{{- end -}}
{{- end -}}
{{- else -}}
{{- if hasKey . "storage" -}}
{{- fail "clusterSpec.gcsFaultToleranceOptions.storage belongs to the backend rocksdb and the backend is redis: remove one of them." -}}
{{- end -}}
{{- if not .redisAddress -}}
{{- fail "clusterSpec.gcsFaultToleranceOptions.redisAddress is missing: give the address of a Redis." -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

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
{{- range $name := list "RAY_enable_autoscaler_v2" "RAY_AUTH_MODE" "RAY_AUTH_TOKEN" "RAY_ADDRESS" "RAY_CLUSTER_NAME" "KUBERAY_GEN_RAY_START_CMD" "HOME" "NUMBA_CACHE_DIR" "RAY_USAGE_STATS_ENABLED" -}}
{{- if has $name $names -}}
{{- fail (printf "%s.env sets %s, which the chart or KubeRay sets: remove it (autoscaling and auth have sections of their own)." $path $name) -}}
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
{{- end -}}

{{- define "raymoe.checkGroup" -}}
{{- $path := printf "workerGroups.%s" .name -}}{{- $group := .group -}}{{- $root := .root -}}
{{- include "raymoe.checkPod" (dict "path" $path "group" $group) -}}
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

{{- define "raymoe.checkMode" -}}
{{- if eq .Values.mode "serve" -}}
{{- if not .Values.serve.checkpoint -}}
{{- fail "serve.checkpoint is missing: name the directory of a checkpoint as pods see it, such as /checkpoints/demo." -}}
{{- end -}}
{{- else -}}
{{- range $key := list "ingress" -}}
{{- if (get $.Values $key).enabled -}}
{{- fail (printf "%s.enabled is for mode serve, and mode is %s: set it to false." $key $.Values.mode) -}}
{{- end -}}
{{- end -}}
{{- range $key := list "prometheusRule" "dashboard" -}}
{{- if (get $.Values.monitoring $key).enabled -}}
{{- fail (printf "monitoring.%s.enabled is for mode serve, whose metrics it is about, and mode is %s: set it to false." $key $.Values.mode) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.mode "train") .Values.train.suspend (not .Values.train.shutdownAfterJobFinishes) -}}
{{- fail "train.suspend needs train.shutdownAfterJobFinishes: set that to true." -}}
{{- end -}}
{{- $groups := include "raymoe.groups" . | fromYaml -}}
{{- $cpus := 0 -}}
{{- range $name, $group := $groups -}}
{{- if ne $group.role "expert" -}}
{{- $pods := int $group.minReplicas -}}
{{- if and (not $.Values.autoscaling.enabled) (not (kindIs "invalid" $group.replicas)) -}}{{- $pods = int $group.replicas -}}{{- end -}}
{{- $cpus = add $cpus (mul $pods (include "raymoe.groupCpus" $group | int64)) -}}
{{- end -}}
{{- end -}}
{{- if eq .Values.mode "train" -}}
{{- $training := default dict (get (default dict .Values.train.config) "training") -}}
{{- $wanted := mulf (float64 (default 1 $training.workers)) (float64 (default 1 $training.cpus_per_worker)) -}}
{{- if gt $wanted (float64 $cpus) -}}
{{- fail (printf "train.config.training asks for %g CPUs (workers x cpus_per_worker) and the groups but for experts begin with %d: raise their minReplicas or resources." $wanted (int $cpus)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.checkHosts" -}}
{{- $hosts := include "raymoe.hosts" . | fromYaml -}}
{{- $cluster := include "raymoe.cluster" . | fromYaml -}}
{{- $section := printf "%s.config.cluster" .Values.mode -}}
{{- if and $hosts.groups (ne .Values.mode "cluster") -}}
{{- if gt (int64 (default 0 $cluster.expert_hosts)) (int64 $hosts.most) -}}
{{- fail (printf "%s.expert_hosts (%d) is more than the expert groups ever have room for (%d): raise their maxReplicas or hostsPerPod." $section (int $cluster.expert_hosts) (int $hosts.most)) -}}
{{- end -}}
{{- with $cluster.autoscaling -}}
{{- if gt (int64 (default 4 .max_hosts)) (int64 $hosts.most) -}}
{{- fail (printf "%s.autoscaling.max_hosts (%d) is more than the expert groups ever have room for (%d): raise their maxReplicas or hostsPerPod." $section (int (default 4 .max_hosts)) (int $hosts.most)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if hasPrefix "127." (default "" $cluster.interface) -}}
{{- fail (printf "%s.interface is the loopback, where no other pod reaches a host: remove it." $section) -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.checkObjects" -}}
{{- with .Values.tls -}}
{{- if and .existingSecret (not .enabled) -}}
{{- fail "tls.existingSecret is set and tls.enabled is not: switch TLS on, or remove the secret's name." -}}
{{- end -}}
{{- if and .certManager.enabled .existingSecret -}}
{{- fail "tls.existingSecret and tls.certManager are both set: remove one of them." -}}
{{- end -}}
{{- if and .certManager.issuerRef (not .certManager.enabled) -}}
{{- fail "tls.certManager.issuerRef is set and tls.certManager.enabled is not: switch it on, or remove the issuer." -}}
{{- end -}}
{{- end -}}
{{- with .Values.checkpoints -}}
{{- if and .existingClaim .volume -}}
{{- fail "checkpoints.existingClaim and checkpoints.volume are both set: remove one of them." -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.mode "train") (not .Values.checkpoints.enabled) (not .Values.train.output) (not .Values.train.entrypoint) -}}
{{- fail "checkpoints.enabled is false, so that nothing would be left of the run: set train.output to a directory in a volume of yours." -}}
{{- end -}}
{{- if and .Values.serviceAccount.name (not .Values.serviceAccount.create) .Values.serviceAccount.annotations -}}
{{- fail "serviceAccount.annotations are for the one that the chart makes: set serviceAccount.create to true." -}}
{{- end -}}
{{- end -}}
