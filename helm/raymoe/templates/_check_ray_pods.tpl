{{- /* What cannot work of a pod of the Ray cluster, and of a worker group. */ -}}

{{- define "raymoe.checkRay" -}}
{{- $path := .path -}}
{{- range $key := list "num-cpus" "num-gpus" "memory" "resources" -}}
{{- if hasKey (default dict $.group.rayStartParams) $key -}}
{{- fail (printf "%s.rayStartParams.%s contradicts the group's resources, and KubeRay takes only one of them: set %s.resources%s." $path $key $path (ternary "" (printf " and %s.rayResources" $path) (eq $path "head"))) -}}
{{- end -}}
{{- end -}}
{{- if hasKey (default dict .group.rayStartParams) "labels" -}}
{{- fail (printf "%s.rayStartParams.labels is not taken by KubeRay: set %s.rayLabels." $path $path) -}}
{{- end -}}
{{- range $key := list "redis-password" "redis-username" -}}
{{- if hasKey (default dict $.group.rayStartParams) $key -}}
{{- fail (printf "%s.rayStartParams.%s is not taken by KubeRay: set clusterSpec.gcsFaultToleranceOptions." $path $key) -}}
{{- end -}}
{{- end -}}
{{- $names := keys (default dict .group.env) -}}
{{- range .group.extraEnv -}}{{- $names = append $names .name -}}{{- end -}}
{{- range $name := list "RAY_REDIS_ADDRESS" "REDIS_PASSWORD" "REDIS_USERNAME" "RAY_GCS_STORAGE" "RAY_GCS_STORAGE_PATH" "RAY_external_storage_namespace" -}}
{{- if has $name $names -}}
{{- fail (printf "%s.env sets %s, which KubeRay refuses: set clusterSpec.gcsFaultToleranceOptions." $path $name) -}}
{{- end -}}
{{- end -}}
{{- $ours := list "RAY_enable_autoscaler_v2" "RAY_AUTH_MODE" "RAY_AUTH_TOKEN" "RAY_ADDRESS" "RAY_CLUSTER_NAME" "KUBERAY_GEN_RAY_START_CMD" -}}
{{- /* Without the chart's TLS it may name certificates that volumes of your own bring. */ -}}
{{- if .root.Values.tls.enabled -}}{{- $ours = append $ours "RAYMOE_TLS_DIR" -}}{{- end -}}
{{- range $name := $ours -}}
{{- if has $name $names -}}
{{- fail (printf "%s.env sets %s, which the chart or KubeRay sets: remove it (autoscaling, auth and tls have sections of their own)." $path $name) -}}
{{- end -}}
{{- end -}}
{{- include "raymoe.checkStore" . -}}
{{- include "raymoe.checkExtras" (dict "path" $path "field" "podSpec" "given" .group.podSpec "own" (dict "terminationGracePeriodSeconds" "terminationGracePeriodSeconds")) -}}
{{- if hasKey (default dict .group.podSpec) "restartPolicy" -}}
{{- fail (printf "%s.podSpec.restartPolicy follows from autoscaling.enabled, since KubeRay takes only Never with its autoscaler: remove it." $path) -}}
{{- end -}}
{{- if .head -}}
{{- include "raymoe.checkExtras" (dict "path" $path "field" "groupSpec" "given" .group.groupSpec "own" (dict "labels" "rayLabels" "rayStartParams" "rayStartParams" "resources" "resources")) -}}
{{- end -}}
{{- end -}}

