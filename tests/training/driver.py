"""Runs several jobs one after the other in one torchrun process group (imports cost more than the jobs)."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from finetune_api.errors import FineTuneError
from finetune_api.report import EvaluationRecord
from finetune_trainer import recipe
from finetune_trainer.data import TokenDataset
from finetune_trainer.distributed import RankContext, join_process_group
from finetune_trainer.engines.base import Engine
from finetune_trainer.evaluation import evaluate
from finetune_trainer.progress import HeartbeatWriter
from finetune_trainer.recipe import Interrupted, train
from finetune_trainer.worker_config import WorkerConfig


class StopAt:
    """Stands where SIGTERM's flag stands; set on the last rank only, so that the ranks have to agree."""

    requested = False


class Heartbeat(HeartbeatWriter):
    def arm(self, step: int | None, stop: StopAt) -> None:
        self.stop_step, self.stop = step, stop

    def update(self, **fields: Any) -> None:
        super().update(**fields)
        if self.stop_step is not None and fields.get("step") == self.stop_step - 1:
            self.stop.requested = True


def run(config: WorkerConfig, context: RankContext, cut: int | None) -> None:
    stop = StopAt()
    heartbeat = Heartbeat(Path(config.trainer.work_directory), context.rank, context.local_rank)
    heartbeat.arm(cut if context.rank == context.world_size - 1 else None, stop)
    train(config, context, heartbeat, stop)  # type: ignore[arg-type]


def rig_evaluation(losses: dict[str, float] | None) -> None:
    """Let the validation loss of each step be this one."""

    def rigged(engine: Engine, dataset: TokenDataset, context: RankContext, step: int) -> EvaluationRecord:
        record = evaluate(engine, dataset, context, step)
        return record.model_copy(update={"loss": losses[str(step)]}) if losses else record

    recipe.evaluate = rigged


def fail(config: WorkerConfig, context: RankContext) -> None:
    """The job has to end in an error meant for a user; leaves it for the test to read."""
    try:
        run(config, context, None)
    except FineTuneError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        path = Path(config.trainer.work_directory) / f"failure-{context.rank}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([type(error).__name__, str(error)]))
    else:
        raise AssertionError("the job did not fail")


def main() -> None:
    context = join_process_group("cpu", 120)
    for parcel in json.loads(Path(sys.argv[1]).read_text()):
        config = WorkerConfig.model_validate(parcel["config"])
        print(f"== {parcel['tag']}", flush=True)
        rig_evaluation(parcel["losses"])
        if parcel["cut"] is not None:
            try:
                run(config, context, parcel["cut"])
            except Interrupted as interrupted:
                print(interrupted, flush=True)
            else:
                raise AssertionError(f"{parcel['tag']}: not interrupted at step {parcel['cut']}")
        if parcel["fails"]:
            fail(config, context)
        elif not parcel["stop_after_cut"]:
            run(config, context, None)
        context.barrier()


if __name__ == "__main__":
    try:
        main()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    os._exit(0)
