{{/* Names, labels, accounts, the image. */}}

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
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* metadata of an object of the chart: root, suffix of its name, further labels, annotations. */}}
{{- define "headrace.metadata" -}}
name: {{ printf "%s%s" (include "headrace.fullname" .root) (default "" .suffix) | quote }}
namespace: {{ .root.Release.Namespace | quote }}
labels:
  {{- include "headrace.labels" .root | nindent 2 }}
  {{- with .labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- with .annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* No chart version, as a changed pod label makes KubeRay start a new cluster; and no app.kubernetes.io/name, which
     KubeRay sets itself and selects by. */}}
{{- define "headrace.podLabels" -}}
{{- $own := dict "app.kubernetes.io/instance" .root.Release.Name "app.kubernetes.io/component" .component -}}
{{- toYaml (merge $own .root.Values.podLabels) -}}
{{- end -}}

{{/* Selects head and workers, and no other pod of the release. */}}
{{- define "headrace.rayPods" -}}
matchLabels:
  app.kubernetes.io/instance: {{ .Release.Name | quote }}
matchExpressions:
  - key: app.kubernetes.io/component
    operator: In
    values: [head, worker]
{{- end -}}

{{/* KubeRay's name for the Service in front of Ray Serve. */}}
{{- define "headrace.service" -}}
{{- include "headrace.fullname" . }}-serve-svc
{{- end -}}

{{- define "headrace.account" -}}
{{- if .Values.serviceAccountName -}}
{{- .Values.serviceAccountName -}}
{{- else if .Values.serviceAccount.create -}}
{{- include "headrace.fullname" . -}}
{{- end -}}
{{- end -}}

{{/* "true" where pods come and go with the load, so that a container beside Ray's head needs the Kubernetes API. */}}
{{- define "headrace.autoscaled" -}}
{{- if ne .Values.autoscaling.mode "none" }}true{{ end -}}
{{- end -}}

{{/* The head's account. KubeRay itself gives it the autoscaler's rights (a Role and RoleBinding for each cluster), and
     wants an account that exists already; it cuts names to 50 characters. */}}
{{- define "headrace.headAccount" -}}
{{- if and (include "headrace.autoscaled" .) (not .Values.serviceAccountName) -}}
{{- include "headrace.fullname" . }}-as
{{- else -}}
{{- include "headrace.account" . -}}
{{- end -}}
{{- end -}}

{{- define "headrace.image" -}}
{{- $suffix := ternary "-cpu" "" (eq (include "headrace.gpusPerWorker" .) "0") -}}
{{- printf "%s:%s" .Values.image.repository (default (printf "%s%s" .Chart.AppVersion $suffix) .Values.image.tag) -}}
{{- end -}}

{{/* The Secret that the chart makes for keys that are given inline or generated. */}}
{{- define "headrace.ownSecret" -}}
{{- include "headrace.fullname" . }}-auth
{{- end -}}

{{/* Entry of a tenant's generated key. */}}
{{- define "headrace.tenantEntry" -}}
tenant-{{ regexReplaceAll "[^-._a-zA-Z0-9]" .name "-" }}
{{- end -}}

{{/* The Secret with the token that Ray's processes show each other; empty where Ray asks for none. */}}
{{- define "headrace.raySecret" -}}
{{- with .Values.ray.authentication -}}
{{- if .enabled }}{{ default (include "headrace.ownSecret" $) .existingSecret }}{{ end -}}
{{- end -}}
{{- end -}}

{{/* Where each key is: a mapping of hfToken, apiKey to {name, key}, of those there are. */}}
{{- define "headrace.keys" -}}
{{- $auth := .Values.auth -}}
{{- $own := include "headrace.ownSecret" . -}}
{{- $keys := dict -}}
{{- range $key, $entry := dict "hfToken" "hf-token" "apiKey" "api-key" -}}
{{- $theirs := get $auth.existingSecretKeys $key -}}
{{- if and $auth.existingSecret $theirs -}}
{{- $_ := set $keys $key (dict "name" $auth.existingSecret "key" $theirs) -}}
{{- else if and (not $auth.existingSecret) (get $auth $key) -}}
{{- $_ := set $keys $key (dict "name" $own "key" $entry) -}}
{{- end -}}
{{- end -}}
{{- if and $auth.generateApiKey (not $auth.existingSecret) (not $auth.apiKey) -}}
{{- $_ := set $keys "apiKey" (dict "name" $own "key" "api-key") -}}
{{- end -}}
{{- toYaml $keys -}}
{{- end -}}
