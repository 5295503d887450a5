"""What is updated: a registry of fine-tuning methods. A new one is a small file here and a line below."""

from __future__ import annotations

from importlib import import_module

import torch

from finetune_api.spec import FineTuneJobSpec, MethodType
from finetune_trainer.tuners.base import Tuner

# Module and class: a tuner's libraries cost seconds to import, so only the chosen one is loaded.
TUNERS: dict[MethodType, tuple[str, str]] = {
    MethodType.FULL: ("full", "FullTuner"),
    MethodType.LORA: ("lora", "LoraTuner"),
    MethodType.QLORA: ("qlora", "QloraTuner"),
}


def make_tuner(spec: FineTuneJobSpec, compute_dtype: torch.dtype) -> Tuner:
    """The tuner of ``spec.method.type``."""
    module, name = TUNERS[spec.method.type]
    tuner: type[Tuner] = getattr(import_module(f"{__name__}.{module}"), name)
    return tuner(spec, compute_dtype)
