{{- /* Fields of `clusterSpec` that the chart or KubeRay would not take. */ -}}
{{- define "raymoe.checkClusterSpec" -}}
{{- $spec := .Values.clusterSpec -}}
{{- $own := dict "headGroupSpec" "head" "workerGroupSpecs" "workerGroups" "rayVersion" "rayVersion" "authOptions" "auth" "autoscalerOptions" "autoscaling" "enableInTreeAutoscaling" "autoscaling.enabled" "upgradeStrategy" "serve.upgradeStrategy or cluster.upgradeStrategy" -}}
{{- range $key, $value := $own -}}
{{- if hasKey $spec $key -}}
{{- fail (printf "clusterSpec.%s is the chart's own field: set %s instead." $key $value) -}}
{{- end -}}
{{- end -}}
{{- $gated := dict "networkPolicy" "RayClusterNetworkPolicy" "tlsOptions" "RayClusterMTLS" "historyServerOptions" "RayClusterHistoryServer" -}}
{{- range $key, $gate := $gated -}}
{{- if and (hasKey $spec $key) (not (has $gate $.Values.kuberay.featureGates)) -}}
{{- fail (printf "clusterSpec.%s needs KubeRay's feature gate %s: switch it on in the operator and name it in kuberay.featureGates." $key $gate) -}}
{{- end -}}
{{- end -}}
{{- with $spec.gcsFaultToleranceOptions -}}
{{- $backend := default "redis" .backend -}}
{{- if eq $backend "rocksdb" -}}
{{- if not (has "GCSFaultToleranceEmbeddedStorage" $.Values.kuberay.featureGates) -}}
{{- fail "clusterSpec.gcsFaultToleranceOptions.backend rocksdb needs KubeRay's feature gate GCSFaultToleranceEmbeddedStorage: switch it on in the operator and name it in kuberay.featureGates." -}}
{{- end -}}
{{- range $key := list "redisAddress" "redisUsername" "redisPassword" "externalStorageNamespace" -}}
{{- if hasKey $spec.gcsFaultToleranceOptions $key -}}
{{- fail (printf "clusterSpec.gcsFaultToleranceOptions.%s belongs to the backend redis and the backend is rocksdb: remove one of them." $key) -}}
{{- end -}}
{{- end -}}
{{- else -}}
{{- if hasKey . "storage" -}}
{{- fail "clusterSpec.gcsFaultToleranceOptions.storage belongs to the backend rocksdb and the backend is redis: remove one of them." -}}
{{- end -}}
{{- if not .redisAddress -}}
{{- fail "clusterSpec.gcsFaultToleranceOptions.redisAddress is missing: give the address of a Redis." -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
