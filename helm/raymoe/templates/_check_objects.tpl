{{- /* What cannot work of the objects beside the pods, and of the fields of RayService, RayJob and RayCluster. */ -}}
{{- define "raymoe.checkFields" -}}
{{- include "raymoe.checkLabels" . -}}
{{- include "raymoe.checkKueue" . -}}
{{- if or (hasPrefix "127." .Values.listenHost) (has .Values.listenHost (list "::1" "localhost")) -}}
{{- fail (printf "listenHost is %q, the loopback, where no other pod reaches the head: set 0.0.0.0, or :: for IPv6." .Values.listenHost) -}}
{{- end -}}
{{- if eq .Values.mode "serve" -}}
{{- include "raymoe.checkService" .Values.serve.service -}}
{{- range $key := list "httpRoute" "grpcRoute" -}}
{{- with get $.Values $key -}}
{{- if and .enabled (not .parentRefs) -}}
{{- fail (printf "%s.parentRefs is empty: name the Gateway that takes the requests." $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- if and .Values.grpcRoute.enabled (not .Values.serve.grpcPort) -}}
{{- fail "grpcRoute.enabled needs a port of gRPC: set serve.grpcPort, or grpcRoute.enabled to false." -}}
{{- end -}}
{{- else if eq .Values.mode "train" -}}
{{- include "raymoe.checkJob" . -}}
{{- end -}}
{{- with .Values.monitoring.podMonitor -}}
{{- if and .enabled .authorization (not .authorization.credentials) -}}
{{- fail "monitoring.podMonitor.authorization.credentials is missing: name the secret and its key with the API key, or remove authorization." -}}
{{- end -}}
{{- if and .enabled .scrapeTimeout (gt (include "raymoe.milliseconds" .scrapeTimeout | int64) (include "raymoe.milliseconds" .interval | int64)) -}}
{{- fail (printf "monitoring.podMonitor.scrapeTimeout (%s) is more than interval (%s), which Prometheus does not take: lower the one or raise the other." .scrapeTimeout .interval) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.checkLabels" -}}
{{- $all := dict "commonLabels" .Values.commonLabels (printf "%s.labels" .Values.mode) (get .Values .Values.mode).labels -}}
{{- range $section := list "auth" "tls" "serviceAccount" "checkpoints" "networkPolicy" "podDisruptionBudget" "ingress" "httpRoute" "grpcRoute" "tests" -}}
{{- $_ := set $all (printf "%s.labels" $section) (get $.Values $section).labels -}}
{{- end -}}
{{- $_ := set $all "serve.service.labels" .Values.serve.service.labels -}}
{{- range $section, $values := .Values.monitoring -}}
{{- $_ := set $all (printf "monitoring.%s.labels" $section) $values.labels -}}
{{- end -}}
{{- range $path, $labels := $all -}}
{{- range $label, $value := $labels -}}
{{- if or (has $label (list "app.kubernetes.io/name" "app.kubernetes.io/instance" "app.kubernetes.io/component")) (and (eq $path "commonLabels") (hasPrefix "ray.io/" $label)) -}}
{{- fail (printf "%s sets the label %s, by which the chart or KubeRay finds its pods: remove it." $path $label) -}}
{{- end -}}
{{- if not (regexMatch "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$" $label) -}}
{{- fail (printf "%s has the key %q, which is no name of a Kubernetes label: change it." $path $label) -}}
{{- end -}}
{{- if not (regexMatch "^([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?$" $value) -}}
{{- fail (printf "%s.%s is %q, which is no value of a Kubernetes label: change it." $path $label $value) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* What Kueue does not take of an object with a queue, which it would leave suspended or refuse. */ -}}
{{- define "raymoe.checkKueue" -}}
{{- $own := get .Values .Values.mode -}}
{{- $labels := include "raymoe.merged" (list .Values.commonLabels $own.labels) | fromYaml -}}
{{- if hasKey $labels "kueue.x-k8s.io/queue-name" -}}
{{- $elastic := eq "true" (get (include "raymoe.merged" (list .Values.commonAnnotations $own.annotations) | fromYaml) "kueue.x-k8s.io/elastic-job") -}}
{{- if and .Values.autoscaling.enabled (not $elastic) -}}
{{- fail (printf "%s.labels names a queue of Kueue, which takes pods of a fixed number: set autoscaling.enabled to false, or the annotation kueue.x-k8s.io/elastic-job to \"true\" in %s.annotations where Kueue has elastic jobs." .Values.mode .Values.mode) -}}
{{- end -}}
{{- if and (eq .Values.mode "train") (not .Values.train.shutdownAfterJobFinishes) -}}
{{- fail "train.labels names a queue of Kueue, which needs train.shutdownAfterJobFinishes: set that to true." -}}
{{- end -}}
{{- $groups := include "raymoe.groups" . | fromYaml | len -}}
{{- if gt $groups 7 -}}
{{- fail (printf "%s.labels names a queue of Kueue, which takes 7 worker groups, and workerGroups has %d: join or disable some." .Values.mode $groups) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.checkService" -}}
{{- $type := .type -}}
{{- range $key := list "loadBalancerClass" "loadBalancerSourceRanges" -}}
{{- if and (get $ $key) (ne $type "LoadBalancer") -}}
{{- fail (printf "serve.service.%s is for the type LoadBalancer, and the type is %s: set serve.service.type, or remove it." $key $type) -}}
{{- end -}}
{{- end -}}
{{- range $key := list "nodePort" "externalTrafficPolicy" -}}
{{- if and (get $ $key) (eq $type "ClusterIP") -}}
{{- fail (printf "serve.service.%s is for the types NodePort and LoadBalancer, and the type is ClusterIP: set serve.service.type, or remove it." $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.checkJob" -}}
{{- $strategy := .Values.train.deletionStrategy -}}
{{- $shutdown := .Values.train.shutdownAfterJobFinishes -}}
{{- if $strategy -}}
{{- if hasKey $strategy "deletionRules" -}}
{{- if or (hasKey $strategy "onSuccess") (hasKey $strategy "onFailure") -}}
{{- fail "train.deletionStrategy has deletionRules beside onSuccess or onFailure: remove one of the two." -}}
{{- end -}}
{{- if $shutdown -}}
{{- fail "train.deletionStrategy.deletionRules says what is deleted when, and so does train.shutdownAfterJobFinishes: set that to false." -}}
{{- end -}}
{{- else if not (and $strategy.onSuccess $strategy.onFailure) -}}
{{- fail "train.deletionStrategy has one of onSuccess and onFailure: set both, or deletionRules." -}}
{{- end -}}
{{- $policies := list -}}
{{- range concat (list $strategy.onSuccess $strategy.onFailure) (default list $strategy.deletionRules) -}}
{{- with . -}}{{- $policies = append $policies .policy -}}{{- end -}}
{{- end -}}
{{- if and (has "DeleteWorkers" $policies) .Values.autoscaling.enabled -}}
{{- fail "train.deletionStrategy has the policy DeleteWorkers, which needs a cluster without autoscaler: set autoscaling.enabled to false, or another policy." -}}
{{- end -}}
{{- if and (has "DeleteNone" $policies) $shutdown -}}
{{- fail "train.deletionStrategy has the policy DeleteNone, and train.shutdownAfterJobFinishes is true: set that to false, or another policy." -}}
{{- end -}}
{{- end -}}
{{- if and (eq .Values.train.submissionMode "SidecarMode") .Values.jobSpec.submitterConfig -}}
{{- fail "jobSpec.submitterConfig is for a submitter with a pod of its own, and train.submissionMode is SidecarMode: remove it." -}}
{{- end -}}
{{- end -}}
