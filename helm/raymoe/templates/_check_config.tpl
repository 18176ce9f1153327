{{- /* What cannot work of raymoe's own configuration, with the groups that there are. */ -}}
{{- define "raymoe.checkMode" -}}
{{- if eq .Values.mode "serve" -}}
{{- if not .Values.serve.checkpoint -}}
{{- fail "serve.checkpoint is missing: name the directory of a checkpoint as pods see it, such as /checkpoints/demo." -}}
{{- end -}}
{{- else -}}
{{- range $key := list "ingress" -}}
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
{{- $groups := include "raymoe.groups" . | fromYaml -}}
{{- $cpus := 0 -}}
{{- range $name, $group := $groups -}}
{{- if ne $group.role "expert" -}}
{{- $pods := int $group.minReplicas -}}
{{- if and (not $.Values.autoscaling.enabled) (not (kindIs "invalid" $group.replicas)) -}}{{- $pods = int $group.replicas -}}{{- end -}}
{{- $cpus = add $cpus (mul $pods (include "raymoe.groupCpus" $group | int64)) -}}
{{- end -}}
{{- end -}}
{{- if eq .Values.mode "train" -}}
{{- $training := default dict (get (default dict .Values.train.config) "training") -}}
{{- $wanted := mulf (float64 (default 1 $training.workers)) (float64 (default 1 $training.cpus_per_worker)) -}}
{{- if gt $wanted (float64 $cpus) -}}
{{- fail (printf "train.config.training asks for %g CPUs (workers x cpus_per_worker) and the groups but for experts begin with %d: raise their minReplicas or resources." $wanted (int $cpus)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.checkHosts" -}}
{{- $hosts := include "raymoe.hosts" . | fromYaml -}}
{{- $cluster := include "raymoe.cluster" . | fromYaml -}}
{{- $section := printf "%s.config.cluster" .Values.mode -}}
{{- if and $hosts.groups (ne .Values.mode "cluster") -}}
{{- if gt (int64 (default 0 $cluster.expert_hosts)) (int64 $hosts.most) -}}
{{- fail (printf "%s.expert_hosts (%d) is more than the expert groups ever have room for (%d): raise their maxReplicas or hostsPerPod." $section (int $cluster.expert_hosts) (int $hosts.most)) -}}
{{- end -}}
{{- with $cluster.autoscaling -}}
{{- if gt (int64 (default 4 .max_hosts)) (int64 $hosts.most) -}}
{{- fail (printf "%s.autoscaling.max_hosts (%d) is more than the expert groups ever have room for (%d): raise their maxReplicas or hostsPerPod." $section (int (default 4 .max_hosts)) (int $hosts.most)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if hasPrefix "127." (default "" $cluster.interface) -}}
{{- fail (printf "%s.interface is the loopback, where no other pod reaches a host: remove it." $section) -}}
{{- end -}}
{{- end -}}
