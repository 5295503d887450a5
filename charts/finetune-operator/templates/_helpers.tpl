{{/* Names, labels and switches. */}}

{{- define "finetune.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end }}

{{- define "finetune.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "finetune.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end }}

{{/* Of objects that are not in a namespace: two releases must not share them. */}}
{{- define "finetune.clusterName" -}}
{{- $name := include "finetune.fullname" . -}}
{{- if eq $name .Release.Namespace -}}{{ $name }}{{- else -}}{{ printf "%s:%s" .Release.Namespace $name }}{{- end -}}
{{- end }}

{{/* Of the release alone: two releases with a Lease in common would wait for each other for ever. */}}
{{- define "finetune.leaseName" -}}
{{- default (include "finetune.fullname" .) .Values.lease.name -}}
{{- end }}

{{- define "finetune.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "finetune.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- required "serviceAccount.name is needed with serviceAccount.create: false" .Values.serviceAccount.name -}}
{{- end -}}
{{- end }}

{{- define "finetune.selectorLabels" -}}
app.kubernetes.io/name: {{ include "finetune.name" . | quote }}
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "finetune.labels" -}}
{{ include "finetune.selectorLabels" . }}
app.kubernetes.io/part-of: finetune-operator
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* What the operator puts on every training pod (a contract with its code). */}}
{{- define "finetune.trainingPodLabels" -}}
app.kubernetes.io/name: finetune-job
app.kubernetes.io/managed-by: finetune-operator
{{- end }}

{{/* (dict "image" .Values.image.operator "root" .) -> reference */}}
{{- define "finetune.image" -}}
{{- if .image.digest -}}
{{- printf "%s@%s" .image.repository .image.digest -}}
{{- else -}}
{{- printf "%s:%s" .image.repository (default .root.Chart.AppVersion .image.tag) -}}
{{- end -}}
{{- end }}

{{/* (dict "switch" auto|true|false "auto" bool) -> "true" or nothing */}}
{{- define "finetune.on" -}}
{{- if or (eq (toString .switch) "true") (and (eq (toString .switch) "auto") .auto) -}}true{{- end -}}
{{- end }}

{{/* Whether Prometheus Operator's API is served. */}}
{{- define "finetune.hasMonitoring" -}}
{{- if .Capabilities.APIVersions.Has "monitoring.coreos.com/v1" -}}true{{- end -}}
{{- end }}

{{/* Pod Security `restricted`, and more. */}}
{{- define "finetune.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile: {type: RuntimeDefault}
{{- end }}

{{- define "finetune.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: {drop: [ALL]}
{{- end }}

{{/* What no schema can say. */}}
{{- define "finetune.check" -}}
{{- if and (gt (int .Values.replicas) 1) (not .Values.lease.enabled) -}}
{{- fail (printf "replicas is %d and lease.enabled is false: operators without a Lease disturb each other; set replicas to 1 or enable the lease" (int .Values.replicas)) -}}
{{- end -}}
{{- if ge (int .Values.lease.renewDeadlineSeconds) (int .Values.lease.durationSeconds) -}}
{{- fail (printf "lease.renewDeadlineSeconds is %d: it must be less than lease.durationSeconds (%d)" (int .Values.lease.renewDeadlineSeconds) (int .Values.lease.durationSeconds)) -}}
{{- end -}}
{{- if ge (int .Values.lease.retrySeconds) (int .Values.lease.renewDeadlineSeconds) -}}
{{- fail (printf "lease.retrySeconds is %d: it must be less than lease.renewDeadlineSeconds (%d)" (int .Values.lease.retrySeconds) (int .Values.lease.renewDeadlineSeconds)) -}}
{{- end -}}
{{- if eq (int .Values.metrics.port) (int .Values.health.port) -}}
{{- fail (printf "metrics.port and health.port are both %d: choose two ports" (int .Values.metrics.port)) -}}
{{- end -}}
{{- if and .Values.trainingNetworkPolicy.enabled (not .Values.trainingNetworkPolicy.namespaces) (not .Values.namespaces) -}}
{{- fail "trainingNetworkPolicy.enabled needs trainingNetworkPolicy.namespaces: a policy protects the pods of one namespace" -}}
{{- end -}}
{{- end }}
