{{- /* The spec of a RayCluster, which all three modes share. */ -}}
{{- define "raymoe.rayCluster" -}}
{{- $root := . -}}
{{- /* What the autoscaler has set. Of a RayService or RayJob, KubeRay has it in a RayCluster of its own; a RayCluster of
the release would lose it, as an upgrade puts the whole list of groups in the place of the one before. */ -}}
{{- $live := dict -}}
{{- if and .Values.autoscaling.enabled (eq .Values.mode "cluster") -}}
{{- $there := default dict (lookup "ray.io/v1" "RayCluster" .Release.Namespace (include "raymoe.fullname" .)) -}}
{{- range dig "spec" "workerGroupSpecs" list $there -}}
{{- $_ := set $live .groupName . -}}
{{- end -}}
{{- end -}}
rayVersion: {{ .Values.rayVersion | quote }}
enableInTreeAutoscaling: {{ .Values.autoscaling.enabled }}
{{- if .Values.autoscaling.enabled }}
autoscalerOptions:
  version: v2
  idleTimeoutSeconds: {{ int .Values.autoscaling.idleTimeoutSeconds }}
  upscalingMode: {{ .Values.autoscaling.upscalingMode }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  resources: {{- toYaml .Values.autoscaling.resources | nindent 4 }}
  securityContext: {{- toYaml .Values.security.container | nindent 4 }}
  env:
    - {name: HOME, value: /home/ray}
    - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
  # The same /tmp as the head's: the head reads the autoscaler's log.
  volumeMounts:
    - {name: scratch, mountPath: /tmp}
    - {name: home, mountPath: /home/ray}
{{- end }}
{{- if .Values.auth.enabled }}
authOptions:
  mode: token
  secretName: {{ include "raymoe.authSecret" . }}
{{- else }}
authOptions:
  mode: disabled
{{- end }}
headGroupSpec:
  serviceType: ClusterIP
  rayStartParams: {{- toYaml (merge (dict "dashboard-host" "0.0.0.0") .Values.head.rayStartParams) | nindent 4 }}
  # No task and no actor that asks for CPUs comes to the head.
  resources:
    CPU: "0"
  {{- with .Values.head.rayLabels }}
  labels: {{- toYaml . | nindent 4 }}
  {{- end }}
  template:
    {{- include "raymoe.pod" (dict "root" . "group" .Values.head "name" "head" "head" true) | nindent 4 }}
workerGroupSpecs:
{{- range $name, $group := include "raymoe.groups" . | fromYaml }}
  - groupName: {{ $name }}
    minReplicas: {{ int $group.minReplicas }}
    maxReplicas: {{ int $group.maxReplicas }}
    {{- if $root.Values.autoscaling.enabled }}
    # `replicas` is the autoscaler's: none, or what it has set.
    {{- with get $live $name }}
    {{- with .replicas }}
    replicas: {{ max $group.minReplicas (min $group.maxReplicas (int .)) }}
    {{- end }}
    {{- with .scaleStrategy }}
    scaleStrategy: {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- end }}
    {{- if not (kindIs "invalid" $group.idleTimeoutSeconds) }}
    idleTimeoutSeconds: {{ int $group.idleTimeoutSeconds }}
    {{- end }}
    {{- with int $group.priority }}
    priority: {{ . }}
    {{- end }}
    {{- else }}
    replicas: {{ int (ternary $group.minReplicas $group.replicas (kindIs "invalid" $group.replicas)) }}
    {{- end }}
    rayStartParams: {{- toYaml $group.rayStartParams | nindent 6 }}
    {{- $resources := deepCopy $group.rayResources }}
    {{- if eq $group.role "expert" }}
    {{- $_ := set $resources "CPU" "0" }}
    {{- $_ := set $resources $root.Values.expertResource.name (toString (int $group.hostsPerPod)) }}
    {{- else if $resources }}
    {{- $_ := set $resources "CPU" (include "raymoe.groupCpus" $group) }}
    {{- end }}
    {{- with $resources }}
    resources: {{- toYaml . | nindent 6 }}
    {{- end }}
    {{- with $group.rayLabels }}
    labels: {{- toYaml . | nindent 6 }}
    {{- end }}
    template:
      {{- include "raymoe.pod" (dict "root" $root "group" $group "name" $name "head" false) | nindent 6 }}
{{- end }}
{{- with .Values.clusterSpec }}
{{ toYaml . }}
{{- end }}
{{- end -}}
