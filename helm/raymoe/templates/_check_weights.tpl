{{- /* What cannot work of what is served, and of the keys that requests carry. */ -}}

{{- define "raymoe.checkWeights" -}}
{{- $given := .Values.serve.checkpoint -}}
{{- $name := "[A-Za-z0-9][A-Za-z0-9._-]*" -}}
{{- if hasPrefix "hf://" $given -}}
{{- if not (regexMatch (printf "^hf://%s/%s(@%s(/%s)*)?$" $name $name $name $name) $given) -}}
{{- fail (printf "serve.checkpoint is %q, which is no address of a Hugging Face model: write hf://ORG/NAME or hf://ORG/NAME@REVISION." $given) -}}
{{- end -}}
{{- else if hasPrefix "s3://" $given -}}
{{- if not (regexMatch "^s3://[a-z0-9][a-z0-9.-]*(/[A-Za-z0-9_=+][A-Za-z0-9._=+-]*)+/?$" $given) -}}
{{- fail (printf "serve.checkpoint is %q, which is no address of a folder in a bucket: write s3://BUCKET/PREFIX." $given) -}}
{{- end -}}
{{- if not (or .Values.serve.fetch.image .Values.serve.fetch.command) -}}
{{- fail "serve.checkpoint is an address of S3 and the image has no command for it: set serve.fetch.image to one with `aws`, or serve.fetch.image and serve.fetch.command." -}}
{{- end -}}
{{- else if hasPrefix "pvc://" $given -}}
{{- if not (regexMatch "^pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?(/[A-Za-z0-9_=+][A-Za-z0-9._=+-]*)*/?$" $given) -}}
{{- fail (printf "serve.checkpoint is %q, which is no path in a claim: write pvc://CLAIM/PATH." $given) -}}
{{- end -}}
{{- else if not (hasPrefix "/" $given) -}}
{{- fail (printf "serve.checkpoint is %q, which is no absolute path and no address: name the directory of a checkpoint as pods see it, such as /checkpoints/demo, or write hf://, s3:// or pvc://." $given) -}}
{{- end -}}
{{- include "raymoe.checkResources" (dict "path" "serve.fetch.resources" "resources" .Values.serve.fetch.resources) -}}
{{- $sections := dict "serve.fetch" .Values.serve.fetch -}}
{{- if has (include "raymoe.weights" . | fromYaml).scheme (list "hf" "s3") -}}
{{- $_ := set $sections "podDefaults" .Values.podDefaults -}}
{{- end -}}
{{- range $path, $values := $sections -}}
{{- $extra := list -}}{{- range $values.extraEnv -}}{{- $extra = append $extra .name -}}{{- end -}}
{{- range $field, $names := dict "env" (keys (default dict $values.env)) "extraEnv" $extra -}}
{{- range $name := list "TARGET" "PARTIAL" -}}
{{- if has $name $names -}}
{{- fail (printf "%s.%s sets %s, by which the chart says where the weights go: remove it." $path $field $name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if has (int (default 0 .Values.serve.grpcPort)) (list 6379 8000 8001 8002 8080 8265 10001 44217 44227 52365) -}}
{{- fail (printf "serve.grpcPort is %d, which the head has another use for: set another one, such as 9000." (int .Values.serve.grpcPort)) -}}
{{- end -}}
{{- include "raymoe.checkKeys" . -}}
{{- end -}}

{{- /* A RayService is no secret: those who may read it, and Ray's dashboard, see the arguments of the application. */ -}}
{{- define "raymoe.checkKeys" -}}
{{- $serving := default dict (get (default dict .Values.serve.config) "serving") -}}
{{- range default list $serving.api_keys -}}
{{- if not (regexMatch "^sha256:[0-9a-fA-F]{64}$" .) -}}
{{- fail "serve.config.serving.api_keys has a key that would stand in the RayService in plain text: put it into a secret (kubectl create secret generic NAME --from-literal=key=…) and its name into serve.apiKeys.existingSecret, or give its digest (sha256:…)." -}}
{{- end -}}
{{- end -}}
{{- if (default dict $serving.front).tls_certificate -}}
{{- fail "serve.config.serving.front.tls_certificate has no place in a pod: KubeRay asks the port of clients for its health in plain text, and would send no request there. Remove it, and end TLS at the Ingress, the Gateway or the load balancer." -}}
{{- end -}}
{{- if and .Values.serve.apiKeys.existingSecret $serving.api_keys_file -}}
{{- fail "serve.apiKeys.existingSecret and serve.config.serving.api_keys_file are both set: remove one of them." -}}
{{- end -}}
{{- end -}}
