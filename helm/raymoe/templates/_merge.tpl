{{- /* `own` over `base`, as YAML: what `own` has wins, also a false, a 0 or an empty text, which sprig's merge takes for
missing; maps are added to one another, but for those with a name in `whole`, which take the other's place. */ -}}
{{- define "raymoe.over" -}}
{{- $made := deepCopy (default dict .base) -}}
{{- $whole := default list .whole -}}
{{- range $key, $value := default dict .own -}}
{{- if and (kindIs "map" $value) (kindIs "map" (get $made $key)) (not (has $key $whole)) -}}
{{- $_ := set $made $key (include "raymoe.over" (dict "base" (get $made $key) "own" $value) | fromYaml) -}}
{{- else -}}
{{- $_ := set $made $key $value -}}
{{- end -}}
{{- end -}}
{{- toYaml $made -}}
{{- end -}}

{{- /* The fields of a pod, from its section of the values (`own`) and `podDefaults`. */ -}}
{{- define "raymoe.podValues" -}}
{{- include "raymoe.over" (dict "base" .root.Values.podDefaults "own" .own "whole" (list "resources" "affinity" "dnsConfig")) -}}
{{- end -}}

{{- /* Variables of a container, each once: `extraEnv` wins over `env`, and both over the chart's (`chart`, a list). */ -}}
{{- define "raymoe.env" -}}
{{- $extra := list -}}{{- range .values.extraEnv -}}{{- $extra = append $extra .name -}}{{- end -}}
{{- $env := default dict .values.env -}}
{{- $made := list -}}
{{- range .chart -}}
{{- if not (or (has .name $extra) (hasKey $env .name)) -}}{{- $made = append $made . -}}{{- end -}}
{{- end -}}
{{- range $name, $value := $env -}}
{{- if not (has $name $extra) -}}{{- $made = append $made (dict "name" $name "value" $value) -}}{{- end -}}
{{- end -}}
{{- toYaml (concat $made (default list .values.extraEnv)) -}}
{{- end -}}
