"""A job around a data set: a TrainerConfig, a tokenizer, ``prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.builders import CHATML, build_tokenizer

from finetune_api.plan import CheckpointingMode, Plan, ResolvedStrategy
from finetune_api.spec import FineTuneJobSpec, MethodType, OutputFormat, Precision, StrategyType
from finetune_api.trainer_config import JobIdentity, Rendezvous, TrainerConfig
from finetune_trainer.data import PreparedData, prepare
from finetune_trainer.data.tokenizing import RecordEncoder, check_tokenizer, load_tokenizer


def trainer_config(home: Path, dataset: dict[str, Any]) -> TrainerConfig:
    """``dataset`` as in a manifest (camelCase)."""
    document = {
        "model": {"uri": "file:///models/tiny"},
        "dataset": dataset,
        "method": {"type": "LoRA"},
        "output": {"uri": f"file://{home}/output"},
    }
    plan = Plan(
        world_size=1,
        nodes=1,
        processes_per_node=1,
        device="cpu",
        strategy=ResolvedStrategy(type=StrategyType.DDP, label="DDP"),
        method=MethodType.LORA,
        precision=Precision.FP32,
        micro_batch_size=1,
        gradient_accumulation_steps=1,
        global_batch_size=1,
        gradient_checkpointing=CheckpointingMode.NONE,
        output_format=OutputFormat.ADAPTER,
        artifact_prefix=f"file://{home}/output/default/job/uid/",
        checkpoint_prefix=f"file://{home}/output/default/job/uid/checkpoints/",
    )
    return TrainerConfig(
        job=JobIdentity(name="job", uid="uid"),
        spec=FineTuneJobSpec.model_validate(document),
        plan=plan,
        rendezvous=Rendezvous(endpoint="127.0.0.1:29500", minimum_nodes=1, maximum_nodes=1),
        work_directory=f"{home}/work",
        cache_directory=f"{home}/cache",
    )


class Workbench:
    """A directory with a tokenizer; ``prepare`` runs the real preparation on files written into it."""

    def __init__(self, home: Path, template: str | None = CHATML, **tokenizer: Any) -> None:
        self.home = home
        self.model = home / "model"
        self.said: list[str] = []
        build_tokenizer(self.model, template, **tokenizer)

    def path(self, name: str) -> Path:
        return self.home / "data" / name

    def uri(self, name: str) -> str:
        return f"file://{self.path(name)}"

    def prepare(self, train: Any = "train.jsonl", **dataset: Any) -> PreparedData:
        """``train``: a file name, or sources as in a manifest."""
        sources = [{"uri": self.uri(train)}] if isinstance(train, str) else train
        config = trainer_config(self.home, {"train": sources, "packing": False, **dataset})
        return prepare(config, self.model, self.said.append)

    def tokenizer(self) -> Any:
        return load_tokenizer(self.model)

    def encoder(self, kind: Any, loss_on: Any) -> RecordEncoder:
        tokenizer = self.tokenizer()
        return RecordEncoder(tokenizer, check_tokenizer(tokenizer, self.model), kind, loss_on)
