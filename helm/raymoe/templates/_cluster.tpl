{{- /* The spec of a RayCluster, which all three modes share. */ -}}
{{- define "raymoe.rayCluster" -}}
{{- $root := . -}}
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
    # No `replicas`: that is the autoscaler's, and an upgrade would set it back.
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
