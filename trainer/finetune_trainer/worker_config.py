"""The file a rank starts from: the launcher writes it after data and model are on local disk."""

from __future__ import annotations

from finetune_api.fields import SchemaModel
from finetune_api.trainer_config import TrainerConfig


class WorkerConfig(SchemaModel):
    """TrainerConfig with the completed plan, and where this node keeps what the launcher prepared."""

    trainer: TrainerConfig
    model_directory: str  # config.json, tokenizer, safetensors (weights absent with initialization Random)
    data_directory: str  # PreparedData.open
    log_directory: str  # one file per rank and attempt
