{{- /* Whether pods have the GPUs that the configuration reserves. KubeRay tells Ray of a pod's by its limits. */ -}}
{{- define "raymoe.groupGpus" -}}
{{- $gpus := 0 -}}
{{- range $name, $amount := dig "limits" (dict) (default dict .resources) -}}
{{- if or (hasSuffix "gpu" $name) (hasPrefix "nvidia.com/mig-" $name) -}}{{- $gpus = add $gpus (int64 (toString $amount)) -}}{{- end -}}
{{- end -}}
{{- $gpus -}}
{{- end -}}

{{- define "raymoe.checkGpus" -}}
{{- if ne .Values.mode "cluster" -}}
{{- $cluster := include "raymoe.cluster" . | fromYaml -}}
{{- $config := default dict (ternary .Values.serve.config .Values.train.config (eq .Values.mode "serve")) -}}
{{- $serves := eq .Values.mode "serve" -}}
{{- $section := default dict (get $config (ternary "serving" "training" $serves)) -}}
{{- $field := ternary "serving.gpus_per_replica" "training.gpus_per_worker" $serves -}}
{{- $each := dig (ternary "gpus_per_replica" "gpus_per_worker" $serves) 0 $section | float64 -}}
{{- $many := dig (ternary "replicas" "workers" $serves) 1 $section | float64 -}}
{{- $host := dig "gpus_per_host" 0 $cluster | float64 -}}
{{- $there := 0 -}}
{{- range $name, $group := include "raymoe.groups" . | fromYaml -}}
{{- $gpus := include "raymoe.groupGpus" $group | int64 -}}
{{- if eq $group.role "expert" -}}
{{- $wanted := mulf $host $group.hostsPerPod -}}
{{- if gt $wanted (float64 $gpus) -}}
{{- fail (printf "%s.config.cluster.gpus_per_host (%g) x workerGroups.%s.hostsPerPod (%d) is more than the GPUs of a pod (%d): set nvidia.com/gpu in its resources.limits, or lower one of the two." $.Values.mode $host $name (int $group.hostsPerPod) (int $gpus)) -}}
{{- end -}}
{{- else -}}
{{- $there = add $there (mul $gpus (include "raymoe.groupPods" (dict "root" $ "group" $group "most" true))) -}}
{{- end -}}
{{- end -}}
{{- if gt (mulf $each $many) (float64 $there) -}}
{{- fail (printf "%s.config.%s (%g) asks for more GPUs than the groups but for experts ever have (%d): set nvidia.com/gpu in the resources.limits of workerGroups.trunk, raise its maxReplicas, or lower it." .Values.mode $field $each (int $there)) -}}
{{- end -}}
{{- end -}}
{{- end -}}
