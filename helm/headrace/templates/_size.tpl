{{/* How many GPUs, replicas and worker pods. */}}

{{/* GPUs of one replica of a model. */}}
{{- define "headrace.gpusOf" -}}
{{- $engine := default dict .engine_kwargs -}}
{{- mul (default 1 $engine.tensor_parallel_size) (default 1 $engine.pipeline_parallel_size) (default 1 $engine.data_parallel_size) -}}
{{- end -}}

{{- define "headrace.gpusPerWorker" -}}
{{- if kindIs "invalid" .Values.gpu.perWorker -}}
{{- $most := 1 -}}
{{- range .Values.models }}{{ $most = max $most (include "headrace.gpusOf" . | int) }}{{ end -}}
{{- $most -}}
{{- else -}}
{{- int .Values.gpu.perWorker -}}
{{- end -}}
{{- end -}}

{{/* KEDA's bounds for one model (root, id). */}}
{{- define "headrace.kedaBounds" -}}
{{- $keda := .root.Values.keda -}}
{{- $bounds := dict "minReplicas" $keda.minReplicas "maxReplicas" $keda.maxReplicas "idleReplicas" $keda.idleReplicas -}}
{{- range $name, $value := default dict (get $keda.models .id) }}{{ $_ := set $bounds $name $value }}{{ end -}}
{{- toYaml $bounds -}}
{{- end -}}

{{/* Fewest and most replicas of a model (root, model). */}}
{{- define "headrace.replicas" -}}
{{- $deployment := default dict .model.deployment_config -}}
{{- $scaling := default dict $deployment.autoscaling_config -}}
{{- $most := default (default 1 $scaling.max_replicas) $deployment.num_replicas -}}
{{- $fewest := $most -}}
{{- if eq .root.Values.autoscaling.mode "keda" -}}
{{- $bounds := fromYaml (include "headrace.kedaBounds" (dict "root" .root "id" .model.model_loading_config.model_id)) -}}
{{- $most = $bounds.maxReplicas -}}
{{- $fewest = ternary $bounds.minReplicas $bounds.idleReplicas (kindIs "invalid" $bounds.idleReplicas) -}}
{{- else if and (eq .root.Values.autoscaling.mode "ray") $scaling -}}
{{- $fewest = ternary $scaling.min_replicas 1 (hasKey $scaling "min_replicas") -}}
{{- end -}}
{{- toYaml (dict "fewest" (int $fewest) "most" (int $most)) -}}
{{- end -}}

{{/* Worker pods for so many replicas of each model (root, which: fewest or most). Replicas whose GPUs divide a pod's
     share pods; of others, each pod holds as many as fit whole. Without GPUs each replica has a pod. */}}
{{- define "headrace.workersFor" -}}
{{- $perWorker := include "headrace.gpusPerWorker" .root | int -}}
{{- $shared := 0 -}}
{{- $whole := 0 -}}
{{- range $model := .root.Values.models -}}
{{- $replicas := get (fromYaml (include "headrace.replicas" (dict "root" $.root "model" $model))) $.which | int -}}
{{- $each := include "headrace.gpusOf" $model | int -}}
{{- if eq $perWorker 0 -}}
{{- $whole = add $whole $replicas -}}
{{- else if or (ge $each $perWorker) (eq (mod $perWorker $each) 0) -}}
{{- $shared = add $shared (mul $replicas $each) -}}
{{- else -}}
{{- $fit := div $perWorker $each -}}
{{- $whole = add $whole (div (add $replicas (sub $fit 1)) $fit) -}}
{{- end -}}
{{- end -}}
{{- if gt $perWorker 0 }}{{ $whole = add $whole (div (add $shared (sub $perWorker 1)) $perWorker) }}{{ end -}}
{{- $whole -}}
{{- end -}}

{{/* Most worker pods: what gpu.workers says, else enough for all replicas. */}}
{{- define "headrace.workers" -}}
{{- default (include "headrace.workersFor" (dict "root" . "which" "most")) .Values.gpu.workers -}}
{{- end -}}

{{/* Fewest worker pods; the most, where nothing scales. */}}
{{- define "headrace.fewestWorkers" -}}
{{- $most := include "headrace.workers" . | int -}}
{{- if include "headrace.autoscaled" . -}}
{{- min $most (include "headrace.workersFor" (dict "root" . "which" "fewest") | int) -}}
{{- else -}}
{{- $most -}}
{{- end -}}
{{- end -}}
