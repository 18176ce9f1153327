{{- /* The worker groups that there are, as YAML: each with its defaults filled in. Maps of a group are added to those
of the defaults, everything else takes their place; a value of 0 or false stays one. */ -}}
{{- define "raymoe.groups" -}}
{{- $groups := dict -}}
{{- range $name, $own := .Values.workerGroups -}}
{{- $group := deepCopy $.Values.workerDefaults -}}
{{- range $key, $value := default dict $own -}}
{{- if and (kindIs "map" $value) (ne $key "resources") (ne $key "affinity") -}}
{{- $_ := set $group $key (merge (deepCopy $value) (default dict (get $group $key))) -}}
{{- else -}}
{{- $_ := set $group $key $value -}}
{{- end -}}
{{- end -}}
{{- if $group.enabled -}}{{- $_ := set $groups $name $group -}}{{- end -}}
{{- end -}}
{{- toYaml $groups -}}
{{- end -}}

{{- /* Whole CPUs of a quantity such as 1500m, at least `least`. */ -}}
{{- define "raymoe.cpus" -}}
{{- $text := toString .quantity -}}
{{- $cpus := ternary (div (int64 (trimSuffix "m" $text)) 1000) (int64 (floor (float64 $text))) (hasSuffix "m" $text) -}}
{{- max $cpus .least -}}
{{- end -}}

{{- define "raymoe.groupCpus" -}}
{{- $resources := default dict .resources -}}
{{- $cpu := default (dig "requests" "cpu" "1" $resources) (dig "limits" "cpu" "" $resources) -}}
{{- include "raymoe.cpus" (dict "quantity" $cpu "least" 1) -}}
{{- end -}}

{{- /* Room for expert hosts with as many pods as there are from the beginning, and threads that each host may use. */ -}}
{{- define "raymoe.hosts" -}}
{{- $room := 0 -}}{{- $most := 0 -}}{{- $threads := 0 -}}{{- $groups := 0 -}}
{{- range $name, $group := include "raymoe.groups" . | fromYaml -}}
{{- if eq $group.role "expert" -}}
{{- $groups = add $groups 1 -}}
{{- $pods := int $group.minReplicas -}}
{{- if and (not $.Values.autoscaling.enabled) (not (kindIs "invalid" $group.replicas)) -}}{{- $pods = int $group.replicas -}}{{- end -}}
{{- $room = add $room (mul $pods $group.hostsPerPod) -}}
{{- $most = add $most (mul $group.maxReplicas $group.hostsPerPod) -}}
{{- $own := max 1 (div (include "raymoe.groupCpus" $group | int64) (int64 $group.hostsPerPod)) -}}
{{- if or (eq (int64 $threads) 0) (lt $own (int64 $threads)) -}}{{- $threads = $own -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml (dict "room" $room "most" (ternary $most $room $.Values.autoscaling.enabled) "threads" $threads "groups" $groups) -}}
{{- end -}}

{{- /* The section `cluster` of raymoe's configuration: where hosts go, under what the values say. Without an expert
group, hosts take CPUs wherever there are some. */ -}}
{{- define "raymoe.cluster" -}}
{{- $hosts := include "raymoe.hosts" . | fromYaml -}}
{{- $cluster := dict "start_timeout" 1800 -}}
{{- if not .Values.tls.enabled -}}{{- $_ := set $cluster "interface" "node" -}}{{- end -}}
{{- if $hosts.groups -}}
{{- $_ := set $cluster "expert_hosts" (max 1 (int64 $hosts.room)) -}}
{{- $_ := set $cluster "cpus_per_host" 0 -}}
{{- $_ := set $cluster "threads_per_host" (int64 $hosts.threads) -}}
{{- $_ := set $cluster "host_resources" (dict .Values.expertResource.name 1) -}}
{{- end -}}
{{- $config := ternary .Values.serve.config .Values.train.config (eq .Values.mode "serve") -}}
{{- $own := default dict (get (default dict $config) "cluster") -}}
{{- range $key, $value := $own -}}{{- $_ := set $cluster $key $value -}}{{- end -}}
{{- toYaml $cluster -}}
{{- end -}}
