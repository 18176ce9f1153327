{{- /* The worker groups that there are, as YAML: each with its defaults filled in. Maps of a group are added to those
of the defaults, everything else takes their place; a value of 0 or false stays one. */ -}}
{{- define "raymoe.groups" -}}
{{- $groups := dict -}}
{{- $defaults := include "raymoe.podValues" (dict "root" . "own" .Values.workerDefaults) | fromYaml -}}
{{- range $name, $own := .Values.workerGroups -}}
{{- $group := include "raymoe.overPod" (dict "base" $defaults "own" $own) | fromYaml -}}
{{- if $group.enabled -}}{{- $_ := set $groups $name $group -}}{{- end -}}
{{- end -}}
{{- toYaml $groups -}}
{{- end -}}

{{- /* The head's values, with the defaults of all pods. */ -}}
{{- define "raymoe.head" -}}
{{- include "raymoe.podValues" (dict "root" . "own" .Values.head) -}}
{{- end -}}

{{- /* Arguments of `ray start` of a pod: of the head (`head`) or of a group (`group`). Ray keeps its object store on disk
where /dev/shm is smaller than it, and takes three tenths of the memory unless it is told. */ -}}
{{- define "raymoe.rayStartParams" -}}
{{- $made := dict "object-store-memory" (include "raymoe.storeMemory" .group.sharedMemory) -}}
{{- if .head -}}{{- $_ := set $made "dashboard-host" .root.Values.listenHost -}}{{- end -}}
{{- include "raymoe.over" (dict "base" $made "own" .group.rayStartParams) -}}
{{- end -}}

{{- /* Bytes of Ray's object store in a /dev/shm of this size: the rest is for whatever else is kept there. */ -}}
{{- define "raymoe.storeMemory" -}}
{{- mulf (include "raymoe.amount" .) 0.8 | floor | int64 -}}
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

{{- /* Pods of a replica of a group: KubeRay starts and ends so many together. */ -}}
{{- define "raymoe.podsPerReplica" -}}
{{- dig "numOfHosts" 1 (default dict .groupSpec) | int -}}
{{- end -}}

{{- /* Pods of a group that there are from the beginning, and with `most` those that there can be. */ -}}
{{- define "raymoe.groupPods" -}}
{{- $replicas := ternary .group.minReplicas .group.replicas (kindIs "invalid" .group.replicas) -}}
{{- if .root.Values.autoscaling.enabled -}}
{{- $replicas = ternary .group.maxReplicas .group.minReplicas .most -}}
{{- end -}}
{{- mul $replicas (include "raymoe.podsPerReplica" .group) -}}
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
