"""Small real jobs for the training tests: a tiny Llama, chat data, and worker files as a launcher writes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tests.builders import build_model, conversations, write_jsonl

from finetune_api.model_facts import model_facts_from_config
from finetune_api.plan import Facts
from finetune_api.planner import complete_plan, make_plan
from finetune_api.spec import FineTuneJobSpec
from finetune_api.trainer_config import JobIdentity, Rendezvous, TrainerConfig
from finetune_trainer.data import PreparedData, TokenDataset, prepare
from finetune_trainer.worker_config import WorkerConfig

ENGINES: dict[str, dict[str, Any]] = {
    "DDP": {"type": "DDP"},
    "FSDP": {"type": "FSDP"},
    "ZeRO-1": {"type": "DeepSpeed", "deepspeed": {"zeroStage": 1}},
    "ZeRO-2": {"type": "DeepSpeed", "deepspeed": {"zeroStage": 2}},
    "ZeRO-3": {"type": "DeepSpeed", "deepspeed": {"zeroStage": 3}},
}
METHODS: dict[str, dict[str, Any]] = {
    "Full": {"type": "Full"},
    "LoRA": {"type": "LoRA", "lora": {"rank": 4}},
    "QLoRA": {"type": "QLoRA", "lora": {"rank": 4}},
}
DRIVER = Path(__file__).with_name("driver.py")


@dataclass
class Job:
    """One job of a driver. ``cut``: ask for a stop at this step first, then run again to the end."""

    tag: str
    method: dict[str, Any]
    engine: dict[str, Any]
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # merged into the spec's blocks
    cut: int | None = None
    stop_after_cut: bool = False
    output: str | None = None  # jobs that share one resume from each other's checkpoints
    change: Callable[[WorkerConfig], WorkerConfig] | None = None  # what the ranks are told instead
    losses: dict[int, float] | None = None  # what evaluation says at which step, instead of the truth
    fails: bool = False  # must end in a FineTuneError, the same on every rank: Ground.failure


class Ground:
    """A folder with a model and data in it."""

    def __init__(self, folder: Path, rows: int = 60, **model: Any) -> None:
        self.folder = folder
        self.model = folder / "model"
        if not (self.model / "config.json").exists():
            build_model(self.model, **model)
            write_jsonl(folder / "train.jsonl", conversations(rows))

    def spec(self, job: Job, world_size: int) -> FineTuneJobSpec:
        blocks: dict[str, Any] = {
            "model": {"uri": f"file://{self.model}"},
            "dataset": {
                "train": [{"uri": f"file://{self.folder}/train.jsonl"}],
                "maxSequenceLength": 128,
                "packing": False,
            },
            "method": job.method,
            "training": {"maxSteps": 20, "globalBatchSize": 8, "precision": "FP32", "learningRate": 3e-3},
            "distributed": {"processesPerNode": world_size, "strategy": job.engine},
            "checkpoint": {"everySteps": 100},
            "output": {"uri": f"file://{self.folder}/out/{_word(job.output or job.tag)}"},
        }
        for name, block in job.settings.items():
            blocks[name] = {**blocks.get(name, {}), **block}
        return FineTuneJobSpec.model_validate(blocks)

    def trainer_config(self, job: Job, world_size: int) -> TrainerConfig:
        spec = self.spec(job, world_size)
        identity = JobIdentity(name="job", uid="uid")
        model_facts = model_facts_from_config(json.loads((self.model / "config.json").read_text()), None)
        return TrainerConfig(
            job=identity,
            spec=spec,
            plan=make_plan(spec, Facts(model=model_facts), identity),
            rendezvous=Rendezvous(endpoint="localhost:0", minimum_nodes=1, maximum_nodes=1),
            work_directory=str(self.work(job)),
            cache_directory=str(self.folder / "cache"),
            metrics_port=0,
        )

    def worker_config(self, job: Job, world_size: int) -> WorkerConfig:
        """What the launcher would write for this job."""
        config = self.trainer_config(job, world_size)
        data = prepare(config, self.model, lambda *_: None)
        plan = complete_plan(config.plan, config.spec, data.facts, None)
        worker = WorkerConfig(
            trainer=config.model_copy(update={"plan": plan}),
            model_directory=str(self.model),
            data_directory=str(data.directory),
            log_directory=str(self.folder / "logs"),
        )
        return job.change(worker) if job.change else worker

    def data(self, job: Job) -> PreparedData:
        return PreparedData.open(self.worker_config(job, 1).data_directory)

    def work(self, job: Job) -> Path:
        return self.folder / "work" / _word(job.tag)

    def run(self, jobs: list[Job], world_size: int, limit_seconds: float = 540) -> dict[str, Outcome]:
        """Run jobs one after the other in one torchrun process group; tag -> outcome."""
        run_together([(self, job) for job in jobs], world_size, limit_seconds)
        return {job.tag: self.outcome(job) for job in jobs if not (job.stop_after_cut or job.fails)}

    def failure(self, job: Job) -> tuple[str, str]:
        """Name of the error's class on rank 0 and its message; every rank has to tell the same."""
        told = [json.loads(path.read_text()) for path in sorted(self.work(job).glob("failure-*.json"))]
        assert len({message for _, message in told}) == 1, f"{job.tag}: {told or 'no rank failed'}"
        name, message = told[0]
        return name, message

    def published(self, job: Job) -> list[Path]:
        """Every file below the artifact prefix."""
        prefix = Path(self.trainer_config(job, 1).plan.artifact_prefix.removeprefix("file://"))
        return [path for path in prefix.rglob("*") if path.is_file() and "checkpoints" not in path.parts]

    def outcome(self, job: Job) -> Outcome:
        work = self.work(job)
        return Outcome(json.loads((work / "report" / "report.json").read_text()), work / "artifact")


