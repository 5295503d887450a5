"""The settings that both sides share, and our side of them as a launcher's configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.material import MAXIMUM_LENGTH, Material
from finetune_api.planner import make_plan
from finetune_api.spec import FineTuneJobSpec
from finetune_api.trainer_config import JobIdentity, Rendezvous, TrainerConfig
from finetune_storage.facts import read_facts

GLOBAL_BATCH = 8
MICRO_BATCH = 4
RANK, ALPHA = 16, 32


@dataclass(frozen=True)
class Case:
    """One line of the comparison."""

    method: str  # "Full" | "LoRA"
    precision: str  # "FP32" | "BF16"
    data: str
    steps: int
    step_tokens: float  # of an average step
    packing: bool = False

    @property
    def label(self) -> str:
        extra = " packed" if self.packing else " start" if self.steps == 2 else ""
        return f"{self.method} {self.precision}{extra}"

    @property
    def learning_rate(self) -> float:
        return 1e-4 if self.method == "Full" else 2e-4


def specification(case: Case, material: Material, output: Path) -> FineTuneJobSpec:
    """A case as a job."""
    method: dict[str, Any] = {"type": case.method}
    if case.method == "LoRA":
        method["lora"] = {"rank": RANK, "alpha": ALPHA}
    return FineTuneJobSpec.model_validate(
        {
            "model": {"uri": Path(material.model).as_uri()},
            "dataset": {
                "train": [{"uri": Path(case.data).as_uri(), "format": "PromptCompletion"}],
                "maxSequenceLength": MAXIMUM_LENGTH,
                "packing": case.packing,
            },
            "method": method,
            "training": {
                "maxSteps": case.steps,
                "globalBatchSize": GLOBAL_BATCH,
                "microBatchSize": MICRO_BATCH,
                "learningRate": case.learning_rate,
                "schedule": {"type": "Constant", "warmupSteps": 0},
                "precision": case.precision,
                "gradientCheckpointing": "None",
                "seed": 1,
            },
            "distributed": {"processesPerNode": 1},
            "output": {"uri": output.as_uri()},
        }
    )


def write_launcher_config(case: Case, material: Material, directory: Path, port: int) -> Path:
    """``trainer.json`` of a run that shares nothing with earlier ones: no cached tokens, no checkpoint."""
    return _write(specification(case, material, directory / "output"), directory, port)


def _write(spec: FineTuneJobSpec, directory: Path, port: int) -> Path:
    identity = JobIdentity(name="bench", uid=directory.name)
    config = TrainerConfig(
        job=identity,
        spec=spec,
        plan=make_plan(spec, read_facts(spec), identity),
        rendezvous=Rendezvous(endpoint=f"127.0.0.1:{port}", minimum_nodes=1, maximum_nodes=1),
        work_directory=str(directory / "work"),
        cache_directory=str(directory / "cache"),
        metrics_port=0,
    )
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "trainer.json"
    path.write_text(config.model_dump_json(by_alias=True, exclude_none=True))
    return path


def write_loading_config(material: Material, directory: Path, port: int) -> Path:
    """LoRA in BF16 on the wide model under FSDP on two ranks; only its loading is measured."""
    case = Case("LoRA", "BF16", material.data, 1, 0.0)
    values = specification(case, material, directory / "output").model_dump(
        mode="json", by_alias=True, exclude_none=True
    )
    values["model"]["uri"] = Path(material.wide_model).as_uri()
    values["distributed"] = {"processesPerNode": 2, "strategy": {"type": "FSDP"}}
    return _write(FineTuneJobSpec.model_validate(values), directory, port)
