{{- /* What is served, and how it gets into the pods: `serve.checkpoint` is a path in them, or an address. */ -}}

{{- /* The parts of `serve.checkpoint`, as YAML: `scheme` (hf, s3, pvc, or none for a path), `path`, where the pods have
it, and of an address `repository` and `revision`, `source`, or `claim`. Of another mode, nothing. */ -}}
{{- define "raymoe.weights" -}}
{{- $given := .Values.serve.checkpoint -}}
{{- $mount := .Values.checkpoints.mountPath -}}
{{- $made := dict "scheme" "" "path" $given -}}
{{- if ne .Values.mode "serve" -}}
{{- $made = dict "scheme" "" -}}
{{- else if hasPrefix "hf://" $given -}}
{{- $parts := splitn "@" 2 (trimPrefix "hf://" $given) -}}
{{- $revision := default "main" $parts._1 -}}
{{- $path := printf "%s/hf/%s/%s" $mount (replace "/" "+" $revision) $parts._0 -}}
{{- $made = dict "scheme" "hf" "path" $path "repository" $parts._0 "revision" $revision -}}
{{- else if hasPrefix "s3://" $given -}}
{{- $source := trimSuffix "/" $given -}}
{{- $made = dict "scheme" "s3" "path" (printf "%s/s3/%s" $mount (trimPrefix "s3://" $source)) "source" $source -}}
{{- else if hasPrefix "pvc://" $given -}}
{{- $parts := splitn "/" 2 (trimSuffix "/" (trimPrefix "pvc://" $given)) -}}
{{- $made = dict "scheme" "pvc" "path" (printf "/model/%s" (default "" $parts._1) | trimSuffix "/") "claim" $parts._0 -}}
{{- end -}}
{{- toYaml $made -}}
{{- end -}}

{{- /* Whether pods fetch weights, each into a volume of its own: the volume for checkpoints is that of all pods. */ -}}
{{- define "raymoe.fetchesAlone" -}}
{{- $weights := include "raymoe.weights" . | fromYaml -}}
{{- if and (has $weights.scheme (list "hf" "s3")) (not .Values.checkpoints.enabled) -}}true{{- end -}}
{{- end -}}

{{- define "raymoe.weightsVolumes" -}}
{{- $weights := include "raymoe.weights" .root | fromYaml -}}
{{- if eq $weights.scheme "pvc" }}
- name: model
  persistentVolumeClaim: {claimName: {{ $weights.claim | quote }}, readOnly: true}
{{- end }}
{{- if include "raymoe.fetchesAlone" .root }}
- name: weights
  emptyDir: {sizeLimit: {{ .root.Values.serve.fetch.size | quote }}}
{{- end }}
{{- if and .head (include "raymoe.keysSecret" .root) }}
- name: api-keys
  secret: {secretName: {{ include "raymoe.keysSecret" .root | quote }}, defaultMode: 288}  # 0440
{{- end }}
{{- end -}}

{{- define "raymoe.weightsMounts" -}}
{{- $weights := include "raymoe.weights" .root | fromYaml -}}
{{- if eq $weights.scheme "pvc" }}
- {name: model, mountPath: /model, readOnly: true}
{{- end }}
{{- if include "raymoe.fetchesAlone" .root }}
- {name: weights, mountPath: {{ .root.Values.checkpoints.mountPath | quote }}}
{{- end }}
{{- if and .head (include "raymoe.keysSecret" .root) }}
- {name: api-keys, mountPath: /etc/raymoe-keys, readOnly: true}
{{- end }}
{{- end -}}

{{- /* Containers that fetch weights before Ray starts. Into the volume of all pods the head fetches: every other pod waits
for it, since Ray's nodes join the head's. */ -}}
{{- define "raymoe.fetchers" -}}
{{- $weights := include "raymoe.weights" .root | fromYaml -}}
{{- $made := list -}}
{{- if and (has $weights.scheme (list "hf" "s3")) (or .head (not .root.Values.checkpoints.enabled)) -}}
{{- $made = list (include "raymoe.fetcher" (dict "root" .root "weights" $weights) | fromYaml) -}}
{{- end -}}
{{- toYaml $made -}}
{{- end -}}

