"""What is updated: a registry of fine-tuning methods. A new one is a small file here and a line below."""

from __future__ import annotations

import torch

from finetune_api.spec import FineTuneJobSpec, MethodType
from finetune_trainer.tuners.base import Tuner
from finetune_trainer.tuners.full import FullTuner
from finetune_trainer.tuners.lora import LoraTuner
from finetune_trainer.tuners.qlora import QloraTuner

TUNERS: dict[MethodType, type[Tuner]] = {
    MethodType.FULL: FullTuner,
    MethodType.LORA: LoraTuner,
    MethodType.QLORA: QloraTuner,
}


def make_tuner(spec: FineTuneJobSpec, compute_dtype: torch.dtype) -> Tuner:
    """The tuner of ``spec.method.type``."""
    return TUNERS[spec.method.type](spec, compute_dtype)