{{- /* Ray keeps its object store on disk where /dev/shm is smaller, and starts with no less than 75 MiB. */ -}}
{{- define "raymoe.checkStore" -}}
{{- $shared := include "raymoe.amount" .group.sharedMemory | float64 -}}
{{- $memory := dig "limits" "memory" "" (default dict .group.resources) -}}
{{- if $memory -}}
{{- if gt $shared (include "raymoe.amount" $memory | float64) -}}
{{- fail (printf "%s.sharedMemory (%v) is more than resources.limits.memory (%v), of which it is part: lower the one or raise the other." .path .group.sharedMemory $memory) -}}
{{- end -}}
{{- end -}}
{{- if not (hasKey (default dict .group.rayStartParams) "plasma-directory") -}}
{{- $store := get (default dict .group.rayStartParams) "object-store-memory" -}}
{{- if $store -}}
{{- if not (regexMatch "^[0-9]+$" $store) -}}
{{- fail (printf "%s.rayStartParams.object-store-memory is %q and has to be a number of bytes, such as %q." .path $store (include "raymoe.storeMemory" .group.sharedMemory)) -}}
{{- end -}}
{{- if gt (float64 $store) $shared -}}
{{- fail (printf "%s.rayStartParams.object-store-memory (%s) is more than %s.sharedMemory (%v), so that Ray would keep its object store on disk: raise sharedMemory, or remove it for four fifths of that." .path $store .path .group.sharedMemory) -}}
{{- end -}}
{{- if lt (int64 $store) 78643200 -}}
{{- fail (printf "%s.rayStartParams.object-store-memory (%s) is less than the 78643200 bytes that Ray starts with: raise it." .path $store) -}}
{{- end -}}
{{- else if lt (include "raymoe.storeMemory" .group.sharedMemory | int64) 78643200 -}}
{{- fail (printf "%s.sharedMemory (%v) has no room for the 75 MiB of an object store that Ray starts with: set 94Mi or more." .path .group.sharedMemory) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.checkAutoscaler" -}}
{{- $all := include "raymoe.besideValues" (dict "root" .root "own" .root.Values.autoscaling "mounts" true) | fromYaml -}}
{{- with .root.Values.autoscaling -}}
{{- include "raymoe.checkResources" (dict "path" "autoscaling.resources" "resources" .resources) -}}
{{- $own := dict "env" "extraEnv" "volumeMounts" "extraVolumeMounts" -}}
{{- range $key := list "image" "envFrom" "resources" "securityContext" "idleTimeoutSeconds" "upscalingMode" -}}{{- $_ := set $own $key $key -}}{{- end -}}
{{- include "raymoe.checkExtras" (dict "path" "autoscaling" "field" "options" "given" .options "own" $own) -}}
{{- if hasKey (default dict .options) "version" -}}
{{- fail "autoscaling.options.version is v2, for which the chart sets what pods and groups need: remove it." -}}
{{- end -}}
{{- $names := list -}}{{- range $.volumes -}}{{- $names = append $names .name -}}{{- end -}}
{{- $mounts := list (dict "mountPath" "/tmp") (dict "mountPath" "/home/ray") -}}
{{- include "raymoe.checkMounts" (dict "path" "autoscaling" "names" $names "mounts" $mounts "own" $all.extraVolumeMounts) -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.checkGroup" -}}
{{- $path := .path -}}{{- $group := .group -}}{{- $root := .root -}}
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
{{- if hasKey (default dict $group.rayResources) $key -}}
{{- fail (printf "%s.rayResources.%s is what the chart sets from hostsPerPod and resources: set those." $path $key) -}}
{{- end -}}
{{- end -}}
{{- if and (ne $group.role "expert") (gt (int $group.hostsPerPod) 1) -}}
{{- fail (printf "%s.hostsPerPod is for expert groups, and its role is %s: remove it or set role to expert." $path $group.role) -}}
{{- end -}}
{{- if ge (int $group.drainSeconds) (int $group.terminationGracePeriodSeconds) -}}
{{- fail (printf "%s.terminationGracePeriodSeconds (%d) leaves no time after drainSeconds (%d): raise it." $path (int $group.terminationGracePeriodSeconds) (int $group.drainSeconds)) -}}
{{- end -}}
{{- $least := mul $group.minReplicas (include "raymoe.podsPerReplica" $group) | int -}}
{{- if and (not (kindIs "invalid" $group.minAvailable)) (gt (int $group.minAvailable) $least) -}}
{{- fail (printf "%s.minAvailable (%d) is more than the pods of minReplicas (%d), so that no pod could ever be evicted: lower it." $path (int $group.minAvailable) $least) -}}
{{- end -}}
{{- $own := dict "groupName" "" "labels" "rayLabels" "resources" "rayResources" -}}
{{- range $key := list "minReplicas" "maxReplicas" "replicas" "idleTimeoutSeconds" "priority" "rayStartParams" -}}
{{- $_ := set $own $key $key -}}
{{- end -}}
{{- if hasKey (default dict $group.groupSpec) "groupName" -}}
{{- fail (printf "%s.groupSpec.groupName is the group's name in workerGroups: remove it." $path) -}}
{{- end -}}
{{- include "raymoe.checkExtras" (dict "path" $path "field" "groupSpec" "given" $group.groupSpec "own" $own) -}}
{{- if and (default dict $group.groupSpec).suspend $root.Values.autoscaling.enabled -}}
{{- fail (printf "%s.groupSpec.suspend is not taken by KubeRay with its autoscaler: set autoscaling.enabled to false." $path) -}}
{{- end -}}
{{- end -}}
