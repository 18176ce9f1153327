{{- /* What cannot work is refused here, in a sentence, and not by an operator in its log an hour later. */ -}}
{{- define "raymoe.check" -}}
{{- include "raymoe.checkName" . -}}
{{- include "raymoe.checkVersion" . -}}
{{- include "raymoe.checkClusterSpec" . -}}
{{- include "raymoe.checkPods" . -}}
{{- include "raymoe.checkMode" . -}}
{{- include "raymoe.checkHosts" . -}}
{{- include "raymoe.checkGpus" . -}}
{{- include "raymoe.checkTls" . -}}
{{- include "raymoe.checkObjects" . -}}
{{- include "raymoe.checkFields" . -}}
{{- end -}}

{{- define "raymoe.checkName" -}}
{{- $name := include "raymoe.fullname" . -}}
{{- $most := ternary 53 47 (eq .Values.mode "cluster") -}}
{{- if gt (len $name) $most -}}
{{- fail (printf "The name %q has %d characters and a %s may have %d, since KubeRay adds to it: set fullnameOverride." $name (len $name) (include "raymoe.kind" .) $most) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $name) -}}
{{- fail (printf "The name %q has to begin with a letter and hold only lower-case letters, digits and '-' (DNS-1035): set fullnameOverride." $name) -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.checkVersion" -}}
{{- if semverCompare "<2.52.0-0" .Values.rayVersion -}}
{{- if .Values.auth.enabled -}}
{{- fail (printf "rayVersion is %s and auth.enabled needs Ray 2.52 or later: set rayVersion to that of the image, or auth.enabled to false." .Values.rayVersion) -}}
{{- end -}}
{{- end -}}
{{- if semverCompare "<2.53.0-0" .Values.rayVersion -}}
{{- fail (printf "rayVersion is %s and the pods' probes ask for /api/healthz, which Ray 2.53 and later has: use an image with a later Ray." .Values.rayVersion) -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.checkTls" -}}
{{- with .Values.tls -}}
{{- if and .existingSecret (not .enabled) -}}
{{- fail "tls.existingSecret is set and tls.enabled is not: switch TLS on, or remove the secret's name." -}}
{{- end -}}
{{- if and .certManager.enabled (not .enabled) -}}
{{- fail "tls.certManager.enabled is set and tls.enabled is not: switch TLS on, or cert-manager off." -}}
{{- end -}}
{{- if and .certManager.enabled .existingSecret -}}
{{- fail "tls.existingSecret and tls.certManager are both set: remove one of them." -}}
{{- end -}}
{{- if and .certManager.issuerRef (not .certManager.enabled) -}}
{{- fail "tls.certManager.issuerRef is set and tls.certManager.enabled is not: switch it on, or remove the issuer." -}}
{{- end -}}
{{- if .certManager.enabled -}}
{{- include "raymoe.checkCertManager" .certManager -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* The least that cert-manager takes: an hour, and five minutes. Without one of the two it has a default. */ -}}
{{- define "raymoe.checkCertManager" -}}
{{- if and .issuerRef (not .issuerRef.name) -}}
{{- fail "tls.certManager.issuerRef.name is missing: name the issuer, or remove issuerRef for one of the chart's." -}}
{{- end -}}
{{- $whole := include "raymoe.seconds" (default "2160h" .duration) | int64 -}}
{{- if lt $whole 3600 -}}
{{- fail (printf "tls.certManager.duration is %q and has to be a duration of an hour or more, as Go writes them: set one such as 2160h." .duration) -}}
{{- end -}}
{{- with .renewBefore -}}
{{- $before := include "raymoe.seconds" . | int64 -}}
{{- if lt $before 300 -}}
{{- fail (printf "tls.certManager.renewBefore is %q and has to be a duration of five minutes or more, as Go writes them: set one such as 720h." .) -}}
{{- end -}}
{{- if ge $before $whole -}}
{{- fail (printf "tls.certManager.renewBefore (%s) is not less than duration (%s), so that a certificate would be renewed without end: lower the one or raise the other." . (default "2160h" $.duration)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "raymoe.checkObjects" -}}
{{- with .Values.checkpoints -}}
{{- if and .existingClaim .volume -}}
{{- fail "checkpoints.existingClaim and checkpoints.volume are both set: remove one of them." -}}
{{- end -}}
{{- range $key := list "existingClaim" "volume" -}}
{{- if and (get $.Values.checkpoints $key) (not $.Values.checkpoints.enabled) -}}
{{- fail (printf "checkpoints.%s is set and checkpoints.enabled is not: switch checkpoints on, or remove it." $key) -}}
{{- end -}}
{{- end -}}
{{- $taken := list "/" -}}
{{- range include "raymoe.mounts" (dict "root" $ "head" true "group" dict) | fromYamlArray -}}
{{- if ne .name "checkpoints" -}}{{- $taken = append $taken .mountPath -}}{{- end -}}
{{- end -}}
{{- if and .enabled (has (clean .mountPath) $taken) -}}
{{- fail (printf "checkpoints.mountPath is %s, where the pods have something else: set another path, such as /checkpoints." .mountPath) -}}
{{- end -}}
{{- end -}}
{{- if and .Values.auth.existingSecret (not .Values.auth.enabled) -}}
{{- fail "auth.existingSecret is set and auth.enabled is not: switch the token on, or remove the secret's name." -}}
{{- end -}}
{{- if and (eq .Values.mode "train") (not .Values.checkpoints.enabled) (not .Values.train.output) (not .Values.train.entrypoint) -}}
{{- fail "checkpoints.enabled is false, so that nothing would be left of the run: set train.output to a directory in a volume of yours." -}}
{{- end -}}
{{- if and .Values.serviceAccount.name (not .Values.serviceAccount.create) .Values.serviceAccount.annotations -}}
{{- fail "serviceAccount.annotations are for the one that the chart makes: set serviceAccount.create to true." -}}
{{- end -}}
{{- end -}}
