"""What is in a checkpoint and how an engine's state gets in and out of it.

One layout for every engine: full named tensors (``<parameter>/weight``, ``<parameter>/<optimizer key>``) in
safetensors, dealt over ranks by size, and ``progress-<digest>.json``. A checkpoint written at one world size loads at
any other.
Nothing random is carried: random numbers are functions of (seed, step, rank, micro-batch), see seeding.py.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune_api.errors import CheckpointError
from finetune_api.report import CheckpointManifest, EvaluationRecord, FileEntry, SampleRecord, StepRecord
from finetune_storage import DamagedBundle, ObjectNotFound
from finetune_trainer.checkpoint_store import CheckpointStore, Restored
from finetune_trainer.distributed import RankContext
from finetune_trainer.engines.base import Engine, State

PROGRESS_FILE = "progress.json"


@dataclass
class TrainingState:
    """Where the loop is: everything beside tensors that an exact resume needs."""

    step: int = 0  # optimizer steps done
    tokens_seen: int = 0
    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    samples: list[SampleRecord] = field(default_factory=list)  # ``after`` is empty until the end
    attempts: list[dict[str, Any]] = field(default_factory=list)
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    stopped_early: bool = False
    seconds: float = 0.0  # of earlier attempts
    made_from: dict[str, str] = field(default_factory=dict)  # see inputs.py

    def to_json(self) -> dict[str, Any]:
        plain = {key: value for key, value in self.__dict__.items() if key not in _RECORDS}
        records = {key: [r.model_dump(by_alias=True) for r in getattr(self, key)] for key in _RECORDS}
        return {**plain, **records}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> TrainingState:
        """Also of a later version: what it added is left out."""
        values: dict[str, Any] = {known.name: data[known.name] for known in fields(cls) if known.name in data}
        for key, record in _RECORDS.items():
            values[key] = [record.model_validate(entry, extra="ignore") for entry in data[key]]
        return cls(**values)


_RECORDS: dict[str, Any] = {"steps": StepRecord, "evaluations": EvaluationRecord, "samples": SampleRecord}


@dataclass(frozen=True)
class SavedCheckpoint:
    """What the loop tells its launcher about a checkpoint."""

    step: int
    uri: str
    seconds: float
    bytes: int
    saved_at: float  # unix seconds


class Checkpointer:
    """Saves and restores one engine's state; every method is collective."""

    def __init__(self, store: CheckpointStore, context: RankContext, work_directory: Path) -> None:
        self.store, self.context = store, context
        self.best = store.child("best/")
        self.staging = work_directory / "checkpoint-staging" / str(context.rank)
        self.restored_directory = work_directory / "restored"
        self.damaged: Mapping[int, str] = {}  # see Restored; rank 0's prunes

    def save(self, engine: Engine, state: TrainingState, store: CheckpointStore | None = None) -> SavedCheckpoint:
        """Write every rank's part, then the manifest, then prune. ``store``: ``best`` for a best one."""
        store, started = store or self.store, time.monotonic()
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)
        files = self._write_part(engine)
        if self.context.is_first:
            path = self.staging / PROGRESS_FILE
            path.write_text(json.dumps(state.to_json()))
            files[PROGRESS_FILE] = path
        parts = self.context.together(lambda: store.upload(state.step, files))
        entries: list[FileEntry] = [entry for part in parts for entry in part]
        self.context.together(lambda: self._commit(store, state, entries, engine) if self.context.is_first else None)
        shutil.rmtree(self.staging, ignore_errors=True)
        size = sum(entry.bytes for entry in entries)
        return SavedCheckpoint(state.step, store.uri(state.step), time.monotonic() - started, size, time.time())

    def newest(self) -> Restored | None:
        """The newest whole checkpoint, on this node's disk; None where there is none. The same on every rank."""
        found = self.context.together(
            lambda: self.store.newest(self.restored_directory) if self.context.is_first else None
        )[0]
        if found is None:
            return None
        self.damaged = found.damaged
        self._fetch_on_other_nodes(self.store, found.manifest.step, self.restored_directory)
        return Restored(found.manifest, self.restored_directory, found.skipped, found.damaged)

    def saved_before(self, restored: Restored) -> SavedCheckpoint:
        """What was said when ``restored`` was saved, as far as its manifest knows."""
        manifest = restored.manifest
        size = sum(entry.bytes for entry in manifest.files)
        saved_at = datetime.fromisoformat(manifest.saved_at).timestamp()
        return SavedCheckpoint(manifest.step, self.store.uri(manifest.step), 0.0, size, saved_at)

    def fetch(self, store: CheckpointStore, step: int, directory: Path) -> CheckpointManifest | None:
        """One checkpoint onto rank 0's disk (for export)."""
        return self.context.together(lambda: store.fetch(step, directory) if self.context.is_first else None)[0]

    def _fetch_on_other_nodes(self, store: CheckpointStore, step: int, directory: Path) -> None:
        other = self.context.is_first_on_node and not self.context.is_first
        self.context.together(lambda: store.fetch(step, directory) if other else None)

    def _commit(self, store: CheckpointStore, state: TrainingState, entries: list[FileEntry], engine: Engine) -> None:
        fields = {
            "epoch": 0.0 if engine.plan.steps_per_epoch is None else state.step / engine.plan.steps_per_epoch,
            "samples_seen": state.step * engine.plan.global_batch_size,
            "tokens_seen": state.tokens_seen,
            "world_size": self.context.world_size,
            "strategy": engine.plan.strategy.label,
            "state": engine.scaler_state(),
        }
        store.commit(state.step, entries, fields)
        if store is self.store:
            store.prune(state.step, self.damaged)
        if state.best_step is not None:
            self._prune_best(state.best_step)

    def _prune_best(self, best_step: int) -> None:
        """Keep what any regular checkpoint names, for a resume leads back to it, and later ones (another attempt's)."""
        older = [step for step in self.best.steps() if step < best_step]
        if not older:
            return
        try:
            told = [json.loads(self.store.read(step, "progress")) for step in self.store.candidates()]
        except (ObjectNotFound, DamagedBundle, ValueError):
            return  # what that one names must stay; the next commit asks again
        named = {progress.get("best_step") for progress in told}
        self.best.remove(step for step in older if step not in named)

    def _write_part(self, engine: Engine) -> dict[str, Path]:
        from safetensors.torch import save_file

        part: State = {}
        loads = [0] * self.context.world_size
        for name, parameter in engine.trainable():
            owner = loads.index(min(loads))
            loads[owner] += full_numel(parameter)
            tensors = engine.export(name, parameter, keep=owner == self.context.rank)
            part.update({f"{name}/{key}": tensor.contiguous() for key, tensor in tensors.items()})
        self._check_state(part)
        file = f"state-{self.context.rank:05d}-of-{self.context.world_size:05d}.safetensors"
        save_file(part, self.staging / file)
        return {file: self.staging / file}

    def _check_state(self, part: State) -> None:
        """Every parameter has optimizer state or (before a first update) none has: nothing is lost in silence.

        Which kinds of state a parameter has may depend on its shape (Adafactor, 8-bit AdamW).
        """
        kinds: dict[str, set[str]] = {}
        for key in part:
            name, _, kind = key.rpartition("/")
            kinds.setdefault(name, set()).add(kind)
        bare = sorted(name for name, found in kinds.items() if found == {"weight"})
        counts = self.context.gather((len(bare), len(kinds), bare[:1]))
        without, every = sum(count for count, _, _ in counts), sum(count for _, count, _ in counts)
        first = next((names[0] for _, _, names in counts if names), "")
        assert without in (0, every), f"{without} of {every} parameters have no optimizer state, first {first}"


