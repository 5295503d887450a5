"""The published directory, card included, is what PEFT loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from tests.builders import build_model

from finetune_api.plan import Facts
from finetune_api.planner import make_plan
from finetune_api.spec import FineTuneJobSpec
from finetune_api.trainer_config import JobIdentity, Rendezvous, TrainerConfig
from finetune_storage import ObjectStore, fetch_artifact
from finetune_trainer.model_card import model_card
from finetune_trainer.publish import ArtifactDescription, publish

IDENTITY = JobIdentity(name="answers", uid="u1")


def _config(
    lora: dict[str, Any] | None = None, method: str = "LoRA", uri: str = "hf://org/base@" + "0" * 40
) -> TrainerConfig:
    spec = FineTuneJobSpec.model_validate(
        {
            "model": {"uri": uri},
            "dataset": {"train": [{"uri": "file:///data.jsonl", "format": "Messages"}]},
            "method": {"type": method, **({"lora": lora} if lora else {})},
            "output": {"uri": "file:///out"},
        }
    )
    return TrainerConfig(
        job=IDENTITY,
        spec=spec,
        plan=make_plan(spec, Facts(), IDENTITY),
        rendezvous=Rendezvous(endpoint="127.0.0.1:1", minimum_nodes=1, maximum_nodes=1),
        work_directory="/work",
        cache_directory="/cache",
    )


def _description(config: TrainerConfig, **changes: Any) -> ArtifactDescription:
    fields: dict[str, Any] = {
        "job": {"namespace": "default", "name": "answers", "uid": "u1", "configDigest": "3" * 64},
        "format": config.plan.output_format.value,
        "base_model": {"uri": config.spec.model.uri, "revision": "0" * 40, "licence": "apache-2.0"},
        "dataset": {"digest": "2" * 64, "trainSamples": 90, "validationSamples": 10},
        "seed": 42,
        "config": {},
        "plan": {},
        "metrics": {"validationLoss": 1.25, "baseValidationLoss": 2.5},
        "versions": {"python": "3.11.9", "peft": "0.21.0"},
    }
    return ArtifactDescription(**{**fields, **changes})


def test_peft_loads_the_published_directory_as_it_is(tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = build_model(tmp_path / "base")
    tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    directory = tmp_path / "artifact"
    tuned.save_pretrained(directory)
    AutoTokenizer.from_pretrained(base).save_pretrained(directory)
    config = _config({"rank": 4})
    (directory / "README.md").write_text(model_card(config, _description(config)))
    store = ObjectStore.open(f"file://{tmp_path}/out")
    published = publish(store, directory, _description(config))
    fetch_artifact(store, tmp_path / "copy", manifest_sha256=published.manifest_sha256)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "copy")
    tokens = torch.arange(20).reshape(1, 20)
    torch.testing.assert_close(loaded(tokens).logits, tuned(tokens).logits, rtol=0, atol=0)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "copy")) == len(AutoTokenizer.from_pretrained(base))
    assert not torch.equal(loaded(tokens).logits, AutoModelForCausalLM.from_pretrained(base)(tokens).logits)


def test_the_card_has_front_matter_that_the_hub_reads() -> None:
    config = _config()
    card = model_card(config, _description(config))
    _, matter, text = card.split("---\n", 2)
    assert YAML(typ="safe").load(matter) == {
        "base_model": "org/base",
        "library_name": "peft",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["finetune-operator", "lora", "adapter"],
    }
    for expected in (
        f"A LoRA adapter for `org/base` at revision `{'0' * 40}`.",
        "| Validation loss of the base model | 2.5 |",
        "| Validation loss after training | 1.25 |",
        f"| digest | {'2' * 64} |",
        "| trainSamples | 90 |",
        "| Learning rate | 0.0002, Cosine |",
        'base = AutoModelForCausalLM.from_pretrained("org/base")',
        "vllm serve org/base --enable-lora --max-lora-rank 16 --lora-modules answers=DIRECTORY",
        f"configuration digest `{'3' * 64}`",
        "| peft | 0.21.0 |",
    ):
        assert expected in text


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        ({"rank": 9}, "--max-lora-rank 16 "),
        ({"rank": 200}, "--max-lora-rank 256 "),
        ({"rank": 1024}, "vLLM serves no adapter of rank 1024: merge the adapter first."),
        (
            {"useDora": True},
            "vLLM loads no DoRA weights and no fully trained modules beside LoRA: merge the adapter first.",
        ),
    ],
)
def test_the_card_says_how_vllm_can_serve_it(lora: dict[str, Any], expected: str) -> None:
    config = _config(lora)
    assert expected in model_card(config, _description(config))


def test_the_card_of_a_full_model_needs_no_peft() -> None:
    config = _config(method="Full", uri="s3://bucket/base")
    card = model_card(config, _description(config, base_model={"uri": "s3://bucket/base"}))
    assert "library_name: transformers\n" in card
    assert "A model trained in full, from `s3://bucket/base`.\n" in card
    assert "PeftModel" not in card
    assert "license" not in card


def test_the_card_repeats_no_text_of_the_spec_as_markup() -> None:
    config = _config()
    card = model_card(config, _description(config, dataset={"note": "a | b\nc"}))
    assert "| note | a \\| b c |" in card


def test_equal_jobs_give_equal_cards() -> None:
    config = _config()
    assert model_card(config, _description(config)) == model_card(config, _description(config))