def run_together(work: list[tuple[Ground, Job]], world_size: int, limit_seconds: float = 540) -> None:
    """Run jobs of several grounds one after the other in one torchrun process group."""
    parcels = [
        {"config": ground.worker_config(job, world_size).model_dump(mode="json", by_alias=True), **_driving(job)}
        for ground, job in work
    ]
    parcel = work[0][0].folder / f"jobs-{os.getpid()}-{world_size}.json"
    parcel.write_text(json.dumps(parcels))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(world_size), str(DRIVER), str(parcel)),
        ],
        env=rank_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit_seconds,
    )
    if done.returncode != 0:
        end = done.stdout.rfind("Failures:")
        raise AssertionError(f"torchrun ended with {done.returncode}:\n{done.stdout[:end][-5000:]}")


@dataclass
class Outcome:
    """What a finished job left behind."""

    report: dict[str, Any]
    artifact: Path

    @property
    def losses(self) -> list[float]:
        return [step["loss"] for step in self.report["steps"]]

    @property
    def weights(self) -> bytes:
        """The artifact's tensors as bytes."""
        names = ("adapter_model.safetensors", "model.safetensors")
        return next((self.artifact / name).read_bytes() for name in names if (self.artifact / name).exists())


def rank_environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}


def largest_difference(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other), f"{len(one)} steps and {len(other)} steps"
    return float((torch.tensor(one) - torch.tensor(other)).abs().max())


def plain_base(directory: Path, method: dict[str, Any]) -> Any:
    """The base model as a person would load it, in 4 bit for QLoRA."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if method["type"] != "QLoRA":
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=method.get("quantization", {}).get("doubleQuantization", True),
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )


def with_adapter(directory: Path, method: dict[str, Any], adapter: Path) -> Any:
    """Base and adapter in plain PEFT."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(plain_base(directory, method), str(adapter))
    return model.train()  # an eval-mode forward of bitsandbytes repacks 4-bit weights on some CPUs


def row_logits(model: Any, rows: TokenDataset, row: int) -> torch.Tensor:
    """What a plain model says to one row: (T, V)."""
    ids = torch.from_numpy(rows[row].input_ids.astype("int64"))[None]
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=ids).logits[0].float()
    return logits


def validation_loss(model: Any, rows: TokenDataset) -> float:
    """Mean token loss of a plain model, one sample at a time."""
    total, count = 0.0, 0
    for row in range(len(rows)):
        labels = torch.from_numpy(rows[row].labels.astype("int64"))[1:]
        logits = row_logits(model, rows, row)[:-1]
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def _driving(job: Job) -> dict[str, Any]:
    told = ("tag", "cut", "stop_after_cut", "losses", "fails")
    return {name: getattr(job, name) for name in told}


def _word(text: str) -> str:
    return text.replace(" ", "-")
