{{/* serveConfigV2: the configuration, as `headrace render` writes it. */}}

{{/* Settings of all models, in the configuration's own form. */}}
{{- define "headrace.settings" -}}
{{- $values := .Values -}}
{{- $targets := dict -}}
{{- range $name, $seconds := dict "ttft_s" $values.targets.ttftSeconds "tpot_s" $values.targets.tpotSeconds "latency_s" $values.targets.latencySeconds -}}
{{- if not (kindIs "invalid" $seconds) -}}
{{- $_ := set $targets $name $seconds -}}
{{- end -}}
{{- end -}}
{{- $further := $values.headrace -}}
{{- /* Helm drops a key whose value is null; where that does not mean the application's default, it is written out. */ -}}
{{- $limits := dict "concurrent_requests" $further.limits.concurrent_requests -}}
{{- range $name, $limit := $further.limits -}}
{{- if not (kindIs "invalid" $limit) -}}
{{- $_ := set $limits $name $limit -}}
{{- end -}}
{{- end -}}
{{- toYaml (dict
  "targets" $targets
  "thresholds" (dict "policy" $values.policy.name "max_hold_s" $values.policy.maxHoldSeconds)
  "controller" (dict
    "enabled" $values.controller.enabled
    "period_s" $values.controller.periodSeconds
    "profile" $values.controller.profile)
  "autoscaling" $further.autoscaling
  "limits" $limits
  "drain_s" $further.drain_s
  "engine_timeout_s" $further.engine_timeout_s
  "max_wait_s" $further.max_wait_s) -}}
{{- end -}}

{{/* Settings of one model: those of all models, overridden by its own, as `overridden` in cluster/settings.py does:
     fields of objects one by one, thresholds that name a policy as a whole. */}}
{{- define "headrace.modelSettings" -}}
{{- $merged := fromYaml (include "headrace.settings" .root) -}}
{{- range $key, $own := default dict .model.headrace -}}
{{- $general := get $merged $key -}}
{{- $whole := and (eq $key "thresholds") (hasKey $own "policy") -}}
{{- if and (kindIs "map" $own) (kindIs "map" $general) (not $whole) -}}
{{- range $field, $value := $own -}}
{{- $_ := set $general $field $value -}}
{{- end -}}
{{- else -}}
{{- $_ := set $merged $key $own -}}
{{- end -}}
{{- end -}}
{{- toYaml $merged -}}
{{- end -}}

{{/* The longest drain of a model, in whole seconds. */}}
{{- define "headrace.drainSeconds" -}}
{{- $longest := 0.0 -}}
{{- range $model := .Values.models -}}
{{- $settings := fromYaml (include "headrace.modelSettings" (dict "root" $ "model" $model)) -}}
{{- $longest = maxf $longest $settings.drain_s -}}
{{- end -}}
{{- int (ceil $longest) -}}
{{- end -}}

{{/* The name that Ray Serve LLM gives a model's deployment. */}}
{{- define "headrace.deploymentName" -}}
HeadraceServer:{{ . | replace "/" "--" | replace "." "_" }}
{{- end -}}

{{/* The Deployment by which KEDA says how many replicas a model (root, id) shall have. */}}
{{- define "headrace.scaleName" -}}
{{- $slug := regexReplaceAll "[^a-z0-9]+" (lower .id) "-" | trunc 24 | trimAll "-" -}}
{{- printf "%s-scale-%s-%s" (include "headrace.fullname" .root | trunc 24 | trimSuffix "-") $slug (printf "%s/%s" (include "headrace.fullname" .root) .id | sha256sum | trunc 6) -}}
{{- end -}}

{{/* Replicas with which a model (root, id) starts where KEDA scales: those it has, so that an upgrade changes none. */}}
{{- define "headrace.startReplicas" -}}
{{- $bounds := fromYaml (include "headrace.kedaBounds" .) -}}
{{- $there := lookup "apps/v1" "Deployment" .root.Release.Namespace (include "headrace.scaleName" .) -}}
{{- $now := dig "spec" "replicas" $bounds.minReplicas (default dict $there) -}}
{{- /* Ray Serve's configuration takes no 0; the model that is started goes again within seconds. */ -}}
{{- max 1 (int $now) -}}
{{- end -}}

{{/* "true" where a model may have no replica, and no worker pod shall stay for the ingress alone. */}}
{{- define "headrace.scalesToZero" -}}
{{- $models := .Values.models -}}
{{- if include "headrace.autoscaled" . -}}
{{- range $models }}{{ if eq (get (fromYaml (include "headrace.replicas" (dict "root" $ "model" .))) "fewest" | int) 0 }}true{{ end }}{{ end -}}
{{- end -}}
{{- end -}}

