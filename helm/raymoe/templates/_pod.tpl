{{- /* A pod of the Ray cluster. Takes `root`, `group` (its values), `name` (head, or the group's) and `head`. */ -}}
{{- define "raymoe.pod" -}}
{{- $root := .root -}}{{- $group := .group -}}{{- $serves := and .head (eq $root.Values.mode "serve") -}}
metadata:
  labels:
    {{- include "raymoe.selector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .name }}
    {{- with $group.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- with $group.podAnnotations }}
  annotations: {{- toYaml . | nindent 4 }}
  {{- end }}
spec:
  {{- with include "raymoe.serviceAccount" $root }}
  serviceAccountName: {{ . }}
  {{- end }}
  # The autoscaler asks the Kubernetes API for pods; nothing else here needs it.
  automountServiceAccountToken: {{ and .head $root.Values.autoscaling.enabled }}
  enableServiceLinks: false
  restartPolicy: {{ ternary "Never" "Always" $root.Values.autoscaling.enabled }}
  terminationGracePeriodSeconds: {{ int $group.terminationGracePeriodSeconds }}
  securityContext: {{- toYaml $root.Values.security.pod | nindent 4 }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets: {{- range . }}
    - name: {{ . }}
  {{- end }}
  {{- end }}
  {{- with $group.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
  {{- with $group.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $group.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $group.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- if and (not .head) $group.topologyKey }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: {{ $group.topologyKey }}
      whenUnsatisfiable: {{ $group.whenUnsatisfiable }}
      labelSelector:
        matchLabels:
          {{- include "raymoe.selector" $root | nindent 10 }}
          app.kubernetes.io/component: {{ .name }}
  {{- end }}
  containers:
    - name: {{ ternary "ray-head" "ray-worker" .head }}
      image: {{ default (include "raymoe.image" $root) $group.image }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext: {{- toYaml $root.Values.security.container | nindent 8 }}
      resources: {{- toYaml $group.resources | nindent 8 }}
      ports:
        {{- if .head }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        {{- end }}
        {{- if $serves }}
        # Of this pod alone: the Service sends requests only to pods with a port of this name.
        - {name: serve, containerPort: 8000}
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
        {{- range $key, $value := $group.env }}
        - {name: {{ $key }}, value: {{ $value | quote }}}
        {{- end }}
        {{- with $group.extraEnv }}{{ toYaml . | nindent 8 }}{{ end }}
      volumeMounts:
        {{- include "raymoe.mounts" . | nindent 8 }}
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
      {{- if and (not .head) (gt (int $group.drainSeconds) 0) }}
      lifecycle:
        preStop:
          exec:
            # Experts and replicas of the trunk go elsewhere first; what comes of it is in the pod's log.
            command:
              - /bin/sh
              - -c
              - raymoe drain --node here --timeout {{ int $group.drainSeconds }} --json >/proc/1/fd/1 2>&1 || true
      {{- end }}
  volumes:
    - name: shared-memory
      emptyDir: {medium: Memory, sizeLimit: {{ $group.sharedMemory }}}
    - name: scratch
      emptyDir: {sizeLimit: {{ $group.scratch }}}
    - name: home
      emptyDir: {sizeLimit: 100Mi}
    {{- if $root.Values.checkpoints.enabled }}
    - name: checkpoints
      {{- if $root.Values.checkpoints.volume }}
      {{- toYaml $root.Values.checkpoints.volume | nindent 6 }}
      {{- else }}
      persistentVolumeClaim: {claimName: {{ include "raymoe.claim" $root }}}
      {{- end }}
    {{- end }}
    {{- if $root.Values.tls.enabled }}
    - name: tls
      secret: {secretName: {{ include "raymoe.tlsSecret" $root }}, defaultMode: 0440}
    {{- end }}
    {{- if and .head (eq $root.Values.mode "train") }}
    - name: job
      configMap: {name: {{ include "raymoe.fullname" $root }}-job}
    {{- end }}
    {{- with $group.extraVolumes }}{{ toYaml . | nindent 4 }}{{ end }}
{{- end -}}

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
{{- with .group.extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}
