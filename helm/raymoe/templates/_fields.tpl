{{- /* Parts of the specs of RayService, RayJob and RayCluster. */ -}}

{{- /* Fields that others own where the values leave them empty: Kueue suspends and resumes, and a field that helm 4 has
applied once is helm's. Takes the values of the mode. */ -}}
{{- define "raymoe.others" -}}
{{- $fields := dict -}}
{{- if not (kindIs "invalid" .suspend) -}}{{- $_ := set $fields "suspend" .suspend -}}{{- end -}}
{{- with .managedBy -}}{{- $_ := set $fields "managedBy" . -}}{{- end -}}
{{- with $fields -}}{{- toYaml . -}}{{- end -}}
{{- end -}}

{{- /* The spec of the Service; that of `serve.service` wins. Ports are found by name: KubeRay's selector takes in pods of all
groups, and only the head's has ports of these names. */ -}}
{{- define "raymoe.service" -}}
{{- $grpc := .Values.serve.grpcPort -}}
{{- with .Values.serve.service -}}
{{- $port := dict "name" "serve" "port" (int .port) "targetPort" "serve" -}}
{{- with .nodePort -}}{{- $_ := set $port "nodePort" (int .) -}}{{- end -}}
{{- with .appProtocol -}}{{- $_ := set $port "appProtocol" . -}}{{- end -}}
{{- $ports := list $port -}}
{{- with $grpc -}}{{- $ports = append $ports (dict "name" "grpc" "port" (int .) "targetPort" "grpc" "appProtocol" "kubernetes.io/h2c") -}}{{- end -}}
{{- $spec := dict "type" .type "ports" (concat $ports .extraPorts) -}}
{{- range $key := list "loadBalancerClass" "loadBalancerSourceRanges" "externalTrafficPolicy" "internalTrafficPolicy" "ipFamilyPolicy" "ipFamilies" -}}
{{- with get $.Values.serve.service $key -}}{{- $_ := set $spec $key . -}}{{- end -}}
{{- end -}}
{{- include "raymoe.merged" (list $spec .spec) -}}
{{- end -}}
{{- end -}}
