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

{{- /* CPUs of a pod of a group, such as 1.5; of one that names none, nothing. */ -}}
{{- define "raymoe.podCpus" -}}
{{- $resources := default dict .resources -}}
{{- with default (dig "requests" "cpu" "" $resources) (dig "limits" "cpu" "" $resources) -}}
{{- include "raymoe.amount" . -}}
{{- end -}}
{{- end -}}

{{- /* CPUs that Ray shares out in such a pod: KubeRay and the autoscaler round up. */ -}}
{{- define "raymoe.groupCpus" -}}
{{- max 1 (include "raymoe.podCpus" . | float64 | ceil | int64) -}}
{{- end -}}

{{- /* Pods of a group that there are from the beginning, and with `most` those that there can be. */ -}}
{{- define "raymoe.groupPods" -}}
{{- if .root.Values.autoscaling.enabled -}}
{{- int (ternary .group.maxReplicas .group.minReplicas .most) -}}
{{- else -}}
{{- int (ternary .group.minReplicas .group.replicas (kindIs "invalid" .group.replicas)) -}}
{{- end -}}
{{- end -}}

{{- /* Room for expert hosts with as many pods as there are from the beginning, and threads that each host may use. */ -}}
{{- define "raymoe.hosts" -}}
{{- $room := 0 -}}{{- $most := 0 -}}{{- $threads := 0 -}}{{- $groups := 0 -}}
{{- range $name, $group := include "raymoe.groups" . | fromYaml -}}
{{- if eq $group.role "expert" -}}
{{- $groups = add $groups 1 -}}
{{- $room = add $room (mul (include "raymoe.groupPods" (dict "root" $ "group" $group "most" false)) $group.hostsPerPod) -}}
{{- $most = add $most (mul (include "raymoe.groupPods" (dict "root" $ "group" $group "most" true)) $group.hostsPerPod) -}}
{{- $own := max 1 (div (include "raymoe.podCpus" $group | float64 | floor | int64) (int64 $group.hostsPerPod)) -}}
{{- if or (eq (int64 $threads) 0) (lt $own (int64 $threads)) -}}{{- $threads = $own -}}{{- end -}}
{{- end -}}
{{- end -}}
{{- toYaml (dict "room" $room "most" $most "threads" $threads "groups" $groups) -}}
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
