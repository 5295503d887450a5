"""What the loop costs: the recipe's step and a bare PyTorch step take turns on the same model, optimizer and batches.

The bare step is forward, backward, clip, update: no schedule, no heartbeat, no record, no guard against NaN. Both use
the same model code and the same engine-free forward of one process. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import median

import torch

from finetune_api.trainer_config import TrainerConfig
from finetune_trainer.data import collate, deal
from finetune_trainer.distributed import join_process_group
from finetune_trainer.launcher import read_config
from finetune_trainer.preparation import prepare_node
from finetune_trainer.progress import HeartbeatWriter, StopSignal
from finetune_trainer.recipe import Run
from finetune_trainer.status import LauncherStatus


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True)
    config: TrainerConfig = read_config(parser.parse_args().config)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = config.rendezvous.endpoint.rpartition(":")[2]
    worker = prepare_node(config, LauncherStatus(config.job, 0, Path(config.work_directory)))
    work = Path(config.work_directory)
    (work / "ranks").mkdir(parents=True, exist_ok=True)
    context = join_process_group("cpu", 60)
    run = Run(worker, context, HeartbeatWriter(work, 0, 0), StopSignal())
    run.load()
    run.check_and_measure_base()
    recipe_seconds, bare_seconds = [], []
    while run.state.step < run.total_steps:
        index = run.state.step
        turns = [(run.step, recipe_seconds), (lambda at=index: bare_step(run, at), bare_seconds)]
        for step, seconds in turns if index % 2 else reversed(turns):
            started = time.perf_counter()
            step()
            seconds.append(time.perf_counter() - started)
    skipped = 2  # warm-up
    pairs = list(zip(recipe_seconds, bare_seconds, strict=True))[skipped:]
    ratio = median(ours / bare for ours, bare in pairs)
    total = sum(ours for ours, _ in pairs) / sum(bare for _, bare in pairs)
    json.dump(
        {"steps": len(pairs), "medianRatio": ratio, "totalRatio": total, "bare": median(bare_seconds)}, sys.stdout
    )
    sys.stdout.flush()
    os._exit(0)


def bare_step(run: Run, step: int) -> None:
    """The least that trains: the rows of ``step``, the same micro-batches."""
    rows = run.stream.batch(step)
    supervised = int(run.data.train.supervised[rows].sum())
    optimizer = run.engine.optimizer
    for indices in deal(rows, run.data.train.lengths, 1, run.plan.micro_batch_size)[0]:
        batch = collate([run.data.train[int(index)] for index in indices])
        with run.engine.autocast():
            output = run.loaded.module(batch)
        (output.loss / supervised).backward()
    torch.nn.utils.clip_grad_norm_([p for _, p in run.engine.trainable()], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
