{{- define "headrace.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 47 | trimSuffix "-" -}}
{{- end -}}

{{/* At most 47 characters: KubeRay rejects longer RayService names, since it appends to them for its own objects. */}}
{{- define "headrace.fullname" -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- $full := printf "%s-%s" .Release.Name $name -}}
{{- if .Values.fullnameOverride -}}
{{- $full = .Values.fullnameOverride -}}
{{- else if contains $name .Release.Name -}}
{{- $full = .Release.Name -}}
{{- end -}}
{{- $full = $full | trunc 47 | trimSuffix "-" -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" $full) -}}
{{- fail (printf "%q cannot name a RayService: it must start with a lower-case letter and hold only lower-case letters, digits and '-'; set fullnameOverride" $full) -}}
{{- end -}}
{{- $full -}}
{{- end -}}

{{- define "headrace.selectorLabels" -}}
app.kubernetes.io/name: {{ include "headrace.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end -}}

{{- define "headrace.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{ include "headrace.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{/* No chart version, as a changed pod label makes KubeRay start a new cluster; and no app.kubernetes.io/name, which
     KubeRay sets itself and selects by. */}}
{{- define "headrace.podLabels" -}}
app.kubernetes.io/instance: {{ .root.Release.Name | quote }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Empty when no key is configured. */}}
{{- define "headrace.secretName" -}}
{{- $auth := .Values.auth -}}
{{- if $auth.existingSecret -}}
{{- if or $auth.hfToken $auth.apiKey -}}
{{- fail "auth.existingSecret excludes auth.hfToken and auth.apiKey: put the keys in that Secret" -}}
{{- end -}}
{{- $auth.existingSecret -}}
{{- else if or $auth.hfToken $auth.apiKey -}}
{{- include "headrace.fullname" . }}-auth
{{- end -}}
{{- end -}}

{{/* Environment of the Ray container; keys only by reference. */}}
{{- define "headrace.env" -}}
{{- $auth := .root.Values.auth -}}
{{- $keys := dict "hfToken" (ternary "hf-token" "" (not (empty $auth.hfToken))) "apiKey" (ternary "api-key" "" (not (empty $auth.apiKey))) -}}
{{- if $auth.existingSecret -}}
{{- $keys = $auth.existingSecretKeys -}}
{{- end -}}
{{- $secret := include "headrace.secretName" .root -}}
{{- $env := list -}}
{{- if and $secret $keys.hfToken -}}
{{- $env = append $env (dict "name" "HF_TOKEN" "valueFrom" (dict "secretKeyRef" (dict "name" $secret "key" $keys.hfToken))) -}}
{{- end -}}
{{- if and $secret $keys.apiKey -}}
{{- $env = append $env (dict "name" "HEADRACE_API_KEY" "valueFrom" (dict "secretKeyRef" (dict "name" $secret "key" $keys.apiKey))) -}}
{{- end -}}
{{- if eq .component "worker" -}}
{{- $env = append $env (dict "name" "HF_HOME" "value" .root.Values.modelCache.mountPath) -}}
{{- end -}}
{{- range $index, $tenant := .root.Values.tenants -}}
{{- $env = append $env (dict "name" (printf "HEADRACE_TENANT_KEY_%d" $index) "valueFrom" (dict "secretKeyRef" (dict "name" $tenant.secretName "key" $tenant.secretKey))) -}}
{{- end -}}
{{- $env = concat $env .root.Values.env -}}
{{- if $env -}}
{{- toYaml $env -}}
{{- end -}}
{{- end -}}

{{/* What head and workers have in common in their pod specs; empty when nothing is set. */}}
{{- define "headrace.podSpec" -}}
{{- $spec := dict -}}
{{- range $field, $value := dict
  "serviceAccountName" .root.Values.serviceAccountName
  "imagePullSecrets" .root.Values.imagePullSecrets
  "securityContext" .root.Values.podSecurityContext
  "nodeSelector" .nodeSelector
  "tolerations" .group.tolerations
  "affinity" .group.affinity -}}
{{- if $value -}}
{{- $_ := set $spec $field $value -}}
{{- end -}}
{{- end -}}
{{- if $spec -}}
{{- toYaml $spec -}}
{{- end -}}
{{- end -}}

{{- define "headrace.image" -}}
{{- printf "%s:%s" .Values.image.repository (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}

{{/* Ray Serve's config. Built as data and written by toYaml, so no value can break the YAML or be printed as 1e+06. */}}
{{- define "headrace.serveConfig" -}}
{{- $values := .Values -}}
{{- /* All interfaces: requests arrive from other pods. */ -}}
{{- $http := dict "host" "0.0.0.0" "port" $values.service.port -}}
{{- $targets := dict -}}
{{- range $name, $seconds := dict "ttft_s" $values.targets.ttftSeconds "tpot_s" $values.targets.tpotSeconds "latency_s" $values.targets.latencySeconds -}}
{{- if not (kindIs "invalid" $seconds) -}}
{{- $_ := set $targets $name $seconds -}}
{{- end -}}
{{- end -}}
{{- $tenants := list -}}
{{- range $index, $tenant := $values.tenants -}}
{{- $tenants = append $tenants (dict "name" $tenant.name "weight" (default 1 $tenant.weight) "api_key_env" (printf "HEADRACE_TENANT_KEY_%d" $index)) -}}
{{- end -}}
{{- $headrace := dict
  "targets" $targets
  "tenants" $tenants
  "thresholds" (dict "policy" $values.policy.name "max_hold_s" $values.policy.maxHoldSeconds)
  "controller" (dict
    "enabled" $values.controller.enabled
    "period_s" $values.controller.periodSeconds
    "profile" $values.controller.profile) -}}
{{- $args := dict "llm_configs" $values.models "headrace" $headrace -}}
{{- $application := dict "name" "headrace" "import_path" "headrace:build" "route_prefix" "/" "args" $args -}}
{{- toYaml (dict "applications" (list $application) "http_options" $http) -}}
{{- end -}}

{{/* Worker pods: enough for the GPUs of all replicas. */}}
{{- define "headrace.workers" -}}
{{- $gpus := 0 -}}
{{- range $model := .Values.models -}}
{{- $deployment := default dict $model.deployment_config -}}
{{- $engine := default dict $model.engine_kwargs -}}
{{- $replicas := default (dig "autoscaling_config" "max_replicas" 1 $deployment) $deployment.num_replicas -}}
{{- $each := mul (default 1 $engine.tensor_parallel_size) (default 1 $engine.pipeline_parallel_size) (default 1 $engine.data_parallel_size) -}}
{{- $gpus = add $gpus (mul (int $replicas) $each) -}}
{{- end -}}
{{- $perWorker := int .Values.gpu.perWorker -}}
{{- default (div (add $gpus (sub $perWorker 1)) $perWorker) .Values.gpu.workers -}}
{{- end -}}
