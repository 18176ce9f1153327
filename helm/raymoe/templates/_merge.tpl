{{- /* `own` over `base`, as YAML: what `own` has wins, also a false, a 0 or an empty text, which sprig's merge takes for
missing; maps are added to one another, but for those with a name in `whole`, which take the other's place, and so do
lists, but for those with a name in `extend`. */ -}}
{{- define "raymoe.over" -}}
{{- $made := deepCopy (default dict .base) -}}
{{- $whole := default list .whole -}}{{- $extend := default list .extend -}}
{{- range $key, $value := default dict .own -}}
{{- if and (kindIs "map" $value) (kindIs "map" (get $made $key)) (not (has $key $whole)) -}}
{{- $_ := set $made $key (include "raymoe.over" (dict "base" (get $made $key) "own" $value) | fromYaml) -}}
{{- else if and (has $key $extend) (kindIs "slice" (get $made $key)) -}}
{{- $_ := set $made $key (include "raymoe.extended" (dict "base" (get $made $key) "own" $value) | fromYamlArray) -}}
{{- else -}}
{{- $_ := set $made $key $value -}}
{{- end -}}
{{- end -}}
{{- toYaml $made -}}
{{- end -}}

{{- /* Two lists as one, as YAML; what is mounted at a path of `own`, or has a name of its, is left out of `base`. */ -}}
{{- define "raymoe.extended" -}}
{{- $taken := list -}}
{{- range .own -}}{{- with default .name .mountPath -}}{{- $taken = append $taken . -}}{{- end -}}{{- end -}}
{{- $made := list -}}
{{- range .base -}}{{- if not (has (default .name .mountPath) $taken) -}}{{- $made = append $made . -}}{{- end -}}{{- end -}}
{{- toYaml (concat $made (default list .own)) -}}
{{- end -}}

{{- /* The fields of a pod, from its section of the values (`own`) and `podDefaults`. */ -}}
{{- define "raymoe.podValues" -}}
{{- include "raymoe.overPod" (dict "base" .root.Values.podDefaults "own" .own) -}}
{{- end -}}

{{- /* The fields of a pod, from those of a section (`own`) and of its defaults (`base`). */ -}}
{{- define "raymoe.overPod" -}}
{{- $own := default dict .own -}}
{{- $extend := get (ternary $own .base (hasKey $own "extend")) "extend" -}}
{{- include "raymoe.over" (dict "base" .base "own" $own "whole" (list "resources" "affinity" "dnsConfig") "extend" $extend) -}}
{{- end -}}

{{- /* The fields of a container beside those of pods, of the autoscaler or what fetches weights: those of its section
(`own`), to which the variables, mount paths (with `mounts`) and security context of `podDefaults` are added. */ -}}
{{- define "raymoe.besideValues" -}}
{{- $base := pick .root.Values.podDefaults "env" "extraEnv" "envFrom" "securityContext" -}}
{{- if .mounts -}}{{- $base = pick .root.Values.podDefaults "env" "extraEnv" "envFrom" "securityContext" "extraVolumeMounts" -}}{{- end -}}
{{- include "raymoe.over" (dict "base" $base "own" .own "extend" (list "extraEnv" "envFrom" "extraVolumeMounts")) -}}
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
