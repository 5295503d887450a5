"""TRL's side: SFTTrainer as its users run it, told only to print the end of each step.

Settings in its favour: length grouping on (less padding), gradient checkpointing off (faster), fused AdamW (its
default), attention by SDPA, the LoRA base in BF16 where the precision is BF16. Its padding-free mode and packing
without cross-talk need flash attention, which does not run on a CPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer


class StepLines(TrainerCallback):
    """One line per optimizer step."""

    def on_step_end(self, args: Any, state: Any, _control: Any, **_: Any) -> None:
        print(f"step {state.global_step}/{args.max_steps}", flush=True)


class CountingTrainer(SFTTrainer):
    """SFTTrainer that also counts the tokens of each step that are not padding."""

    def training_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
        tokens = self.__dict__.setdefault("step_tokens", [])
        if self.state.global_step == len(tokens):
            tokens.append(0)
        tokens[-1] += int(
            (inputs["attention_mask"] if "attention_mask" in inputs else inputs["input_ids"]).bool().sum()
        )
        return super().training_step(model, inputs, *arguments, **options)


class PlainLossTrainer(CountingTrainer):
    """The same with the model's own loss over full logits.

    This version of TRL takes log-probabilities from tiles made for Triton, and its fallback on a CPU is many times
    slower than the plain loss. The comparison gives TRL the plain one.
    """

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        return Trainer.compute_loss(self, *arguments, **options)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--settings", type=json.loads, required=True)
    settings = parser.parse_args().settings
    bf16 = settings["precision"] == "BF16"
    lora = settings["method"] == "LoRA"
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=torch.bfloat16 if bf16 and lora else torch.float32
    )
    arguments = SFTConfig(
        output_dir=settings["output"],
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["micro_batch"],
        gradient_accumulation_steps=settings["global_batch"] // settings["micro_batch"],
        max_length=settings["maximum_length"],
        packing=settings["packing"],
        train_sampling_strategy="random" if settings["packing"] else "group_by_length",
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        bf16=bf16,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=1,
        disable_tqdm=True,
    )
    trainer = (PlainLossTrainer if settings["plain_loss"] else CountingTrainer)(
        model=model,
        args=arguments,
        train_dataset=load_dataset("json", data_files=settings["data"], cache_dir=settings["cache"], split="train"),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        peft_config=LoraConfig(
            r=settings["rank"], lora_alpha=settings["alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
        )
        if lora
        else None,
        callbacks=[StepLines()],
    )
    trainer.train()
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    Path(settings["record"]).write_text(json.dumps({"tokens": trainer.step_tokens, "losses": losses}))


if __name__ == "__main__":
    main()
