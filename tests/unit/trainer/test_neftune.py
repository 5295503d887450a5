"""NEFTune's noise is that of the sample: alpha / sqrt(length * dimension), whatever travels with it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.builders import build_model

from finetune_trainer import attention
from finetune_trainer.data import collate
from finetune_trainer.data.dataset import Sample
from finetune_trainer.losses.causal_lm import HeadOptions
from finetune_trainer.model import CausalLMForTraining

ALPHA = 5.0
LENGTHS = (12, 100, 25, 60, 9, 48, 33, 80)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> CausalLMForTraining:
    from transformers import AutoModelForCausalLM

    attention.register()
    directory: Path = build_model(tmp_path_factory.mktemp("model"))
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation=attention.IMPLEMENTATION
    )
    return CausalLMForTraining(model, HeadOptions(), ALPHA).train()


def row(*lengths: int) -> Sample:
    ids = np.arange(sum(lengths), dtype=np.int32) % 50
    labels = ids.copy()
    labels[np.cumsum([0, *lengths[:-1]])] = -100
    return Sample(ids, labels, np.array(lengths, dtype=np.int32))


def largest_noise(trainer: CausalLMForTraining, samples: list[Sample]) -> list[float]:
    """Of each segment's noise in one micro-batch of a training step."""
    seen: list[torch.Tensor] = []
    embeddings: Any = trainer.model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _module, _inputs, output: seen.append(output.detach()))
    batch = collate(samples)
    torch.manual_seed(0)
    try:
        trainer(batch).loss.backward()
    finally:
        handle.remove()
    noise = (seen[0] - embeddings.weight.detach()[batch.input_ids]).abs()[0]  # (T, D)
    return [float(noise[a:b].max()) for a, b in itertools.pairwise(batch.cumulative_lengths.tolist())]


def test_a_row_has_the_same_noise_alone_in_a_micro_batch_and_packed(trainer: CausalLMForTraining) -> None:
    width = trainer.model.config.hidden_size
    bounds = [ALPHA / (length * width) ** 0.5 for length in LENGTHS]
    found = {
        "alone": [largest_noise(trainer, [row(length)])[0] for length in LENGTHS],
        "micro-batch of 8": largest_noise(trainer, [row(length) for length in LENGTHS]),
        "packed": largest_noise(trainer, [row(*LENGTHS)]),
        "packed in a micro-batch": largest_noise(trainer, [row(*LENGTHS[:3]), row(*LENGTHS[3:])]),
    }
    for how, largest in found.items():
        for length, noise, bound in zip(LENGTHS, largest, bounds, strict=True):
            assert 0.98 * bound <= noise <= 1.0001 * bound, f"{how}, {length} tokens: {noise} of {bound}"


def test_an_evaluation_has_no_noise(trainer: CausalLMForTraining) -> None:
    batch = collate([row(40)])
    losses = []
    for _ in range(2):
        with torch.no_grad():
            losses.append(float(trainer(batch).loss))
    assert losses[0] == losses[1]