{{- define "raymoe.fetcher" -}}
{{- $weights := .weights -}}{{- $fetch := .root.Values.serve.fetch -}}
{{- $shared := ternary "checkpoints" "weights" .root.Values.checkpoints.enabled -}}
{{- $values := include "raymoe.besideValues" (dict "root" .root "own" $fetch) | fromYaml -}}
{{- $command := $fetch.command -}}
{{- if and (not $command) (eq $weights.scheme "hf") -}}
{{- $command = list "hf" "download" "$(REPOSITORY)" "--revision" "$(REVISION)" "--local-dir" "$(PARTIAL)" -}}
{{- else if not $command -}}
{{- $command = list "aws" "s3" "sync" "--no-progress" "$(SOURCE)" "$(PARTIAL)" -}}
{{- end -}}
{{- /* The release's name is in that of what is not whole yet: another release on the same volume fetches its own. */ -}}
{{- $partial := printf "%s/.%s.%s.partial" (dir $weights.path) (base $weights.path) (include "raymoe.fullname" .root) -}}
{{- $env := list (dict "name" "TARGET" "value" $weights.path) (dict "name" "PARTIAL" "value" $partial) -}}
{{- $env = append $env (dict "name" "SOURCE" "value" (default .root.Values.serve.checkpoint $weights.source)) -}}
{{- if eq $weights.scheme "hf" -}}
{{- $env = append $env (dict "name" "REPOSITORY" "value" $weights.repository) -}}
{{- $env = append $env (dict "name" "REVISION" "value" $weights.revision) -}}
{{- $env = append $env (dict "name" "HF_HOME" "value" "/tmp/huggingface") -}}
{{- $env = append $env (dict "name" "HF_HUB_DISABLE_TELEMETRY" "value" "1") -}}
{{- /* A cache of the parts of files would be another copy, in /tmp. */ -}}
{{- $env = append $env (dict "name" "HF_XET_CHUNK_CACHE_SIZE_BYTES" "value" "0") -}}
{{- end -}}
{{- $env = append $env (dict "name" "HOME" "value" "/home/ray") -}}
{{- $mounts := list (dict "name" $shared "mountPath" .root.Values.checkpoints.mountPath) (dict "name" "scratch" "mountPath" "/tmp") (dict "name" "home" "mountPath" "/home/ray") -}}
{{- $container := dict "name" "fetch-weights" "env" $env "volumeMounts" $mounts -}}
{{- $_ := set $container "command" (concat (list "/bin/sh" "-c" (include "raymoe.fetchScript" .) "fetch") $command) -}}
{{- include "raymoe.container" (dict "root" .root "values" $values "container" $container) -}}
{{- end -}}

{{- /* Runs its arguments until they succeed, and gives what they have written its name as the last step. Files of an attempt
before stay, for commands that go on with them. */ -}}
{{- define "raymoe.fetchScript" -}}
set -eu
if [ -d "$TARGET" ]; then
  echo "$TARGET is there"
  exit 0
fi
mkdir -p "$PARTIAL"
# Two pods of a release on one volume; where the volume has no locks, the last step still leaves one whole copy.
if command -v flock >/dev/null 2>&1; then
  exec 9>"$PARTIAL.lock"
  flock 9 || true
  [ ! -d "$TARGET" ] || exit 0
fi
for left in {{ range untilStep (int (sub .root.Values.serve.fetch.tries 1)) -1 -1 }}{{ . }} {{ end }}; do
  if "$@"; then
    break
  elif [ "$left" = 0 ]; then
    echo "$SOURCE could not be fetched: see above; serve.fetch has the command, its variables and its image" >&2
    exit 1
  fi
  echo "fetching $SOURCE again in ${PAUSE:-10} s" >&2
  sleep "${PAUSE:-10}"
done
# Not by the output of a command: Kubernetes reads a dollar sign and a parenthesis as a variable of its own.
if ! find "$PARTIAL" -type f | grep -q .; then
  echo "$SOURCE holds no files" >&2
  exit 1
fi
rm -rf "$PARTIAL/.cache"
if ! mv -T "$PARTIAL" "$TARGET"; then
  [ -d "$TARGET" ]  # another pod was first
  rm -rf "$PARTIAL"
fi
rm -f "$PARTIAL.lock"
echo "$SOURCE is at $TARGET"
{{- end -}}

{{- /* Name of the secret with API keys, in `mode: serve`. */ -}}
{{- define "raymoe.keysSecret" -}}
{{- if eq .Values.mode "serve" -}}{{ .Values.serve.apiKeys.existingSecret }}{{- end -}}
{{- end -}}

{{- /* Arguments of the application that serves: the sections of `serve.config`, and what the chart adds. */ -}}
{{- define "raymoe.serveArguments" -}}
{{- $made := deepCopy (default dict .Values.serve.config) -}}
{{- $_ := set $made "checkpoint" (include "raymoe.weights" . | fromYaml).path -}}
{{- $_ := set $made "cluster" (include "raymoe.cluster" . | fromYaml) -}}
{{- $_ := set $made "listen" (dict "host" .Values.listenHost "port" 8000 "metrics_port" 8002) -}}
{{- with .Values.serve.grpcPort -}}{{- $_ := set $made.listen "grpc_port" (int .) -}}{{- end -}}
{{- if include "raymoe.keysSecret" . -}}
{{- $_ := set $made "serving" (include "raymoe.over" (dict "base" (dict "api_keys_file" "/etc/raymoe-keys") "own" $made.serving) | fromYaml) -}}
{{- end -}}
{{- toYaml $made -}}
{{- end -}}
