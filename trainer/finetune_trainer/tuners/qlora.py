"""QLoRA: LoRA over a frozen base whose decoder layers are stored in 4 bit (Dettmers et al. 2023, row A8)."""

from __future__ import annotations

from typing import Any

from torch import nn

from finetune_api.errors import ModelError
from finetune_api.spec import QuantizationOptions
from finetune_trainer.model import decoder_layers
from finetune_trainer.tuners.lora import LoraTuner
from finetune_trainer.tuners.quantization import QuantizedLinear, quantize_linears


class QloraTuner(LoraTuner):
    def apply(self, model: Any) -> None:
        options = self.spec.method.quantization or QuantizationOptions()
        names, layers = decoder_layers(model)
        self._refuse_fused_experts(model, names)
        for layer in layers:
            quantize_linears(layer, options.type.value.lower(), options.double_quantization, self.compute_dtype)
        model.is_loaded_in_4bit = True  # PEFT chooses its 4-bit LoRA layer by this attribute
        super().apply(model)

    def quantized_layers(self, model: nn.Module) -> list[str]:
        return [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]

    def _refuse_fused_experts(self, model: nn.Module, layer_names: list[str]) -> None:
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 3 and any(name.startswith(layer + ".") for layer in layer_names):
                raise ModelError(
                    f"spec.method.type: QLoRA would leave the fused expert weights of {type(model).__name__} ({name}, "
                    f"{tuple(parameter.shape)}) in 16 bit; use LoRA, or a base model without fused experts"
                )
