{{- define "raymoe.weightsVolumes" -}}{{- end -}}
{{- define "raymoe.weightsMounts" -}}{{- end -}}
{{- define "raymoe.fetchers" -}}[]{{- end -}}

{{- /* Arguments of the application that serves: the sections of `serve.config`, and what the chart adds. */ -}}
{{- define "raymoe.serveArguments" -}}
{{- $made := deepCopy (default dict .Values.serve.config) -}}
{{- $_ := set $made "checkpoint" .Values.serve.checkpoint -}}
{{- $_ := set $made "cluster" (include "raymoe.cluster" . | fromYaml) -}}
{{- toYaml $made -}}
{{- end -}}
