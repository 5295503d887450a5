{{/* config.json: finetune_operator.settings.OperatorSettings. */}}
{{- define "finetune.settings" -}}
{{- $training := .Values.training -}}
{{- $pods := dict
  "nodeSelector" $training.nodeSelector
  "tolerations" $training.tolerations
  "priorityClassName" $training.priorityClassName
  "runtimeClassName" $training.runtimeClassName
  "labels" $training.labels
  "annotations" $training.annotations
  "environment" $training.environment
  "terminationGracePeriodSeconds" (int $training.terminationGracePeriodSeconds)
  "sharedMemory" $training.sharedMemory
-}}
{{- if $training.scratch -}}{{- $_ := set $pods "scratch" $training.scratch -}}{{- end -}}
{{- dict
  "namespaces" .Values.namespaces
  "trainerImage" (include "finetune.image" (dict "image" .Values.image.trainer "root" .))
  "trainerImagePullPolicy" .Values.image.trainer.pullPolicy
  "imagePullSecrets" $training.imagePullSecrets
  "podDefaults" $pods
  "uris" (dict "schemes" .Values.uris.schemes "hosts" .Values.uris.hosts "endpoints" .Values.uris.endpoints)
  "trustRemoteCode" .Values.trustRemoteCode
  "progress" (dict "intervalSeconds" (int .Values.progress.intervalSeconds) "timeoutSeconds" (int .Values.progress.timeoutSeconds))
  "collectiveTimeoutSeconds" (int .Values.collectiveTimeoutSeconds)
  "rendezvousTimeoutSeconds" (int .Values.rendezvousTimeoutSeconds)
  "concurrency" (int .Values.concurrency)
  "lease" (dict
    "enabled" .Values.lease.enabled
    "name" (include "finetune.leaseName" .)
    "namespace" .Release.Namespace
    "durationSeconds" (int .Values.lease.durationSeconds)
    "renewDeadlineSeconds" (int .Values.lease.renewDeadlineSeconds)
    "retrySeconds" (int .Values.lease.retrySeconds))
  "metrics" (dict "port" (int .Values.metrics.port))
  "health" (dict "port" (int .Values.health.port))
  "log" (dict "format" .Values.log.format "level" .Values.log.level)
| toPrettyJson -}}
{{- end }}
