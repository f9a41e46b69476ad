{{/* Head and worker pods. Arguments: root, component (head or worker), group (values of that group). */}}

{{/* Environment of the Ray container; keys only by reference. Variables of extraEnv go before the chart's. */}}
{{- define "headrace.env" -}}
{{- $keys := fromYaml (include "headrace.keys" .root) -}}
{{- $home := "/home/headrace" -}}
{{- $env := list
  (dict "name" "HOME" "value" $home)
  (dict "name" "TRITON_CACHE_DIR" "value" (printf "%s/.cache/triton" $home))
  (dict "name" "CUDA_CACHE_PATH" "value" (printf "%s/.cache/nv" $home))
  (dict "name" "RAY_USAGE_STATS_ENABLED" "value" "0")
  (dict "name" "VLLM_NO_USAGE_STATS" "value" "1")
  (dict "name" "RAYLLM_ENABLE_WORKER_PROCESS_SETUP_HOOK" "value" "0") -}}
{{- /* Else Ray goes by whether a token lies in the image. With authentication KubeRay sets it. */ -}}
{{- if not (include "headrace.raySecret" .root) }}{{ $env = append $env (dict "name" "RAY_AUTH_MODE" "value" "disabled") }}{{ end -}}
{{- /* The image says which HAProxy. */ -}}
{{- if .root.Values.ray.haproxy }}{{ $env = append $env (dict "name" "RAY_SERVE_ENABLE_HA_PROXY" "value" "1") }}{{ end -}}
{{- if eq .component "worker" }}{{ $env = append $env (dict "name" "HF_HOME" "value" .root.Values.modelCache.mountPath) }}{{ end -}}
{{- with $keys.hfToken }}{{ $env = append $env (dict "name" "HF_TOKEN" "valueFrom" (dict "secretKeyRef" .)) }}{{ end -}}
{{- with $keys.apiKey }}{{ $env = append $env (dict "name" "HEADRACE_API_KEY" "valueFrom" (dict "secretKeyRef" .)) }}{{ end -}}
{{- range $index, $tenant := .root.Values.tenants -}}
{{- $place := dict "name" (default (include "headrace.ownSecret" $.root) $tenant.secretName) "key" (default (include "headrace.tenantEntry" $tenant) $tenant.secretKey) -}}
{{- $env = append $env (dict "name" (printf "HEADRACE_TENANT_KEY_%d" $index) "valueFrom" (dict "secretKeyRef" $place)) -}}
{{- end -}}
{{- $further := concat .root.Values.env .root.Values.extraEnv -}}
{{- $theirs := list -}}
{{- range $further }}{{ $theirs = append $theirs .name }}{{ end -}}
{{- $all := list -}}
{{- range $env }}{{ if not (has .name $theirs) }}{{ $all = append $all . }}{{ end }}{{ end -}}
{{- toYaml (concat $all $further) -}}
{{- end -}}

{{- define "headrace.volumes" -}}
{{- $v := .root.Values -}}
{{- $scratch := dict "emptyDir" (dict "sizeLimit" $v.scratch.sizeLimit) -}}
{{- $volumes := list (merge (dict "name" "tmp") $scratch) (merge (dict "name" "cache") $scratch) -}}
{{- if eq .component "worker" -}}
{{- $cache := dict "name" "model-cache" "emptyDir" (dict "sizeLimit" $v.modelCache.sizeLimit) -}}
{{- with include "headrace.claim" .root -}}
{{- $cache = dict "name" "model-cache" "persistentVolumeClaim" (dict "claimName" .) -}}
{{- end -}}
{{- $volumes = append $volumes (dict "name" "shm" "emptyDir" (dict "medium" "Memory" "sizeLimit" $v.shm.sizeLimit)) -}}
{{- $volumes = append $volumes $cache -}}
{{- else if eq $v.autoscaling.mode "keda" -}}
{{- $volumes = append $volumes (dict "name" "scaler" "configMap" (dict "name" (printf "%s-scaler" (include "headrace.fullname" .root)))) -}}
{{- end -}}
{{- toYaml (concat $volumes $v.extraVolumes) -}}
{{- end -}}

