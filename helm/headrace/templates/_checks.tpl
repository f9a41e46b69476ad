{{/* What values.schema.json cannot say: values that contradict each other, refused in a sentence. */}}
{{- define "headrace.checks" -}}
{{- $v := .Values -}}
{{- $mode := $v.autoscaling.mode -}}
{{- $ids := list -}}
{{- $scaled := list -}}
{{- range $v.models -}}
{{- $ids = append $ids .model_loading_config.model_id -}}
{{- if (default dict .deployment_config).autoscaling_config }}{{ $scaled = append $scaled .model_loading_config.model_id }}{{ end -}}
{{- end -}}
{{- if ne (len $ids) (len (uniq $ids)) -}}
{{- fail (printf "models: two have the same model_id (%s); each needs its own" (join ", " $ids)) -}}
{{- end -}}
{{- if and (eq $mode "keda") $scaled -}}
{{- fail (printf "autoscaling.mode keda and deployment_config.autoscaling_config of %s exclude each other, as only one may change the number of replicas: remove one of them" (join ", " $scaled)) -}}
{{- end -}}
{{- $incremental := eq $v.upgradeStrategy "NewClusterWithIncrementalUpgrade" -}}
{{- if and (eq $mode "ray") (not $scaled) (not $incremental) -}}
{{- fail "autoscaling.mode ray, but no model has a deployment_config.autoscaling_config: nothing would ever scale" -}}
{{- end -}}
{{- if eq $mode "keda" -}}
{{- range $id, $_ := $v.keda.models -}}
{{- if not (has $id $ids) }}{{ fail (printf "keda.models: no model has the model_id %q; there are %s" $id (join ", " $ids)) }}{{ end -}}
{{- end -}}
{{- range $id := $ids -}}
{{- $bounds := fromYaml (include "headrace.kedaBounds" (dict "root" $ "id" $id)) -}}
{{- if gt (int $bounds.minReplicas) (int $bounds.maxReplicas) }}{{ fail (printf "keda: minReplicas %d of %s is more than maxReplicas %d" (int $bounds.minReplicas) $id (int $bounds.maxReplicas)) }}{{ end -}}
{{- end -}}
{{- end -}}
{{- if $incremental -}}
{{- if eq $mode "none" }}{{ fail "upgradeStrategy NewClusterWithIncrementalUpgrade needs Ray's autoscaler of pods: set autoscaling.mode to ray (or keda)" }}{{ end -}}
{{- if not $v.incrementalUpgrade.gatewayClassName }}{{ fail "upgradeStrategy NewClusterWithIncrementalUpgrade needs incrementalUpgrade.gatewayClassName" }}{{ end -}}
{{- if not (fromYaml (include "headrace.keys" .)).apiKey }}{{ fail "upgradeStrategy NewClusterWithIncrementalUpgrade forwards /admin through KubeRay's Gateway: give an operator's key (auth)" }}{{ end -}}
{{- end -}}
{{- if and $v.auth.existingSecret (or $v.auth.hfToken $v.auth.apiKey) -}}
{{- fail "auth.existingSecret excludes auth.hfToken and auth.apiKey: put the keys in that Secret" -}}
{{- end -}}
{{- $entries := list -}}
{{- range $v.tenants }}{{ if not .secretName }}{{ $entries = append $entries (include "headrace.tenantEntry" .) }}{{ end }}{{ end -}}
{{- if ne (len $entries) (len (uniq $entries)) -}}
{{- fail "tenants: two names are the same as an entry of a Secret; rename one, or give it a secretName" -}}
{{- end -}}
{{- if and $v.modelCache.existingClaim $v.modelCache.claim.create -}}
{{- fail "modelCache.existingClaim and modelCache.claim.create exclude each other" -}}
{{- end -}}
{{- if and $v.modelCache.download.enabled (not $v.modelCache.existingClaim) (not $v.modelCache.claim.create) -}}
{{- fail "modelCache.download needs a claim to download into: modelCache.existingClaim, or modelCache.claim.create" -}}
{{- end -}}
{{- if and $v.ingress.enabled (not $v.ingress.hosts) }}{{ fail "ingress.enabled needs ingress.hosts" }}{{ end -}}
{{- if and $v.httpRoute.enabled (not $v.httpRoute.parentRefs) }}{{ fail "httpRoute.enabled needs httpRoute.parentRefs: the Gateways" }}{{ end -}}
{{- if eq (int $v.service.port) (int $v.monitoring.port) }}{{ fail "service.port and monitoring.port are the same" }}{{ end -}}
{{- end -}}
