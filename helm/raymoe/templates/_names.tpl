{{- /* Names, labels and the metadata of objects. All strings are quoted, since YAML reads words such as `on`, `null` and
`1e3` as something else. */ -}}

{{- define "raymoe.name" -}}
{{- default .Chart.Name .Values.nameOverride -}}
{{- end -}}

{{- define "raymoe.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride -}}
{{- else -}}
{{- $name := include "raymoe.name" . -}}
{{- if contains $name .Release.Name -}}{{ .Release.Name }}{{- else -}}{{ printf "%s-%s" .Release.Name $name }}{{- end -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.namespace" -}}
{{- default .Release.Namespace .Values.namespaceOverride -}}
{{- end -}}

{{- /* Labels by which pods are selected. The name is that of the chart within an umbrella chart, so that two of them in
one release do not select one another's pods. */ -}}
{{- define "raymoe.selector" -}}
app.kubernetes.io/name: {{ include "raymoe.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- /* A list of mappings as one, of which a later one wins, with an empty value too (`merge` would not see that). */ -}}
{{- define "raymoe.merged" -}}
{{- $all := dict -}}
{{- range . -}}{{- range $key, $value := default dict . -}}{{- $_ := set $all $key $value -}}{{- end -}}{{- end -}}
{{- toYaml $all -}}
{{- end -}}

{{- /* Labels of all objects. `commonLabels` win over those of the chart. */ -}}
{{- define "raymoe.labels" -}}
{{- $chart := dict "app.kubernetes.io/version" .Chart.AppVersion "app.kubernetes.io/managed-by" .Release.Service -}}
{{- $_ := set $chart "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_") -}}
{{- include "raymoe.merged" (list (include "raymoe.selector" . | fromYaml) $chart .Values.commonLabels) -}}
{{- end -}}

{{- /* The labels and annotations of an object: takes `root`, and perhaps `component`, `labels` and `annotations` of the
object itself, which win over the common ones, and `chart`, annotations that the chart needs. */ -}}
{{- define "raymoe.labelled" -}}
{{- $component := ternary (dict "app.kubernetes.io/component" .component) dict (hasKey . "component") -}}
labels: {{- include "raymoe.merged" (list (include "raymoe.labels" .root | fromYaml) .labels $component) | nindent 2 }}
{{- $annotations := include "raymoe.merged" (list .chart .root.Values.commonAnnotations .annotations) | fromYaml -}}
{{- with $annotations }}
annotations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- /* The metadata of an object: as `raymoe.labelled`, with its `name`. */ -}}
{{- define "raymoe.metadata" -}}
name: {{ .name | quote }}
namespace: {{ include "raymoe.namespace" .root | quote }}
{{ include "raymoe.labelled" . }}
{{- end -}}

{{- /* The labels of a pod: takes `root`, `component` and `labels`, which win over `commonLabels`. */ -}}
{{- define "raymoe.podLabels" -}}
{{- $chart := include "raymoe.selector" .root | fromYaml -}}
{{- $_ := set $chart "app.kubernetes.io/component" .component -}}
{{- include "raymoe.merged" (list .root.Values.commonLabels .labels $chart) -}}
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
