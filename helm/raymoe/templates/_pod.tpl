{{- /* The template of all pods: head, workers, the one that submits a job, and that of `helm test`. */ -}}

{{- /* Metadata and spec of a pod, as YAML. Takes `root`, `values` (the pod's, with `podDefaults`), `name` (its component),
and what the chart says of it beside these: `pod`, fields of its spec, and `container`, those of its first container. */ -}}
{{- define "raymoe.podTemplate" -}}
{{- $root := .root -}}{{- $values := .values -}}
{{- $metadata := dict "labels" (include "raymoe.podLabels" (dict "root" $root "component" .name "labels" $values.podLabels) | fromYaml) -}}
{{- with $values.podAnnotations -}}{{- $_ := set $metadata "annotations" . -}}{{- end -}}
{{- $spec := dict "automountServiceAccountToken" false "enableServiceLinks" false -}}
{{- with include "raymoe.serviceAccount" $root -}}{{- $_ := set $spec "serviceAccountName" (toString .) -}}{{- end -}}
{{- with $root.Values.image.pullSecrets -}}
{{- $secrets := list -}}{{- range . -}}{{- $secrets = append $secrets (dict "name" .) -}}{{- end -}}
{{- $_ := set $spec "imagePullSecrets" $secrets -}}
{{- end -}}
{{- $_ := set $spec "securityContext" (include "raymoe.over" (dict "base" $root.Values.security.pod "own" $values.podSecurityContext) | fromYaml) -}}
{{- range $key := list "priorityClassName" "runtimeClassName" "schedulerName" "nodeSelector" "tolerations" "affinity" "topologySpreadConstraints" "dnsPolicy" "dnsConfig" "hostAliases" "resourceClaims" -}}
{{- with get $values $key -}}{{- $_ := set $spec $key . -}}{{- end -}}
{{- end -}}
{{- range $key, $value := .pod -}}{{- $_ := set $spec $key $value -}}{{- end -}}
{{- with concat (default list .pod.volumes) (default list $values.extraVolumes) -}}{{- $_ := set $spec "volumes" . -}}{{- end -}}
{{- $before := include "raymoe.ownContainers" (dict "root" $root "containers" $values.initContainers) | fromYamlArray -}}
{{- with concat (default list .pod.initContainers) $before -}}{{- $_ := set $spec "initContainers" . -}}{{- end -}}
{{- $beside := include "raymoe.ownContainers" (dict "root" $root "containers" $values.extraContainers) | fromYamlArray -}}
{{- $_ := set $spec "containers" (prepend $beside (include "raymoe.container" . | fromYaml)) -}}
{{- range $key, $value := $values.podSpec -}}{{- $_ := set $spec $key $value -}}{{- end -}}
{{- toYaml (dict "metadata" $metadata "spec" $spec) -}}
{{- end -}}

{{- /* A container of the chart's, as YAML: its own fields (`container`) with those of the values. */ -}}
{{- define "raymoe.container" -}}
{{- $root := .root -}}{{- $values := .values -}}
{{- $made := deepCopy .container -}}
{{- $_ := set $made "image" (default (include "raymoe.image" $root) $values.image) -}}
{{- $_ := set $made "imagePullPolicy" $root.Values.image.pullPolicy -}}
{{- $_ := set $made "resources" (default dict $values.resources) -}}
{{- $_ := set $made "securityContext" (include "raymoe.over" (dict "base" $root.Values.security.container "own" $values.securityContext) | fromYaml) -}}
{{- $_ := set $made "env" (include "raymoe.env" (dict "chart" .container.env "values" $values) | fromYamlArray) -}}
{{- with $values.envFrom -}}{{- $_ := set $made "envFrom" . -}}{{- end -}}
{{- with concat (default list .container.volumeMounts) (default list $values.extraVolumeMounts) -}}{{- $_ := set $made "volumeMounts" . -}}{{- end -}}
{{- range $key, $value := $values.containerSpec -}}
{{- if eq $key "ports" -}}{{- $value = include "raymoe.extended" (dict "base" $.container.ports "own" $value) | fromYamlArray -}}{{- end -}}
{{- $_ := set $made $key $value -}}
{{- end -}}
{{- toYaml $made -}}
{{- end -}}

{{- /* Containers of the values. A namespace that admits restricted pods alone asks each for its security context; whether
its image bears a read-only root file system, its user knows. */ -}}
{{- define "raymoe.ownContainers" -}}
{{- $made := list -}}
{{- $context := omit .root.Values.security.container "readOnlyRootFilesystem" -}}
{{- range .containers -}}
{{- $own := deepCopy . -}}
{{- $_ := set $own "securityContext" (include "raymoe.over" (dict "base" $context "own" .securityContext) | fromYaml) -}}
{{- $made = append $made $own -}}
{{- end -}}
{{- toYaml $made -}}
{{- end -}}

{{- /* The pod that submits a job. */ -}}
{{- define "raymoe.submitter" -}}
{{- $values := include "raymoe.podValues" (dict "root" . "own" .Values.train.submitter) | fromYaml -}}
{{- $pod := dict "restartPolicy" "Never" "volumes" (list (dict "name" "scratch" "emptyDir" (dict "sizeLimit" "100Mi"))) -}}
{{- $container := dict "name" "ray-job-submitter" "env" (list (dict "name" "HOME" "value" "/tmp")) -}}
{{- $_ := set $container "volumeMounts" (list (dict "name" "scratch" "mountPath" "/tmp")) -}}
{{- include "raymoe.podTemplate" (dict "root" . "values" $values "name" "submitter" "pod" $pod "container" $container) -}}
{{- end -}}
