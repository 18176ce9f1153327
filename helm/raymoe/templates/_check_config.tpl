{{- /* What cannot work of raymoe's own configuration, with the groups that there are. */ -}}
{{- define "raymoe.checkMode" -}}
{{- if eq .Values.mode "serve" -}}
{{- if not .Values.serve.checkpoint -}}
{{- fail "serve.checkpoint is missing: name the directory of a checkpoint as pods see it, such as /checkpoints/demo." -}}
{{- end -}}
{{- include "raymoe.checkWeights" . -}}
{{- else -}}
{{- range $key := list "ingress" "httpRoute" "grpcRoute" -}}
{{- if (get $.Values $key).enabled -}}
{{- fail (printf "%s.enabled is for mode serve, and mode is %s: set it to false." $key $.Values.mode) -}}
{{- end -}}
{{- end -}}
{{- range $key := list "prometheusRule" "dashboard" -}}
{{- if (get $.Values.monitoring $key).enabled -}}
{{- fail (printf "monitoring.%s.enabled is for mode serve, whose metrics it is about, and mode is %s: set it to false." $key $.Values.mode) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.mode "train") .Values.train.suspend (not .Values.train.shutdownAfterJobFinishes) -}}
{{- fail "train.suspend needs train.shutdownAfterJobFinishes: set that to true." -}}
{{- end -}}
{{- if eq .Values.mode "serve" -}}{{- include "raymoe.checkReplicas" . -}}{{- end -}}
{{- if eq .Values.mode "train" -}}{{- include "raymoe.checkWorkers" . -}}{{- end -}}
{{- end -}}

{{- /* Where Ray finds CPUs: all groups but those for experts, which offer none. A group whose pods name no CPUs has those
of its nodes, which are unknown here. */ -}}
{{- define "raymoe.cpuGroups" -}}
{{- $groups := dict -}}{{- $known := true -}}
{{- range $name, $group := include "raymoe.groups" . | fromYaml -}}
{{- if ne $group.role "expert" -}}
{{- if not (include "raymoe.podCpus" $group) -}}{{- $known = false -}}{{- end -}}
{{- $_ := set $groups $name $group -}}
{{- end -}}
{{- end -}}
{{- toYaml (dict "groups" $groups "known" $known) -}}
{{- end -}}

{{- define "raymoe.checkWorkers" -}}
{{- $cpus := 0 -}}
{{- $offers := include "raymoe.cpuGroups" . | fromYaml -}}
{{- range $name, $group := $offers.groups -}}
{{- $cpus = add $cpus (mul (include "raymoe.groupPods" (dict "root" $ "group" $group "most" false)) (include "raymoe.groupCpus" $group)) -}}
{{- end -}}
{{- $training := default dict (get (default dict .Values.train.config) "training") -}}
{{- $wanted := mulf (dig "workers" 1 $training) (dig "cpus_per_worker" 1 $training) -}}
{{- if and $offers.known (gt $wanted (float64 $cpus)) -}}
{{- fail (printf "train.config.training asks for %g CPUs (workers x cpus_per_worker) and the groups but for experts begin with %d: raise their minReplicas or resources." $wanted (int $cpus)) -}}
{{- end -}}
{{- end -}}

{{- /* A replica of the trunk is in one pod. Ray counts in parts of ten thousand, and so does this: 2 CPUs are 20 x 0.1. */ -}}
{{- define "raymoe.checkReplicas" -}}
{{- $serving := default dict (get (default dict .Values.serve.config) "serving") -}}
{{- $field := "replicas" -}}{{- $wanted := dig "replicas" 1 $serving | int64 -}}
{{- $scaling := get $serving "autoscaling" -}}
{{- if kindIs "map" $scaling -}}
{{- $field = "autoscaling.max_replicas" -}}{{- $wanted = dig "max_replicas" 1 $scaling | int64 -}}
{{- $least := dig "min_replicas" 1 $scaling | int64 -}}
{{- if gt $least $wanted -}}
{{- fail (printf "serve.config.serving.autoscaling.min_replicas (%d) is more than max_replicas (%d): lower the one or raise the other." $least $wanted) -}}
{{- end -}}
{{- end -}}
{{- $each := dig "cpus_per_replica" 1 $serving -}}
{{- $parts := mulf $each 10000 | int64 -}}
{{- $offers := include "raymoe.cpuGroups" . | fromYaml -}}
{{- if and $offers.known (gt $parts 0) -}}
{{- $room := 0 -}}
{{- range $name, $group := $offers.groups -}}
{{- $room = add $room (mul (include "raymoe.groupPods" (dict "root" $ "group" $group "most" true)) (div (mul 10000 (include "raymoe.groupCpus" $group)) $parts)) -}}
{{- end -}}
{{- if not $room -}}
{{- fail (printf "serve.config.serving.cpus_per_replica is %v and no pod of the groups but for experts has as many CPUs, so that no replica of the trunk finds room: enable workerGroups.trunk, raise its resources, or lower cpus_per_replica." $each) -}}
{{- end -}}
{{- if gt $wanted (int64 $room) -}}
{{- fail (printf "serve.config.serving.%s (%d) is more than the groups but for experts ever have room for (%d, with cpus_per_replica %v): raise their %s or resources, or lower it." $field $wanted (int $room) $each (ternary "maxReplicas" "replicas" .Values.autoscaling.enabled)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.checkHosts" -}}
{{- $hosts := include "raymoe.hosts" . | fromYaml -}}
{{- $cluster := include "raymoe.cluster" . | fromYaml -}}
{{- $section := printf "%s.config.cluster" .Values.mode -}}
{{- if ne .Values.mode "cluster" -}}
{{- if and $hosts.groups (gt (int64 (default 0 $cluster.expert_hosts)) (int64 $hosts.most)) -}}
{{- fail (printf "%s.expert_hosts (%d) is more than the expert groups ever have room for (%d): raise their maxReplicas or hostsPerPod." $section (int $cluster.expert_hosts) (int $hosts.most)) -}}
{{- end -}}
{{- with $cluster.autoscaling -}}
{{- $least := dig "min_hosts" 1 . | int64 -}}{{- $most := dig "max_hosts" 4 . | int64 -}}
{{- if gt $least $most -}}
{{- fail (printf "%s.autoscaling.min_hosts (%d) is more than max_hosts (%d): lower the one or raise the other." $section $least $most) -}}
{{- end -}}
{{- if and $hosts.groups (gt $most (int64 $hosts.most)) -}}
{{- fail (printf "%s.autoscaling.max_hosts (%d) is more than the expert groups ever have room for (%d): raise their maxReplicas or hostsPerPod." $section $most (int $hosts.most)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if or (hasPrefix "127." (default "" $cluster.interface)) (has $cluster.interface (list "::1" "[::1]" "localhost")) -}}
{{- fail (printf "%s.interface is the loopback, where no other pod reaches a host: remove it." $section) -}}
{{- end -}}
{{- end -}}