class CheckpointReader:
    """Tensors of a checkpoint on local disk, read one at a time."""

    def __init__(self, directory: Path) -> None:
        from safetensors import safe_open

        self.progress = TrainingState.from_json(json.loads(_progress_file(directory).read_text()))
        self._handles = [safe_open(path, framework="pt") for path in sorted(directory.glob("*.safetensors"))]
        self._where = {key: handle for handle in self._handles for key in handle.keys()}  # noqa: SIM118
        self._keys: dict[str, list[str]] = {}
        for key in self._where:
            name, _, kind = key.rpartition("/")
            self._keys.setdefault(name, []).append(kind)

    @property
    def names(self) -> list[str]:
        """Names of the trainable parameters, sorted."""
        return sorted(self._keys)

    def state(self, name: str) -> State:
        """Weight and optimizer state of one parameter."""
        if name not in self._keys:
            raise CheckpointError(
                f"The checkpoint has no parameter '{name}'; it was written by another method or model."
            )
        return {kind: self._where[f"{name}/{kind}"].get_tensor(f"{name}/{kind}") for kind in self._keys[name]}

    def weight(self, name: str) -> torch.Tensor:
        """The fp32 weight of one parameter."""
        key = f"{name}/weight"
        if key not in self._where:
            raise CheckpointError(
                f"The checkpoint has no parameter '{name}'; it was written by another method or model."
            )
        return self._where[key].get_tensor(key)


def _progress_file(directory: Path) -> Path:
    old = directory / PROGRESS_FILE  # checkpoints of before the names told the content
    return old if old.exists() else next(directory.glob("progress-*.json"))


def full_numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter (ZeRO-3 placeholders are empty)."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))
