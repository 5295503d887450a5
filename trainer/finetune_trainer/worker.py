"""One rank: ``python -m finetune_trainer.worker <worker.json>`` under torchrun's environment."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

from finetune_api.errors import FineTuneError
from finetune_api.exits import ExitClass
from finetune_api.report import Phase, RankEnd
from finetune_trainer.progress import HeartbeatWriter, StopSignal, write_atomically
from finetune_trainer.worker_config import WorkerConfig


def main() -> int:
    """Train on this rank; the exit code is that of the end's class, told in ``<work>/ranks/<rank>.end.json``."""
    stop = StopSignal()
    config = WorkerConfig.model_validate_json(Path(sys.argv[1]).read_text())
    work = Path(config.trainer.work_directory)
    rank = int(os.environ["RANK"])
    heartbeat = HeartbeatWriter(work, rank, int(os.environ["LOCAL_RANK"]))
    try:
        _train(config, heartbeat, stop)
        end = RankEnd(rank=rank, exit_class=ExitClass.COMPLETED, step=heartbeat.latest.step, phase=Phase.DONE)
    except BaseException as error:
        end = _end_of(error, heartbeat)
        if end.exit_class is not ExitClass.INTERRUPTED:
            print(end.traceback or end.message, file=sys.stderr, flush=True)
    heartbeat.end(end)
    # A process group whose peers are gone would block interpreter shutdown; everything of value is on disk.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(end.exit_class.code)


def _train(config: WorkerConfig, heartbeat: HeartbeatWriter, stop: StopSignal) -> None:
    import torch
    import torch.distributed as dist

    from finetune_trainer.distributed import join_process_group
    from finetune_trainer.recipe import train

    job = config.trainer
    torch.backends.cuda.matmul.allow_tf32 = False  # FP32 means FP32
    heartbeat.update(phase=Phase.RENDEZVOUS)
    context = join_process_group(job.plan.device, job.collective_timeout_seconds)
    result = train(config, context, heartbeat, stop)
    if result is not None:
        write_atomically(Path(job.work_directory) / "result.json", result)
    dist.barrier()
    dist.destroy_process_group()


def _end_of(error: BaseException, heartbeat: HeartbeatWriter) -> RankEnd:
    exit_class, hint = classify(error)
    told = isinstance(error, FineTuneError)
    return RankEnd(
        rank=heartbeat.latest.rank,
        exit_class=exit_class,
        step=heartbeat.latest.step,
        phase=heartbeat.latest.phase,
        message=str(error) or type(error).__name__,
        hint=hint,
        exception=type(error).__name__,
        traceback="" if told or exit_class is ExitClass.INTERRUPTED else "".join(traceback.format_exception(error)),
    )


def classify(error: BaseException) -> tuple[ExitClass, str]:
    """Exit class and hint of whatever ended a rank."""
    import torch
    import torch.distributed as dist

    from finetune_trainer.recipe import Interrupted

    if isinstance(error, Interrupted | KeyboardInterrupt):
        return ExitClass.INTERRUPTED, ""
    if isinstance(error, FineTuneError):
        return error.exit_class, error.hint
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return ExitClass.OUT_OF_MEMORY, "Lower spec.training.microBatchSize or shard over more ranks."
    text = str(error).lower()
    if isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and any(word in text for word in ("gloo", "nccl", "connection closed by peer", "connection reset", "timed out"))
    ):
        return ExitClass.COMMUNICATION_FAILED, "A peer was lost; look at the rank that ended first."
    return ExitClass.INTERNAL_ERROR, "This is a defect of the trainer; report it with the log."


if __name__ == "__main__":
    sys.exit(main())