{{/* Ray Serve's config. Built as data and written by toYaml, so no value can break the YAML or be printed as 1e+06.
     As `headrace render` splits it: Serve restarts everything when args change, and nothing when what stands under
     deployments does, so live settings and numbers of replicas stand there. */}}
{{- define "headrace.serveConfig" -}}
{{- $keda := eq .Values.autoscaling.mode "keda" -}}
{{- /* All interfaces: requests arrive from other pods. */ -}}
{{- $http := dict "host" "0.0.0.0" "port" .Values.service.port -}}
{{- $logs := dict "encoding" .Values.logging.encoding "log_level" .Values.logging.level "enable_access_log" .Values.logging.accessLog -}}
{{- $tenants := list -}}
{{- range $index, $tenant := .Values.tenants -}}
{{- $tenants = append $tenants (dict "name" $tenant.name "weight" (default 1 $tenant.weight) "api_key_env" (printf "HEADRACE_TENANT_KEY_%d" $index)) -}}
{{- end -}}
{{- $scale := list "num_replicas" "autoscaling_config" -}}
{{- $models := list -}}
{{- $deployments := list -}}
{{- $told := dict -}}
{{- $longestDrain := 0.0 -}}
{{- range $model := .Values.models -}}
{{- $id := $model.model_loading_config.model_id -}}
{{- $settings := fromYaml (include "headrace.modelSettings" (dict "root" $ "model" $model)) -}}
{{- $live := omit $settings "scheduler" -}}
{{- $engine := dict "controller" (dict "profile" $settings.controller.profile) -}}
{{- with $settings.scheduler -}}
{{- $_ := set $engine "scheduler" . -}}
{{- end -}}
{{- $entry := deepCopy (omit $model "headrace" "deployment_config") -}}
{{- $options := deepCopy (default dict $model.deployment_config) -}}
{{- $deployment := dict
  "name" (include "headrace.deploymentName" $id)
  "graceful_shutdown_timeout_s" $settings.drain_s
  "user_config" $live -}}
{{- range $option := $scale -}}
{{- if hasKey $options $option -}}
{{- $_ := set $deployment $option (get $options $option) -}}
{{- $_ := unset $options $option -}}
{{- end -}}
{{- end -}}
{{- /* As cluster/replica_bounds.py: the controller's decision, unless the model names a policy of its own. */ -}}
{{- $scaling := get $deployment "autoscaling_config" -}}
{{- if and $scaling (not (hasKey $scaling "policy")) $settings.controller.enabled (eq $settings.thresholds.policy "fluid") -}}
{{- $slots := default 256 (get (default dict $model.engine_kwargs) "max_num_seqs") -}}
{{- $ours := dict "target_ongoing_requests" $slots "upscale_delay_s" 0 "downscale_delay_s" 0 "policy" (dict "policy_function" "cluster.replica_policy:WantedReplicasPolicy") -}}
{{- $_ := set $deployment "autoscaling_config" (merge (deepCopy $scaling) $ours) -}}
{{- end -}}
{{- if $keda }}{{ $_ := set $deployment "num_replicas" (include "headrace.startReplicas" (dict "root" $ "id" $id) | int) }}{{ end -}}
{{- /* Else Serve scales it all the same, by a default of Ray's. */ -}}
{{- if hasKey $deployment "num_replicas" }}{{ $_ := set $deployment "autoscaling_config" nil }}{{ end -}}
{{- $_ := set $entry "deployment_config" $options -}}
{{- $_ := set $entry "headrace" $engine -}}
{{- $_ := set $told $id $live -}}
{{- $longestDrain = maxf $longestDrain $settings.drain_s -}}
{{- $models = append $models $entry -}}
{{- $deployments = append $deployments $deployment -}}
{{- end -}}
{{- $args := dict "llm_configs" $models -}}
{{- with .Values.tracing.otlpEndpoint -}}
{{- $_ := set $args "headrace" (dict "tracing" (dict "otlp_endpoint" . "sampling_ratio" $.Values.tracing.samplingRatio)) -}}
{{- end -}}
{{- if include "headrace.scalesToZero" . -}}
{{- /* Ray gives the head this resource; elsewhere an ingress would keep a worker pod. */ -}}
{{- $_ := set $args "ingress_deployment_config" (dict "ray_actor_options" (dict "num_cpus" 0 "resources" (dict "node:__internal_head__" 0.001))) -}}
{{- end -}}
{{- /* It passes on what the replicas finish, so it stops a little later. */ -}}
{{- $ingress := dict "name" "HeadraceIngress" "graceful_shutdown_timeout_s" (addf $longestDrain 15) "user_config" (dict "tenants" $tenants "models" $told) -}}
{{- $application := dict
  "name" "headrace"
  "import_path" "headrace:build"
  "route_prefix" "/"
  "args" $args
  "deployments" (prepend $deployments $ingress) -}}
{{- if $keda }}{{ $_ := set $application "external_scaler_enabled" true }}{{ end -}}
{{- toYaml (dict "applications" (list $application) "http_options" $http "logging_config" $logs) -}}
{{- end -}}