{{- define "headrace.claim" -}}
{{- if .Values.modelCache.existingClaim -}}
{{- .Values.modelCache.existingClaim -}}
{{- else if .Values.modelCache.claim.create -}}
{{- include "headrace.fullname" . }}-models
{{- end -}}
{{- end -}}

{{- define "headrace.volumeMounts" -}}
{{- $mounts := list (dict "name" "tmp" "mountPath" "/tmp") (dict "name" "cache" "mountPath" "/home/headrace/.cache") -}}
{{- if eq .component "worker" -}}
{{- $mounts = append $mounts (dict "name" "shm" "mountPath" "/dev/shm") -}}
{{- $mounts = append $mounts (dict "name" "model-cache" "mountPath" .root.Values.modelCache.mountPath) -}}
{{- end -}}
{{- toYaml (concat $mounts .root.Values.extraVolumeMounts) -}}
{{- end -}}

{{/* The fields of a pod spec that head and workers have in common. */}}
{{- define "headrace.podSpec" -}}
{{- $v := .root.Values -}}
{{- $head := eq .component "head" -}}
{{- $nodes := .group.nodeSelector -}}
{{- if and (not $head) $v.gpu.product }}{{ $nodes = merge (dict "nvidia.com/gpu.product" $v.gpu.product) $nodes }}{{ end -}}
{{- /* Only the autoscaler beside Ray's head speaks to the Kubernetes API. */ -}}
{{- $spec := dict "automountServiceAccountToken" (and $head (eq (include "headrace.autoscaled" .root) "true")) -}}
{{- range $field, $value := dict
  "serviceAccountName" (ternary (include "headrace.headAccount" .root) (include "headrace.account" .root) $head)
  "imagePullSecrets" $v.imagePullSecrets
  "securityContext" $v.podSecurityContext
  "nodeSelector" $nodes
  "tolerations" .group.tolerations
  "affinity" .group.affinity
  "topologySpreadConstraints" .group.topologySpreadConstraints
  "priorityClassName" .group.priorityClassName -}}
{{- if $value }}{{ $_ := set $spec $field $value }}{{ end -}}
{{- end -}}
{{- toYaml $spec -}}
{{- end -}}

{{/* What Ray containers of both kinds have in common. */}}
{{- define "headrace.container" -}}
image: {{ include "headrace.image" .root | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  {{- toYaml .root.Values.containerSecurityContext | nindent 2 }}
env:
  {{- include "headrace.env" . | nindent 2 }}
{{- with .root.Values.extraEnvFrom }}
envFrom:
  {{- toYaml . | nindent 2 }}
{{- end }}
volumeMounts:
  {{- include "headrace.volumeMounts" . | nindent 2 }}
{{- $ask := "wget -T 2 -q -O- http://localhost:%d/%s | grep -q success" }}
{{- $alive := printf $ask 52365 "api/local_raylet_healthz" }}
{{- if eq .component "head" }}
{{- $alive = printf "%s && %s" $alive (printf $ask 8265 "api/gcs_healthz") }}
{{- end }}
{{- $ready := $alive }}
{{- if eq .component "worker" }}
{{- $ready = printf "%s && %s" $alive (printf $ask (int .root.Values.service.port) "-/healthz") }}
{{- end }}
# As KubeRay's own, with the times of the values.
livenessProbe:
  exec:
    command: [bash, -c, {{ $alive | quote }}]
  {{- toYaml .root.Values.probes.liveness | nindent 2 }}
readinessProbe:
  exec:
    command: [bash, -c, {{ $ready | quote }}]
  {{- toYaml .root.Values.probes.readiness | nindent 2 }}
{{- end -}}

{{/* metadata of a pod template. */}}
{{- define "headrace.podMetadata" -}}
labels:
  {{- include "headrace.podLabels" . | nindent 2 }}
{{- with .root.Values.podAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}
