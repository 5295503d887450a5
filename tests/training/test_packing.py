"""Packing changes how rows travel, not what is learned: every sample's loss is that of the sample alone."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.builders import write_jsonl
from tests.training.jobs import ENGINES, METHODS, Ground, Job, largest_difference

from finetune_api.errors import ModelError
from finetune_trainer import attention
from finetune_trainer.data import PreparedData, collate
from finetune_trainer.data.dataset import Sample
from finetune_trainer.losses.causal_lm import HeadOptions, LogitTransform
from finetune_trainer.model import CausalLMForTraining

PACKED = {"dataset": {"packing": True}}
TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", {}),
    "Llama with tied embeddings": ("llama", {"tie_word_embeddings": True}),
    "Mistral with a sliding window": ("mistral", {"sliding_window": 7}),
    "Qwen 2": ("qwen2", {}),
    "Qwen 3": ("qwen3", {"head_dim": 16}),
    "Gemma": ("gemma", {"head_dim": 16}),
    "Granite": ("granite", {"logits_scaling": 8.0, "attention_multiplier": 0.2}),
    "Cohere": ("cohere", {"logit_scale": 0.25}),
}


def build(name: str, implementation: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    attention.register()
    kind, more = ARCHITECTURES[name]
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **(TINY | more))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=implementation)


def trainers(name: str) -> CausalLMForTraining:
    model = build(name, attention.IMPLEMENTATION)
    options = HeadOptions(transform=LogitTransform.of(model.config.get_text_config()))
    return CausalLMForTraining(model, options).train()


def segments(row: Sample) -> list[tuple[int, int]]:
    return list(itertools.pairwise([0, *np.cumsum(row.segment_lengths).tolist()]))


def alone(model: Any, row: Sample, start: int, end: int) -> tuple[torch.Tensor, int]:
    """Sum of one sample's token losses, by plain transformers; and its correct tokens."""
    ids = torch.from_numpy(row.input_ids[start:end].astype("int64"))[None]
    labels = torch.from_numpy(row.labels[start:end].astype("int64"))[1:]
    logits = model(input_ids=ids).logits[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
    return loss, int((logits.argmax(-1) == labels).sum())


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    ground = Ground(tmp_path_factory.mktemp("packed"), rows=24)
    return ground.data(Job("packed", METHODS["Full"], ENGINES["DDP"], PACKED))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_packed_sample_has_the_loss_of_the_sample_alone(packed: PreparedData, name: str) -> None:
    ours, plain = trainers(name), build(name, "sdpa")
    assert max(len(segments(packed.train[row])) for row in range(len(packed.train))) >= 3
    for number in range(len(packed.train)):
        row = packed.train[number]
        for start, end in segments(row):
            labels = np.full_like(row.labels, -100)
            labels[start:end] = row.labels[start:end]
            with torch.no_grad():
                output = ours(collate([Sample(row.input_ids, labels, row.segment_lengths)]))
                expected, correct = alone(plain, row, start, end)
            supervised = int((labels != -100).sum())
            assert abs(float(output.loss) - float(expected)) / supervised <= 1e-5, f"row {number}: {start} to {end}"
            assert int(output.correct) == correct


@pytest.mark.parametrize("name", ["Llama", "Mistral with a sliding window", "Granite"])
def test_a_micro_batch_of_packed_rows_has_the_gradients_of_its_samples(packed: PreparedData, name: str) -> None:
    ours, plain = trainers(name), build(name, "sdpa").train()
    rows = [packed.train[number] for number in range(len(packed.train))]
    ours(collate(rows)).loss.backward()
    for row in rows:
        for start, end in segments(row):
            alone(plain, row, start, end)[0].backward()
    for (parameter_name, one), other in zip(ours.model.named_parameters(), plain.parameters(), strict=True):
        assert one.grad is not None, parameter_name
        assert other.grad is not None, parameter_name
        difference = float((one.grad - other.grad).abs().max() / other.grad.abs().max())
        assert difference <= 1e-5, f"{parameter_name}: {difference}"


def test_an_architecture_that_caps_its_attention_is_refused_not_computed_wrongly(packed: PreparedData) -> None:
    from transformers import AutoModelForCausalLM, Gemma2Config

    attention.register()
    config = Gemma2Config(**TINY, head_dim=16, sliding_window=7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention.IMPLEMENTATION)
    with pytest.raises(ModelError) as caught:
        CausalLMForTraining(model, HeadOptions())(collate([packed.train[0]]))
    assert str(caught.value) == (
        "model Gemma2Attention: its attention needs 'softcap', which packed attention does not compute; "
        "choose a base model without it"
    )


@pytest.mark.multiprocess
def test_packed_and_unpacked_jobs_that_see_the_same_samples_have_one_loss_curve(ground: Ground) -> None:
    def job(tag: str, method: str, packing: bool, batch: int) -> Job:
        training = {"maxSteps": 4, "globalBatchSize": batch, "microBatchSize": 1 if packing else 2}
        return Job(
            tag, METHODS[method], ENGINES["DDP"], {"training": {**BASE, **training}, "dataset": {"packing": packing}}
        )

    rows = len(ground.data(job("rows", "Full", True, 1)).train)
    assert 1 < rows < 30, "60 samples in fewer rows"
    jobs = [
        job(f"{method} {'packed' if packing else 'unpacked'}", method, packing, rows if packing else 60)
        for method in ("Full", "QLoRA")
        for packing in (True, False)
    ]
    done = ground.run(jobs, 1)
    for method in ("Full", "QLoRA"):
        one, other = done[f"{method} packed"], done[f"{method} unpacked"]
        assert largest_difference(one.losses, other.losses) <= 1e-5, method
        assert one.losses[-1] < one.losses[0] - 0.02, f"{method} learned nothing"
        tokens = [{step["supervisedTokens"] for step in outcome.report["steps"]} for outcome in (one, other)]
        assert tokens[0] == tokens[1]
        assert len(tokens[0]) == 1


BASE = {"precision": "FP32", "learningRate": 3e-3}


@pytest.mark.parametrize("packing", [True, False])
def test_only_the_assistants_tokens_carry_loss(tmp_path: Path, packing: bool) -> None:
    ground = Ground(tmp_path, rows=24)
    rows = [
        {
            "messages": [
                {"role": "system", "content": "be brief"},
                {"role": "user", "content": f"first question {number}"},
                {"role": "assistant", "content": f"first answer {number}"},
                {"role": "user", "content": "and then"},
                {"role": "assistant", "content": f"second answer {number}"},
            ]
        }
        for number in range(24)
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    learned = supervised_texts(ground, packing)
    assert sorted(learned) == sorted(f"first answer {n}<|im_end|>second answer {n}<|im_end|>" for n in range(24))


@pytest.mark.parametrize("packing", [True, False])
def test_only_the_completion_carries_loss(tmp_path: Path, packing: bool) -> None:
    ground = Ground(tmp_path, rows=24)
    rows = [{"prompt": f"question {n} is", "completion": f" answer {n}"} for n in range(24)]
    write_jsonl(tmp_path / "train.jsonl", rows)
    assert sorted(supervised_texts(ground, packing)) == sorted(f" answer {n}<|im_end|>" for n in range(24))


def test_a_token_that_spells_prompt_and_completion_carries_no_loss(tmp_path: Path) -> None:
    ground = Ground(tmp_path, rows=24)
    rows = [{"prompt": f"question {n} is ", "completion": f"answer {n}"} for n in range(24)]  # " answer" is one token
    write_jsonl(tmp_path / "train.jsonl", rows)
    assert sorted(supervised_texts(ground, True)) == sorted(f" {n}<|im_end|>" for n in range(24))


def supervised_texts(ground: Ground, packing: bool) -> list[str]:
    """What the tokens with loss spell, sample by sample."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ground.model)
    data = ground.data(Job("data", METHODS["Full"], ENGINES["DDP"], {"dataset": {"packing": packing}}))
    texts = []
    for number in range(len(data.train)):
        row = data.train[number]
        carries = row.labels != -100
        assert np.array_equal(row.labels[carries], row.input_ids[carries])
        for start, end in segments(row):
            assert row.labels[start] == -100
            texts.append(tokenizer.decode(row.labels[start:end][carries[start:end]].tolist()))
        assert int(carries.sum()) == int(data.train.supervised[number])
    return texts
