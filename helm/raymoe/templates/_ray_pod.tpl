{{- /* A pod of the Ray cluster. Takes `root`, `group` (its values), `name` (head, or the group's) and `head`. */ -}}
{{- define "raymoe.pod" -}}
{{- $root := .root -}}{{- $group := .group -}}
{{- $pod := dict "terminationGracePeriodSeconds" (int64 $group.terminationGracePeriodSeconds) -}}
{{- /* The autoscaler asks the Kubernetes API for pods; nothing else here needs it. */ -}}
{{- $_ := set $pod "automountServiceAccountToken" (and .head $root.Values.autoscaling.enabled) -}}
{{- /* KubeRay takes no other policy with its autoscaler, nor of a head that submits the job itself. */ -}}
{{- $once := or $root.Values.autoscaling.enabled (and .head (eq $root.Values.mode "train") (eq $root.Values.train.submissionMode "SidecarMode")) -}}
{{- $_ := set $pod "restartPolicy" (ternary "Never" "Always" $once) -}}
{{- $_ := set $pod "volumes" (include "raymoe.volumes" . | fromYamlArray) -}}
{{- with include "raymoe.spread" . | fromYamlArray -}}{{- $_ := set $pod "topologySpreadConstraints" . -}}{{- end -}}
{{- with include "raymoe.fetchers" . | fromYamlArray -}}{{- $_ := set $pod "initContainers" . -}}{{- end -}}
{{- include "raymoe.podTemplate" (dict "root" $root "values" $group "name" .name "pod" $pod "container" (include "raymoe.rayContainer" . | fromYaml)) -}}
{{- end -}}

{{- /* How pods are spread: the values' own constraints, or a worker group's `topologyKey`. */ -}}
{{- define "raymoe.spread" -}}
{{- $labels := include "raymoe.selector" .root | fromYaml -}}
{{- $_ := set $labels "app.kubernetes.io/component" .name -}}
{{- $selector := dict "matchLabels" $labels -}}
{{- $made := list -}}
{{- range .group.topologySpreadConstraints -}}
{{- $made = append $made (include "raymoe.over" (dict "base" (dict "labelSelector" $selector) "own" . "whole" (list "labelSelector")) | fromYaml) -}}
{{- end -}}
{{- if and (not $made) (not .head) .group.topologyKey -}}
{{- $made = list (dict "maxSkew" 1 "topologyKey" .group.topologyKey "whenUnsatisfiable" .group.whenUnsatisfiable "labelSelector" $selector) -}}
{{- end -}}
{{- toYaml $made -}}
{{- end -}}

{{- /* Ray's container, without what the values say of it. */ -}}
{{- define "raymoe.rayContainer" -}}
{{- $root := .root -}}
name: {{ ternary "ray-head" "ray-worker" .head }}
ports:
  {{- if .head }}
  - {name: gcs-server, containerPort: 6379}
  - {name: dashboard, containerPort: 8265}
  - {name: client, containerPort: 10001}
  - {name: dash-metrics, containerPort: 44227}
  {{- if $root.Values.autoscaling.enabled }}
  # Of the autoscaler's container, which has the same address.
  - {name: as-metrics, containerPort: 44217}
  {{- end }}
  {{- if eq $root.Values.mode "serve" }}
  # Of this pod alone: the Service sends requests only to pods with a port of this name.
  - {name: serve, containerPort: 8000}
  # raymoe's metrics, without the key that requests need.
  - {name: serve-metrics, containerPort: 8002}
  {{- with $root.Values.serve.grpcPort }}
  - {name: grpc, containerPort: {{ int . }}}
  {{- end }}
  {{- end }}
  {{- end }}
  - {name: metrics, containerPort: 8080}
  - {name: agent, containerPort: 52365}
env:
  - {name: HOME, value: /home/ray}
  # Compiled functions are kept where the file system can be written to.
  - {name: NUMBA_CACHE_DIR, value: /tmp/numba}
  - {name: RAY_USAGE_STATS_ENABLED, value: "0"}
  {{- if $root.Values.tls.enabled }}
  - {name: RAYMOE_TLS_DIR, value: /etc/raymoe-tls}
  {{- end }}
volumeMounts:
  {{- include "raymoe.mounts" (dict "root" $root "head" .head "group" dict) | nindent 2 }}
# What Ray's agent says of the raylet, and on the head of the control plane as well.
startupProbe:
  httpGet: {path: /api/healthz, port: agent}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 60
readinessProbe:
  httpGet: {path: /api/healthz, port: agent}
  periodSeconds: 5
  timeoutSeconds: 5
  failureThreshold: 3
livenessProbe:
  httpGet: {path: /api/healthz, port: agent}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 12
{{- if and (not .head) (gt (int .group.drainSeconds) 0) }}
lifecycle:
  preStop:
    exec:
      # Experts and replicas of the trunk go elsewhere first; what comes of it is in the pod's log.
      command:
        - /bin/sh
        - -c
        - raymoe drain --node here --timeout {{ int .group.drainSeconds }} --json >/proc/1/fd/1 2>&1 || true
{{- end }}
{{- end -}}

{{- define "raymoe.volumes" -}}
{{- $root := .root -}}
- name: shared-memory
  emptyDir: {medium: Memory, sizeLimit: {{ .group.sharedMemory | quote }}}
- name: scratch
  emptyDir: {sizeLimit: {{ .group.scratch | quote }}}
- name: home
  emptyDir: {sizeLimit: 100Mi}
{{- if $root.Values.checkpoints.enabled }}
- name: checkpoints
  {{- if $root.Values.checkpoints.volume }}
  {{- toYaml $root.Values.checkpoints.volume | nindent 2 }}
  {{- else }}
  persistentVolumeClaim: {claimName: {{ include "raymoe.claim" $root | quote }}}
  {{- end }}
{{- end }}
{{- if $root.Values.tls.enabled }}
- name: tls
  secret: {secretName: {{ include "raymoe.tlsSecret" $root | quote }}, defaultMode: 288}  # 0440
{{- end }}
{{- if and .head (eq $root.Values.mode "train") }}
- name: job
  configMap: {name: {{ printf "%s-job" (include "raymoe.fullname" $root) | quote }}}
{{- end }}
{{- include "raymoe.weightsVolumes" . }}
{{- end -}}

{{- /* Where the chart mounts these volumes, and what the values add. */ -}}
{{- define "raymoe.mounts" -}}
- {name: shared-memory, mountPath: /dev/shm}
- {name: scratch, mountPath: /tmp}
- {name: home, mountPath: /home/ray}
{{- if .root.Values.checkpoints.enabled }}
- {name: checkpoints, mountPath: {{ .root.Values.checkpoints.mountPath | quote }}}
{{- end }}
{{- if .root.Values.tls.enabled }}
- {name: tls, mountPath: /etc/raymoe-tls, readOnly: true}
{{- end }}
{{- if and .head (eq .root.Values.mode "train") }}
- {name: job, mountPath: /etc/raymoe, readOnly: true}
{{- end }}
{{- include "raymoe.weightsMounts" . }}
{{- with .group.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}
