{{/*
Everything the operator asks the API server for, and nothing else. tests/cluster compares these lines with an audit log.
Server-side apply of a new object needs `create` and `patch`.
*/}}

{{/* In every namespace with jobs: ClusterRole, or one Role per watched namespace. */}}
{{- define "finetune.rules" -}}
- apiGroups: [finetune.dev]
  resources: [finetunejobs]
  verbs: [list, watch, delete] # delete: ttlSecondsAfterFinished
- apiGroups: [finetune.dev]
  resources: [finetunejobs/status]
  verbs: [patch]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, patch, delete] # delete: made anew with what has changed while it was suspended
- apiGroups: [""]
  resources: [services, configmaps]
  verbs: [create, patch]
- apiGroups: [""]
  resources: [pods]
  verbs: [list, delete]
- apiGroups: [""]
  resources: [pods/status] # a pod on a lost node has failed: else its Job would wait for the node
  verbs: [patch]
- apiGroups: [""]
  resources: [events] # why a Job cannot make pods: quota, admission
  verbs: [list]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- end }}

{{/* In the operator's own namespace. */}}
{{- define "finetune.ownRules" -}}
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  verbs: [create]
- apiGroups: [coordination.k8s.io]
  resources: [leases]
  resourceNames: [{{ include "finetune.leaseName" . | quote }}]
  verbs: [get, patch]
{{- end }}

{{/* For people: what the ClusterRoles view and edit are extended by. */}}
{{- define "finetune.viewRules" -}}
- apiGroups: [finetune.dev]
  resources: [finetunejobs, finetunejobs/status]
  verbs: [get, list, watch]
{{- end }}

{{- define "finetune.editRules" -}}
- apiGroups: [finetune.dev]
  resources: [finetunejobs]
  verbs: [create, update, patch, delete, deletecollection]
{{- end }}
