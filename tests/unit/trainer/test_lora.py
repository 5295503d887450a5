"""What a LoRA layer is before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.builders import build_model
from transformers import GPT2Config, GPT2LMHeadModel

from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.model import build_skeleton
from finetune_trainer.tuners.lora import LoraTuner
from finetune_trainer.weights import ModelLoader, pretrained_source

TARGETS = {  # Llama's linear layers and embedding; GPT-2's Conv1D (in, out), square and not, and both embeddings
    "linear": ("llama", ["q_proj", "k_proj", "down_proj", "lm_head"]),
    "embedding": ("llama", ["embed_tokens"]),
    "Conv1D": ("gpt2", ["c_attn", "c_fc", "c_proj"]),
    "Conv1D and embeddings": ("gpt2", ["c_proj", "wte", "wpe"]),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2, tie_word_embeddings=False)
    GPT2LMHeadModel(config).save_pretrained(folder / "gpt2")
    return {"llama": build_model(folder / "llama"), "gpt2": folder / "gpt2"}


@pytest.mark.parametrize("targets", TARGETS)
def test_dora_starts_at_the_base_model_with_the_magnitudes_of_peft(models: dict[str, Path], targets: str) -> None:
    kind, names = TARGETS[targets]
    directory = models[kind]
    tuned = loaded(directory, {"rank": 2, "useDora": True, "targetModules": names}).eval()
    base = plain(directory)
    ids = torch.arange(12)[None]
    boundaries = torch.tensor([0, 12], dtype=torch.int32)
    with torch.no_grad():
        ours = tuned(input_ids=ids, cu_seq_lens_q=boundaries, cu_seq_lens_k=boundaries, use_cache=False).logits
        expected = base(input_ids=ids).logits
    assert float((ours - expected).abs().max()) <= 1e-5

    theirs = get_peft_model(base, LoraConfig(r=2, target_modules=names, use_dora=True)).state_dict()
    magnitudes = {name: value for name, value in tuned.state_dict().items() if "lora_magnitude_vector" in name}
    assert magnitudes
    for name, value in magnitudes.items():
        torch.testing.assert_close(value, theirs[f"base_model.model.{name}"])


def loaded(directory: Path, lora: dict[str, Any]) -> Any:
    """As the trainer loads a job's model, on one process."""
    spec = FineTuneJobSpec.model_validate(
        {
            "model": {"uri": f"file://{directory}"},
            "dataset": {"train": [{"uri": "file:///train.jsonl"}]},
            "method": {"type": "LoRA", "lora": lora},
            "output": {"uri": "file:///out"},
        }
    )
    model = build_skeleton(directory, torch.float32, allow_remote_code=False)
    tuner = LoraTuner(spec, torch.float32)
    tuner.apply(model)
    source = pretrained_source(directory, model, torch.float32, allow_remote_code=False)
    ModelLoader(model, tuner, source, torch.device("cpu")).load(lambda _layer: None)
    return model


def plain(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
