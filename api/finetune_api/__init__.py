"""The FineTuneJob: the one hand-written schema, the planner, and the files the rooms exchange.

Pure: pydantic (and a YAML reader) only. Nothing here imports torch, kopf or a cluster client.
"""

API_GROUP = "finetune.dev"
API_VERSION = "v1alpha1"
KIND = "FineTuneJob"
PLURAL = "finetunejobs"
