{{- /* Names and labels. */ -}}

{{- define "raymoe.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- if contains $name .Release.Name -}}{{ .Release.Name }}{{- else -}}{{ printf "%s-%s" .Release.Name $name }}{{- end -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.selector" -}}
app.kubernetes.io/name: raymoe
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "raymoe.labels" -}}
{{ include "raymoe.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- /* What the name must be short for: KubeRay adds to it. */ -}}
{{- define "raymoe.kind" -}}
{{- get (dict "serve" "RayService" "train" "RayJob" "cluster" "RayCluster") .Values.mode -}}
{{- end -}}

{{- define "raymoe.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ default $.Chart.AppVersion .tag }}{{- end -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.authSecret" -}}
{{- default (printf "%s-token" (include "raymoe.fullname" .)) .Values.auth.existingSecret -}}
{{- end -}}

{{- define "raymoe.tlsSecret" -}}
{{- default (printf "%s-tls" (include "raymoe.fullname" .)) .Values.tls.existingSecret -}}
{{- end -}}

{{- define "raymoe.serviceAccount" -}}
{{- if .Values.serviceAccount.name -}}{{ .Values.serviceAccount.name }}
{{- else if .Values.serviceAccount.create -}}{{ include "raymoe.fullname" . }}
{{- end -}}
{{- end -}}

{{- define "raymoe.claim" -}}
{{- default (printf "%s-checkpoints" (include "raymoe.fullname" .)) .Values.checkpoints.existingClaim -}}
{{- end -}}

{{- define "raymoe.headService" -}}
{{ include "raymoe.fullname" . }}-head-svc
{{- end -}}

{{- define "raymoe.serveService" -}}
{{ include "raymoe.fullname" . }}-serve-svc
{{- end -}}
