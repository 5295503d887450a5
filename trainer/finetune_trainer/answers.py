"""A few validation prompts answered in words, before and after: what people look at first."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from finetune_api.report import SampleRecord
from finetune_trainer.data import PreparedData, Sample, collate
from finetune_trainer.distributed import RankContext
from finetune_trainer.engines.base import Engine
from finetune_trainer.evaluation import to_device
from finetune_trainer.worker_config import WorkerConfig

NEW_TOKENS = 48
_MAXIMUM_PROMPT = 512  # tokens; longer prompts are left out of the samples


def answers_before(
    engine: Engine, data: PreparedData, context: RankContext, config: WorkerConfig
) -> list[SampleRecord]:
    """The base model's answers to a few validation prompts. Collective."""
    chosen = [sample for sample in data.samples if 0 < len(sample["prompt_ids"]) <= _MAXIMUM_PROMPT]
    texts = _answer_texts(engine, [sample["prompt_ids"] for sample in chosen], context, config)
    return [
        SampleRecord(prompt=sample["prompt"], reference=sample["reference"], before=text, after="")
        for sample, text in zip(chosen, texts, strict=True)
    ]


def answers_after(
    engine: Engine, data: PreparedData, context: RankContext, config: WorkerConfig, before: list[SampleRecord]
) -> list[SampleRecord]:
    """The same prompts answered by the model as it is now. Collective."""
    prompts = {sample["prompt"]: sample["prompt_ids"] for sample in data.samples}
    texts = _answer_texts(engine, [prompts[record.prompt] for record in before], context, config)
    return [record.model_copy(update={"after": text}) for record, text in zip(before, texts, strict=True)]


def _answer_texts(engine: Engine, prompts: list[list[int]], context: RankContext, config: WorkerConfig) -> list[str]:
    if not prompts:
        return []
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.model_directory)
    ends = {tokenizer.eos_token_id}
    generation = Path(config.model_directory) / "generation_config.json"
    if generation.exists():
        declared = json.loads(generation.read_text()).get("eos_token_id")
        ends.update(declared if isinstance(declared, list) else [declared])
    answers = answer(engine, prompts, context, {token for token in ends if token is not None})
    return [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in answers]


def answer(engine: Engine, prompts: list[list[int]], context: RankContext, end_tokens: set[int]) -> list[list[int]]:
    """Greedy answers of at most 48 tokens, without a cache: every rank computes the same, so any engine can do it."""
    rows = [list(prompt) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    for _ in range(NEW_TOKENS):
        batch = collate([_prompt_sample(row) for row in rows])
        logits = engine.evaluate(to_device(batch, context.device), last_token=True)  # (S, V)
        chosen = context.broadcast(logits.argmax(-1).tolist())
        for i, token in enumerate(chosen):
            if done[i]:
                continue
            if token in end_tokens:
                done[i] = True
            else:
                rows[i].append(token)
                answers[i].append(token)
        if all(done):
            break
    return answers


def _prompt_sample(tokens: list[int]) -> Sample:
    ids = np.asarray(tokens, dtype=np.int32)
    return Sample(ids, np.full_like(ids, -100), np.asarray([len(ids)], dtype=np.int32))
