"""The training recipe, top to bottom: load, resume, check, train, evaluate, checkpoint, publish."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune_api.digest import training_digest
from finetune_api.errors import NumericalError
from finetune_api.plan import Plan
from finetune_api.report import JobResult, Phase, StepRecord
from finetune_storage import ObjectStore
from finetune_trainer import inputs, selfcheck
from finetune_trainer.answers import answers_after, answers_before
from finetune_trainer.checkpoint import Checkpointer, CheckpointReader, SavedCheckpoint, TrainingState
from finetune_trainer.checkpoint_store import CheckpointStore
from finetune_trainer.data import PreparedData, SampleStream, collate, deal
from finetune_trainer.distributed import RankContext
from finetune_trainer.engines import make_engine
from finetune_trainer.evaluation import evaluate, to_device
from finetune_trainer.loading import LoadedModel, load_model
from finetune_trainer.memory import memory_bytes, peak_memory_bytes
from finetune_trainer.optimizers import optimizer_factory
from finetune_trainer.progress import HeartbeatWriter, StopSignal
from finetune_trainer.schedules import learning_rate_factor
from finetune_trainer.seeding import seed_for
from finetune_trainer.throughput import FlopCounter, peak_flops
from finetune_trainer.worker_config import WorkerConfig


class Interrupted(Exception):
    """A stop was asked for; a checkpoint was written unless the policy says not to."""


def train(config: WorkerConfig, context: RankContext, heartbeat: HeartbeatWriter, stop: StopSignal) -> JobResult | None:
    """Run the job to its end on this rank. Rank 0 returns the result.

    Raises Interrupted after SIGTERM, and the user errors of ``finetune_api.errors``.
    """
    run = Run(config, context, heartbeat, stop)
    run.load()
    run.check_and_measure_base()
    while run.state.step < run.total_steps and not run.state.stopped_early:
        run.step()
        run.evaluate_when_due()
        run.checkpoint_when_due()
        run.stop_when_asked()
    run.finish_training()
    return run.publish()


@dataclass
class StepSums:
    """What one rank adds up over the micro-batches of a step."""

    loss: torch.Tensor
    worst: list[tuple[str, float]]  # rows with a loss that is not finite


class Run:
    """The state of one rank's run; each method is one line of ``train``."""

    def __init__(
        self, config: WorkerConfig, context: RankContext, heartbeat: HeartbeatWriter, stop: StopSignal
    ) -> None:
        self.config, self.context, self.heartbeat, self.stop = config, context, heartbeat, stop
        self.job, self.spec, self.plan = config.trainer, config.trainer.spec, config.trainer.plan
        assert self.plan.total_steps is not None
        self.total_steps = self.plan.total_steps
        self.data = PreparedData.open(config.data_directory)
        packed = self.spec.dataset.packing
        self.stream = SampleStream(
            self.data.train.lengths, self.spec.training.seed, self.plan.global_batch_size, group_by_length=not packed
        )
        output = self.spec.output.model_copy(update={"uri": self.plan.checkpoint_prefix})
        store = CheckpointStore(
            ObjectStore.open_location(output), training_digest(self.spec), self.spec.checkpoint.keep
        )
        self.checkpointer = Checkpointer(store, context, Path(self.job.work_directory))
        self.state = TrainingState()
        self.loaded: LoadedModel
        self.started = time.monotonic()
        self.last_checkpoint_at = time.monotonic()
        self.saved: SavedCheckpoint | None = None
        self.data_wait_seconds = 0.0
        self.recent: list[tuple[int, float]] = []

    # -- before the first step ---------------------------------------------------------------------------------------
    def load(self) -> None:
        """Newest whole checkpoint, model unit by unit, tuner, engine, optimizer."""
        self.heartbeat.update(phase=Phase.LOADING_MODEL, total_steps=self.total_steps)
        restored = self.checkpointer.newest()
        reader = CheckpointReader(restored.directory) if restored else None
        made_from = inputs.made_from(self.config, self.data)
        inputs.check_ranks_agree(made_from, self.context.gather)
        if restored and reader:
            uri = self.checkpointer.store.uri(restored.manifest.step)
            inputs.check_unchanged(uri, reader.progress.made_from, made_from)
        self.engine = make_engine(self.plan, self.spec, self.context)
        self.loaded = load_model(self.config, self.engine, self.context.device, reader)
        self.engine.setup(self.loaded.module, self.loaded.rules, optimizer_factory(self.spec, self.plan.strategy.type))
        if restored and reader:
            self.engine.restore(reader.state)
            self.engine.load_scaler_state(restored.manifest.state)
            self.state = reader.progress
            self.saved = self.checkpointer.saved_before(restored)
            place = self.checkpointer.store.uri(self.state.step)
            self._say(f"resuming from step {self.state.step} of {self.total_steps} ({place})")
            for sentence in restored.skipped:
                self._say(sentence)
            self._note_attempt({"resumedFromStep": self.state.step, "skipped": list(restored.skipped)})
        self.state.made_from = made_from
        self.heartbeat.update(step=self.state.step, resumed_from_step=self.state.step)
        self.flops = FlopCounter(self.loaded.module.model, self.plan.method, self.loaded.sizes, set(self.loaded.rules))
        self.peak_flops = peak_flops(self.context.device)

    def check_and_measure_base(self) -> None:
        """Step-0 self-check on every rank, then the base model's validation loss."""
        first = to_device(collate([self.data.train[0]]), self.context.device)
        selfcheck.check_head(self.loaded.module.model, self.engine, first, self.context)
        if self.spec.dataset.packing or self.plan.micro_batch_size > 1:
            selfcheck.check_isolation(self.loaded.module.model, self.engine, self.data, self.context.device)
        facts = selfcheck.inspect_rank(self.engine, self.data, self.context, self.loaded.weights)
        self.self_check = self.context.gather(facts)
        selfcheck.compare_with_plan(self.plan, self.self_check)
        self._say(_summary(self.plan, self.self_check[0]))
        if self.state.step == 0 and not self.state.evaluations:
            self._evaluate()
            self.state.samples = answers_before(self.engine, self.data, self.context, self.config)
        self.heartbeat.update(phase=Phase.TRAINING, step=self.state.step)

    # -- one optimizer step ------------------------------------------------------------------------------------------
    def step(self) -> None:
        """Forward and backward over this rank's micro-batches, one update, one record."""
        started = time.monotonic()
        step, training = self.state.step, self.spec.training
        rows = self.stream.batch(step)
        tokens, supervised = int(self.data.train.lengths[rows].sum()), int(self.data.train.supervised[rows].sum())
        micro_batches = deal(rows, self.data.train.lengths, self.context.world_size, self.plan.micro_batch_size)[
            self.context.rank
        ]
        learning_rate = training.learning_rate * learning_rate_factor(
            training.schedule, step, self.total_steps, self.plan.warmup_steps or 0
        )
        self.engine.set_learning_rate(learning_rate)
        losses, squares = [], 0.0
        for number, indices in enumerate(micro_batches):
            waited = time.monotonic()
            samples = [self.data.train[int(i)] for i in indices]
            batch = to_device(collate(samples), self.context.device)
            self.data_wait_seconds += time.monotonic() - waited
            squares += sum(float((s.segment_lengths.astype("float64") ** 2).sum()) for s in samples)
            torch.manual_seed(seed_for(training.seed, step, self.context.rank, number))
            # the mean over the supervised tokens of the whole global batch, whatever the split
            output = self.engine.forward_backward(batch, 1.0 / supervised, boundary=number == len(micro_batches) - 1)
            losses.append(output.loss)
        if step == 0:
            selfcheck.check_gradients(self.engine, self.context)
        local = torch.stack(losses).double().tolist()
        total, squares, self.stop_votes = self.context.all_reduce_sum([sum(local), squares, float(self.stop.requested)])
        self._guard_finite(total, local, micro_batches, "loss")
        may_skip = self.engine.may_skip()
        norm = self.engine.step(training.max_gradient_norm)
        if not may_skip:
            self._guard_finite(norm, local, micro_batches, "gradient norm")
        seconds = time.monotonic() - started
        self._record(total / supervised, learning_rate, norm, (tokens, supervised, seconds, squares))

    def _guard_finite(self, value: float, local: list[float], rows: list[Any], what: str) -> None:
        if math.isfinite(value):
            return
        bad = [int(i) for loss, part in zip(local, rows, strict=True) if not math.isfinite(loss) for i in part]
        everyone = [row for found in self.context.gather(bad) for row in found]
        names = ", ".join(self.data.train.origin(row) for row in everyone[:4]) or "not one sample alone"
        more = f" and {len(everyone) - 4} more rows" if len(everyone) > 4 else ""
        raise NumericalError(
            f"step {self.state.step + 1}: the {what} is {value}; samples: {names}{more}.",
            hint="Lower spec.training.learningRate, use precision BF16 instead of FP16, or look at these samples.",
        )

    def _record(self, loss: float, learning_rate: float, norm: float, work: tuple[int, int, float, float]) -> None:
        tokens, supervised, seconds, squares = work
        state = self.state
        state.step += 1
        state.tokens_seen += tokens
        memory = memory_bytes(self.context.device)
        state.steps.append(
            StepRecord(
                step=state.step,
                loss=loss,
                learning_rate=learning_rate,
                gradient_norm=norm if math.isfinite(norm) else None,
                tokens=tokens,
                supervised_tokens=supervised,
                seconds=seconds,
                memory_bytes=memory,
            )
        )
        self.recent = [*self.recent[-9:], (tokens, seconds)]
        speed = sum(t for t, _ in self.recent) / max(1e-9, sum(s for _, s in self.recent))
        utilization = None
        if self.peak_flops:
            utilization = self.flops.step(squares, tokens) / (seconds * self.peak_flops * self.context.world_size)
        self.heartbeat.update(
            phase=Phase.TRAINING,
            step=state.step,
            epoch=state.step / (self.plan.steps_per_epoch or self.total_steps),
            loss=loss,
            learning_rate=learning_rate,
            gradient_norm=norm,
            tokens_total=state.tokens_seen,
            tokens_per_second=speed,
            step_seconds=seconds,
            data_wait_seconds=self.data_wait_seconds,
            model_flops_utilization=utilization,
            memory_bytes=memory,
            peak_memory_bytes=peak_memory_bytes(self.context.device),
        )
        every = max(1, self.total_steps // 100)
        if state.step % every == 0 or state.step == 1:
            self._say(
                f"step {state.step}/{self.total_steps}  loss {loss:.4f}  learning rate {learning_rate:.3g}  "
                f"gradient norm {norm:.3g}  {speed:,.0f} tokens/s"
            )

    # -- between steps -----------------------------------------------------------------------------------------------
    def evaluate_when_due(self) -> None:
        """Validation loss every ``evaluateEverySteps`` and at the end; keeps the best and stops early when asked to."""
        every = self.spec.training.evaluate_every_steps
        at_end = self.state.step == self.total_steps
        if self.data.validation is None or not (at_end or (every and self.state.step % every == 0)):
            return
        loss = self._evaluate()
        stopping = self.spec.training.early_stopping
        if stopping is None:
            return
        if self.state.best_loss is None or loss < self.state.best_loss - stopping.minimum_delta:
            self.state.best_loss, self.state.best_step = loss, self.state.step
            self.state.evaluations_without_gain = 0
            self.state.samples = answers_after(self.engine, self.data, self.context, self.config, self.state.samples)
            self._save(self.checkpointer.best)
        else:
            self.state.evaluations_without_gain += 1
            self.state.stopped_early = self.state.evaluations_without_gain >= stopping.patience

    def checkpoint_when_due(self) -> None:
        """Every ``everySteps`` steps or ``everyMinutes`` minutes, whichever comes first."""
        policy = self.spec.checkpoint
        due = policy.every_steps is not None and self.state.step % policy.every_steps == 0
        if policy.every_minutes is not None:
            late = time.monotonic() - self.last_checkpoint_at >= policy.every_minutes * 60
            due = self.context.broadcast(due or late) if self.context.world_size > 1 else due or late
        if due and self.state.step < self.total_steps:
            self._save()

    def stop_when_asked(self) -> None:
        """SIGTERM on any rank stops all of them at the same step, after a checkpoint."""
        if not self.stop_votes or self.state.step >= self.total_steps:
            return
        if self.spec.checkpoint.on_termination and (self.saved is None or self.saved.step != self.state.step):
            self._save()
        raise Interrupted(f"stopped at step {self.state.step} of {self.total_steps}")

    # -- the end -----------------------------------------------------------------------------------------------------
    def finish_training(self) -> None:
        """Answers of the tuned model, and a last checkpoint: what is published is what is checkpointed."""
        if self.state.best_step is None:
            self.state.samples = answers_after(self.engine, self.data, self.context, self.config, self.state.samples)
        if self.saved is None or self.saved.step != self.state.step:
            self._save()
        else:
            self._tell_of(self.saved)  # an attempt that resumed from it has not said so yet

    def publish(self) -> JobResult | None:
        """Export from the (best) checkpoint, verified in object storage, with report and model card."""
        self.heartbeat.update(phase=Phase.PUBLISHING)
        best = self.state.best_step
        store = self.checkpointer.best if best is not None else self.checkpointer.store
        directory = Path(self.job.work_directory) / "export-checkpoint"
        self.checkpointer.fetch(store, best if best is not None else self.state.step, directory)
        result, *_ = self.context.together(lambda: self._publish_from(directory) if self.context.is_first else None)
        self.heartbeat.update(phase=Phase.DONE)
        return result if self.context.is_first else None

    def _publish_from(self, directory: Path) -> JobResult:
        from finetune_trainer.publication import publish_job  # its libraries would delay the first step

        result = publish_job(self, directory)
        self._say(f"published {result.artifact_uri} (manifest sha256 {result.artifact_manifest_sha256})")
        return result

    # -- helpers -----------------------------------------------------------------------------------------------------
    def _note_attempt(self, attempt: dict[str, Any]) -> None:
        """Checkpoints carry the attempts before them; those that died without writing one stand in the work folder."""
        ledger = Path(self.job.work_directory) / "attempts.json"
        told = json.loads(ledger.read_text()) if ledger.exists() else []
        self.state.attempts = [*max(told, self.state.attempts, key=len), attempt]
        if self.context.is_first:
            partial = ledger.with_suffix(".partial")
            partial.write_text(json.dumps(self.state.attempts))
            partial.replace(ledger)

    def _evaluate(self) -> float:
        if self.data.validation is None:
            return math.nan
        self.heartbeat.update(phase=Phase.EVALUATING)
        record = evaluate(self.engine, self.data.validation, self.context, self.state.step)
        self.state.evaluations.append(record)
        self._say(f"step {record.step}  validation loss {record.loss:.4f}  token accuracy {record.token_accuracy:.3f}")
        self.heartbeat.update(phase=Phase.TRAINING, validation_loss=record.loss)
        return record.loss

    def _save(self, store: CheckpointStore | None = None) -> None:
        self.heartbeat.update(phase=Phase.CHECKPOINTING)
        self.state.seconds += time.monotonic() - self.started
        self.started = time.monotonic()
        saved = self.checkpointer.save(self.engine, self.state, store)
        if store is None:
            self.saved, self.last_checkpoint_at = saved, time.monotonic()
        self._say(f"checkpoint of step {saved.step}: {saved.uri} ({saved.bytes:,} bytes, {saved.seconds:.1f} s)")
        self._tell_of(saved)

    def _tell_of(self, saved: SavedCheckpoint) -> None:
        self.heartbeat.update(
            phase=Phase.TRAINING,
            checkpoint_step=saved.step,
            checkpoint_seconds=saved.seconds or None,
            checkpoint_bytes=saved.bytes,
            checkpoint_uri=saved.uri,
            checkpoint_saved_at=saved.saved_at,
        )

    def _say(self, text: str) -> None:
        if self.context.is_first:
            print(text, flush=True)


def _summary(plan: Plan, check: dict[str, Any]) -> str:
    batch = f"{plan.micro_batch_size} x {plan.gradient_accumulation_steps} x {plan.world_size}"
    stored = f"{check['quantizedBytes']:,} bytes, {check['quantizedBytesHere']:,} here"
    lines = {
        "strategy": f"{plan.strategy.label} on {plan.world_size} ranks ({check['device']})",
        "batch": f"{plan.global_batch_size} = {batch}",
        "steps": plan.total_steps,
        "precision": f"{plan.precision.value}, trainable {check['trainableType']}",
        "trainable parameters": f"{check['trainableParameters']:,}",
        "4-bit layers": f"{check['quantizedLayers']} ({stored})",
        "attention": check["attention"],
        "weights": check["weights"],
        "rows": f"{check['trainRows']:,}, {check['maskedTokenShare']:.1%} of tokens masked",
    }
    return "\n".join(f"  {key:22}{value}" for key, value in lines.items())
