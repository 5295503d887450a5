"""LoRA and its variants through PEFT: rsLoRA, DoRA, LoRA+, all-linear or named targets, modulesToSave (row A7).

Sources: Hu et al. 2021 (arXiv:2106.09685), Kalajdzievski 2023 (2312.03732), Liu et al. 2024 (2402.09353),
Hayou et al. 2024 (2402.12354).
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
from torch import nn

from finetune_api.errors import ModelError
from finetune_api.spec import LoraOptions
from finetune_trainer.seeding import generator_for
from finetune_trainer.tuners.base import Tuner

ADAPTER = "default"
_OWN = re.compile(r"\.lora_(A|B|embedding_A|embedding_B|magnitude_vector)\b")
_WRAPPING = re.compile(rf"\.(base_layer|original_module|modules_to_save\.{ADAPTER})(?=\.|$)")


class LoraTuner(Tuner):
    """Injects LoRA layers into the model in place; ``self.peft_model`` knows how to export them."""

    @property
    def options(self) -> LoraOptions:
        return self.spec.method.lora or LoraOptions()

    def apply(self, model: Any) -> None:
        from peft import get_peft_model

        model.requires_grad_(False)
        self._check_names(model)
        model.name_or_path = base_model_name(self.spec.model.uri)  # PEFT writes it into adapter_config.json
        try:
            self.peft_model = get_peft_model(
                model, self._configuration(), autocast_adapter_dtype=False, low_cpu_mem_usage=True
            )
        except ValueError as error:
            raise ModelError(
                f"spec.method.lora: {error}", hint="Name linear layers of the model, or all-linear."
            ) from error
        tuned = {name for name, _ in model.named_parameters() if self.owns(name)}
        if not tuned:
            raise ModelError(
                f"spec.method.lora.targetModules: {list(self.options.target_modules)} matches no layer of "
                f"{type(model).__name__}; name linear layers of the model, or use all-linear"
            )

    def owns(self, name: str) -> bool:
        return _OWN.search(name) is not None

    def source_name(self, name: str) -> str:
        return _WRAPPING.sub("", name)

    def learning_rate_ratio(self, name: str) -> float:
        """LoRA+: B learns ``learningRateRatio`` times as fast as A."""
        is_b = ".lora_B." in name or ".lora_embedding_B" in name
        return self.options.learning_rate_ratio if is_b else 1.0

    def quantized_layers(self, model: nn.Module) -> list[str]:  # noqa: ARG002
        return []

    @torch.no_grad()
    def initialize(self, layer: nn.Module, name: str) -> None:
        """B = 0, A uniform as in the reference implementation; DoRA magnitudes are the base weight's norms."""
        if not hasattr(layer, "lora_A"):
            return
        device = _device_of(layer.get_base_layer())
        for key in ("lora_A", "lora_B"):
            for linear in getattr(layer, key).values():
                fresh = torch.zeros(linear.weight.shape, dtype=torch.float32)
                if key == "lora_A":
                    generator = generator_for(self.spec.training.seed, name, key)
                    nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator)
                linear.weight = nn.Parameter(fresh.to(device))
        for key in ("lora_embedding_A", "lora_embedding_B"):
            table: Any = getattr(layer, key, None)
            for adapter in list(table.keys()) if table is not None else []:
                fresh = torch.zeros(table[adapter].shape, dtype=torch.float32)
                if key.endswith("B"):
                    fresh.normal_(generator=generator_for(self.spec.training.seed, name, key))
                table[adapter] = nn.Parameter(fresh.to(device))
        for magnitude in getattr(layer, "lora_magnitude_vector", {}).values():
            base = layer.get_base_layer()
            weight = base.dequantize() if hasattr(base, "dequantize") and hasattr(base, "W_q") else base.weight
            # PEFT knows the layout: (out, in), (in, out) of Conv1D, (tokens, width) of an embedding
            norm = magnitude.get_weight_norm(weight.float(), torch.zeros((), device=weight.device), scaling=0.0)
            magnitude.weight = nn.Parameter(norm)

    def _configuration(self) -> Any:
        from peft import LoraConfig, TaskType

        options = self.options
        targets: Any = list(options.target_modules)
        if targets == ["all-linear"]:
            targets = "all-linear"
        elif any("*" in target for target in targets):
            targets = "|".join(f"(.*\\.)?{re.escape(target).replace(chr(92) + '*', '.*')}" for target in targets)
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=options.rank,
            lora_alpha=options.alpha,
            lora_dropout=options.dropout,
            target_modules=targets,
            modules_to_save=list(options.modules_to_save) or None,
            use_rslora=options.use_rslora,
            use_dora=options.use_dora,
            base_model_name_or_path=base_model_name(self.spec.model.uri),
            revision=self.spec.model.revision,
        )

    def _check_names(self, model: Any) -> None:
        known = sorted({name.rsplit(".", 1)[-1] for name, module in model.named_modules() if name})
        linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
        names = [n for n in self.options.target_modules if n != "all-linear" and "*" not in n]
        for field, wanted, choice in (
            ("targetModules", names, linear),
            ("modulesToSave", list(self.options.modules_to_save), known),
        ):
            for name in wanted:
                if name.rsplit(".", 1)[-1] not in known:
                    raise ModelError(
                        f"spec.method.lora.{field}: {type(model).__name__} has no module named '{name}'; "
                        f"choose among {', '.join(choice)}"
                    )


def _device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def base_model_name(uri: str) -> str:
    """What transformers can load: the hub's ``org/name``, a local path, else the URI for people to read."""
    if uri.startswith("hf://"):
        return uri.removeprefix("hf://").partition("@")[0]
    return uri.removeprefix("file://")
