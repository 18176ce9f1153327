{{- /* The spec of a RayCluster, which all three modes share. */ -}}
{{- define "raymoe.rayCluster" -}}
{{- $root := . -}}
{{- /* What the autoscaler has set. Of a RayService or RayJob, KubeRay has it in a RayCluster of its own; a RayCluster of
the release would lose it, as an upgrade puts the whole list of groups in the place of the one before. */ -}}
{{- $live := dict -}}
{{- if and .Values.autoscaling.enabled (eq .Values.mode "cluster") -}}
{{- $there := default dict (lookup "ray.io/v1" "RayCluster" (include "raymoe.namespace" .) (include "raymoe.fullname" .)) -}}
{{- range dig "spec" "workerGroupSpecs" list $there -}}
{{- $_ := set $live .groupName . -}}
{{- end -}}
{{- end -}}
rayVersion: {{ .Values.rayVersion | quote }}
enableInTreeAutoscaling: {{ .Values.autoscaling.enabled }}
{{- if .Values.autoscaling.enabled }}
autoscalerOptions: {{- include "raymoe.autoscaler" . | nindent 2 }}
{{- end }}
{{- if .Values.auth.enabled }}
authOptions:
  mode: token
  secretName: {{ include "raymoe.authSecret" . | quote }}
{{- else }}
authOptions:
  mode: disabled
{{- end }}
headGroupSpec: {{- include "raymoe.headGroup" . | nindent 2 }}
{{- $groups := list }}
{{- range $name, $group := include "raymoe.groups" . | fromYaml }}
{{- $groups = append $groups (include "raymoe.workerGroup" (dict "root" $root "name" $name "group" $group "live" (get $live $name)) | fromYaml) }}
{{- end }}
workerGroupSpecs: {{- toYaml $groups | nindent 2 }}
{{- with .Values.clusterSpec }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- /* The autoscaler's container in the head pod, where the pod's own fields are the head's. */ -}}
{{- define "raymoe.autoscaler" -}}
{{- $values := include "raymoe.besideValues" (dict "root" . "own" .Values.autoscaling "mounts" true) | fromYaml -}}
{{- $env := list (dict "name" "HOME" "value" "/home/ray") (dict "name" "RAY_USAGE_STATS_ENABLED" "value" "0") -}}
{{- /* The same /tmp as the head's: the head reads the autoscaler's log. */ -}}
{{- $mounts := list (dict "name" "scratch" "mountPath" "/tmp") (dict "name" "home" "mountPath" "/home/ray") -}}
{{- $container := include "raymoe.container" (dict "root" . "values" $values "container" (dict "env" $env "volumeMounts" $mounts)) | fromYaml -}}
{{- /* Without one of its own, KubeRay takes the head's. */ -}}
{{- if not $values.image -}}{{- $container = omit $container "image" -}}{{- end -}}
{{- $_ := set $container "version" "v2" -}}
{{- $_ := set $container "idleTimeoutSeconds" (int64 $values.idleTimeoutSeconds) -}}
{{- $_ := set $container "upscalingMode" $values.upscalingMode -}}
{{- include "raymoe.over" (dict "base" $container "own" $values.options) -}}
{{- end -}}

{{- define "raymoe.headGroup" -}}
{{- $head := include "raymoe.head" . | fromYaml -}}
{{- $made := dict "serviceType" "ClusterIP" -}}
{{- $_ := set $made "rayStartParams" (include "raymoe.rayStartParams" (dict "root" . "group" $head "head" true) | fromYaml) -}}
{{- /* No task and no actor that asks for CPUs comes to the head. */ -}}
{{- $_ := set $made "resources" (dict "CPU" "0") -}}
{{- with $head.rayLabels -}}{{- $_ := set $made "labels" . -}}{{- end -}}
{{- $_ := set $made "template" (include "raymoe.pod" (dict "root" . "group" $head "name" "head" "head" true) | fromYaml) -}}
{{- include "raymoe.over" (dict "base" $made "own" $head.groupSpec) -}}
{{- end -}}

{{- define "raymoe.workerGroup" -}}
{{- $root := .root -}}{{- $group := .group -}}
{{- $made := dict "groupName" .name "minReplicas" (int64 $group.minReplicas) "maxReplicas" (int64 $group.maxReplicas) -}}
{{- if $root.Values.autoscaling.enabled -}}
{{- /* `replicas` is the autoscaler's: none, or what it has set. */ -}}
{{- with .live -}}
{{- with .replicas -}}
{{- $_ := set $made "replicas" (max $group.minReplicas (min $group.maxReplicas (int .))) -}}
{{- end -}}
{{- with .scaleStrategy -}}{{- $_ := set $made "scaleStrategy" . -}}{{- end -}}
{{- end -}}
{{- if not (kindIs "invalid" $group.idleTimeoutSeconds) -}}
{{- $_ := set $made "idleTimeoutSeconds" (int64 $group.idleTimeoutSeconds) -}}
{{- end -}}
{{- with int64 $group.priority -}}{{- $_ := set $made "priority" . -}}{{- end -}}
{{- else -}}
{{- $_ := set $made "replicas" (int64 (ternary $group.minReplicas $group.replicas (kindIs "invalid" $group.replicas))) -}}
{{- end -}}
{{- $_ := set $made "rayStartParams" (include "raymoe.rayStartParams" (dict "group" $group "head" false) | fromYaml) -}}
{{- $resources := deepCopy $group.rayResources -}}
{{- if eq $group.role "expert" -}}
{{- $_ := set $resources "CPU" "0" -}}
{{- $_ := set $resources $root.Values.expertResource.name (toString (int $group.hostsPerPod)) -}}
{{- else if $resources -}}
{{- $_ := set $resources "CPU" (include "raymoe.groupCpus" $group) -}}
{{- end -}}
{{- with $resources -}}{{- $_ := set $made "resources" . -}}{{- end -}}
{{- with $group.rayLabels -}}{{- $_ := set $made "labels" . -}}{{- end -}}
{{- $_ := set $made "template" (include "raymoe.pod" (dict "root" $root "group" $group "name" .name "head" false) | fromYaml) -}}
{{- include "raymoe.over" (dict "base" $made "own" $group.groupSpec) -}}
{{- end -}}
