"""What export does besides copying weights."""

from __future__ import annotations

import json
from pathlib import Path

from peft import LoraConfig

from finetune_trainer.export import as_published


def test_the_published_configuration_is_the_same_file_in_every_process(tmp_path: Path) -> None:
    modules = {f"model.layers.{n}.self_attn.q_proj" for n in range(20)}
    config = LoraConfig(target_modules=modules, modules_to_save=["lm_head", "embed_tokens"], inference_mode=False)
    as_published(config).save_pretrained(str(tmp_path))
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == sorted(modules)
    assert written["modules_to_save"] == ["lm_head", "embed_tokens"], "lists stay as they are"
    assert written["inference_mode"] is True
    assert (config.inference_mode, config.target_modules) == (False, modules), "training goes on with the original"
    assert LoraConfig.from_pretrained(str(tmp_path)).target_modules == modules
