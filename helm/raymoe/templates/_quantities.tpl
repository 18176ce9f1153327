{{- /* Numbers that are written as text. */ -}}

{{- /* A quantity of Kubernetes, such as 500m or 1Gi, as a number. */ -}}
{{- define "raymoe.amount" -}}
{{- if kindIs "string" . -}}
{{- $units := dict "" 1 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $unit := regexFind "[A-Za-z]*$" . -}}
{{- mulf (trimSuffix $unit .) (get $units $unit) -}}
{{- else -}}
{{- float64 . -}}
{{- end -}}
{{- end -}}

{{- /* Seconds of a duration as Go writes them, such as 1h30m; 0 if it is none. Of all that templates have, only a change
of a date reads a duration. */ -}}
{{- define "raymoe.seconds" -}}
{{- $from := toDate "2006-01-02" "2000-01-01" -}}
{{- sub (unixEpoch (dateModify . $from)) (unixEpoch $from) -}}
{{- end -}}

{{- /* Milliseconds of a duration of one unit, such as 15s or 500ms. */ -}}
{{- define "raymoe.milliseconds" -}}
{{- $unit := regexFind "[a-z]+$" . -}}
{{- mul (trimSuffix $unit . | int64) (get (dict "ms" 1 "s" 1000 "m" 60000) $unit) -}}
{{- end -}}
