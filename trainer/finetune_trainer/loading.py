"""From a model directory to a filled, tuned, sharded module, one unit at a time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from finetune_api.plan import CheckpointingMode
from finetune_api.spec import Initialization, MethodType, StrategyType
from finetune_trainer.checkpoint import CheckpointReader
from finetune_trainer.engines.base import Engine, ParameterRule
from finetune_trainer.losses.causal_lm import HeadOptions, LogitTransform
from finetune_trainer.model import DTYPES, CausalLMForTraining, build_skeleton
from finetune_trainer.norms import use_torch_rms_norm
from finetune_trainer.optimizers import parameter_rules
from finetune_trainer.tuners import make_tuner
from finetune_trainer.tuners.base import Tuner
from finetune_trainer.weights import ModelLoader, RandomWeights, WeightSource, pretrained_source
from finetune_trainer.worker_config import WorkerConfig


@dataclass
class LoadedModel:
    """What loading gives the recipe. Sizes are of full tensors, by name in the bare model."""

    module: CausalLMForTraining
    tuner: Tuner
    rules: dict[str, ParameterRule]
    sizes: dict[str, int]
    weights: str  # how base weights were read


def load_model(
    config: WorkerConfig, engine: Engine, device: torch.device, checkpoint: CheckpointReader | None
) -> LoadedModel:
    """Skeleton on meta -> tuner -> weights unit by unit, each handed to ``engine.shard`` as soon as it is filled."""
    job, spec = config.trainer, config.trainer.spec
    directory = Path(config.model_directory)
    remote_code = spec.model.trust_remote_code and job.allow_remote_code
    quantization = spec.method.quantization
    compute = engine.compute_dtype
    model = build_skeleton(directory, compute, remote_code)
    source = _source(config, model, directory, compute, remote_code)
    # an adapter names the commit it was trained on
    pinned = spec.model_copy(update={"model": spec.model.model_copy(update={"revision": job.plan.model_revision})})
    tuner = make_tuner(
        pinned, DTYPES[quantization.compute_type] if quantization and quantization.compute_type else compute
    )
    tuner.apply(model)
    rules = parameter_rules(model, tuner, spec)
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    mode = engine.plan.gradient_checkpointing
    if spec.method.type is not MethodType.FULL and engine.plan.strategy.type is not StrategyType.DEEPSPEED:
        from finetune_trainer.tuners.fused_lora import fuse
        from finetune_trainer.tuners.lora import ADAPTER

        # ZeRO-3 gathers weights in the call of each layer that owns one, which the fused function goes around
        fuse(model, ADAPTER, in_place=mode is not CheckpointingMode.SELECTIVE)
    if device.type == "cuda":  # on CPU both ways are the same operations
        use_torch_rms_norm(model)
    _checkpoint_activations(model, mode)
    options = HeadOptions(spec.training.label_smoothing, LogitTransform.of(model.config.get_text_config()))
    module = CausalLMForTraining(model, options, spec.training.neftune_alpha)
    module.train()
    loader = ModelLoader(model, tuner, source, device, None if checkpoint is None else checkpoint.weight)
    loader.load(engine.shard)
    return LoadedModel(module, tuner, rules, sizes, source.description)


def _source(
    config: WorkerConfig, model: object, directory: Path, dtype: torch.dtype, remote_code: bool
) -> WeightSource:
    spec = config.trainer.spec
    if spec.model.initialization is Initialization.RANDOM:
        return RandomWeights(model, spec.training.seed)
    return pretrained_source(directory, model, dtype, remote_code)


def _checkpoint_activations(model: object, mode: CheckpointingMode) -> None:
    """Recompute decoder layers in the backward pass; Selective keeps the results of matrix products and attention."""
    if mode is CheckpointingMode.NONE:
        return
    options: dict[str, object] = {"use_reentrant": False}
    if mode is CheckpointingMode.SELECTIVE:
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_products)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)  # type: ignore[attr-defined]


def _keep_products(_context: object, operation: object, *_args: object, **_kwargs: object) -> CheckpointPolicy:
    name = str(operation).split(".")[1] if "." in str(operation) else ""  # torch_attn._varlen_attn.default
    keep = name in {"mm", "addmm", "bmm"} or "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE
