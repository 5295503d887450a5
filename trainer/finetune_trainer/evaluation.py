"""Validation loss over all ranks."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from finetune_api.report import EvaluationRecord
from finetune_trainer.data import Batch, TokenDataset, collate, deal
from finetune_trainer.distributed import RankContext
from finetune_trainer.engines.base import Engine


def evaluate(engine: Engine, dataset: TokenDataset, context: RankContext, step: int) -> EvaluationRecord:
    """Mean token loss over the whole split, weighted by tokens; the same for every world size. Collective."""
    started = time.monotonic()
    rows = np.arange(len(dataset), dtype=np.int64)
    micro_batches = deal(rows, dataset.lengths, context.world_size, engine.plan.micro_batch_size)[context.rank]
    loss = torch.zeros((), dtype=torch.float64, device=context.device)
    correct = torch.zeros((), dtype=torch.int64, device=context.device)
    for indices in micro_batches:
        # a rank without a row still takes part in the engine's collectives
        chosen = indices if len(indices) else rows[:1]
        output = engine.evaluate(to_device(collate([dataset[int(i)] for i in chosen]), context.device))
        if len(indices):
            loss += output.loss.double()
            correct += output.correct
    total, right = context.all_reduce_sum([float(loss), float(correct)])
    supervised = int(dataset.supervised.sum())
    return EvaluationRecord(
        step=step,
        loss=total / supervised,
        token_accuracy=right / supervised,
        supervised_tokens=supervised,
        seconds=time.monotonic() - started,
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch's tensors on ``device``."""
    if device.type == "cpu":
        return batch
    move: Any = lambda tensor: tensor.pin_memory().to(device, non_blocking=True)  # noqa: E731
    return Batch(
        input_ids=move(batch.input_ids),
        position_ids=move(batch.position_ids),
        labels=move(batch.labels),
        cumulative_lengths=move(batch.cumulative_lengths),
        longest_segment=batch.longest_segment,
    )
