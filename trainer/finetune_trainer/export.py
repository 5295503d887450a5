"""Artifact files from a checkpoint: PEFT adapter, merged model or full model. Runs on rank 0, in host memory."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune_api.errors import ModelError
from finetune_api.spec import OutputFormat
from finetune_trainer.checkpoint import CheckpointReader
from finetune_trainer.data import DEFAULT_CHAT_TEMPLATE, PreparedData
from finetune_trainer.loading import LoadedModel
from finetune_trainer.model_files import (
    CODE_PATTERNS,
    TOKENIZER_PATTERNS,
    matching_files,
    read_json,
    remote_code_allowed,
)
from finetune_trainer.tuners.base import is_packed
from finetune_trainer.worker_config import WorkerConfig

if TYPE_CHECKING:
    from peft import PeftConfig

_SHARD_BYTES = 5 * 10**9


def export(config: WorkerConfig, loaded: LoadedModel, checkpoint: CheckpointReader, directory: Path) -> None:
    """Write the files of ``plan.output_format`` into ``directory`` (emptied first)."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    _EXPORTERS[config.trainer.plan.output_format](config, loaded, checkpoint, directory)
    _copy(Path(config.model_directory), TOKENIZER_PATTERNS, directory)
    if remote_code_allowed(config.trainer) and _names_code(directory):
        _copy(Path(config.model_directory), CODE_PATTERNS, directory)
    if PreparedData.open(config.data_directory).counts["chatTemplate"] == "default":  # trained on, so served with
        (directory / "chat_template.jinja").write_text(DEFAULT_CHAT_TEMPLATE)


def _copy(source: Path, patterns: tuple[str, ...], directory: Path) -> None:
    for name in matching_files(source, patterns):
        (directory / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(source / name, directory / name)


def _names_code(directory: Path) -> bool:
    """Whether transformers would look for Python files here; an adapter's model finds them in its base."""
    settings = (directory / name for name in ("config.json", "tokenizer_config.json"))
    return any("auto_map" in read_json(file, str(directory)) for file in settings if file.exists())


def _adapter(_config: WorkerConfig, loaded: LoadedModel, checkpoint: CheckpointReader, directory: Path) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors`` in fp32, as PEFT writes them."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    peft_model = _lora(loaded).peft_model
    prefix = "base_model.model."
    trained = {prefix + name: checkpoint.weight(name) for name in checkpoint.names}
    state = get_peft_model_state_dict(peft_model, state_dict=trained, save_embedding_layers=False)
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()},
        directory / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    as_published(peft_model.peft_config["default"]).save_pretrained(directory)


def as_published(adapter_config: PeftConfig) -> PeftConfig:
    """A copy for inference with sets in order: PEFT writes them as they are hashed, differently in every process."""
    published = copy.copy(adapter_config)
    published.inference_mode = True
    for name, value in vars(adapter_config).items():
        if isinstance(value, set):
            setattr(published, name, sorted(value))
    return published


def _full_model(config: WorkerConfig, loaded: LoadedModel, checkpoint: CheckpointReader, directory: Path) -> None:
    """Sharded safetensors in the precision's dtype, one shard in memory at a time."""
    dtype = _stored_dtype(config, loaded)
    _write_shards(checkpoint.names, lambda name: checkpoint.weight(name).to(dtype), loaded.sizes, directory, dtype)
    _write_config(loaded.module.model, dtype, directory)


def _merged_model(config: WorkerConfig, loaded: LoadedModel, checkpoint: CheckpointReader, directory: Path) -> None:
    """The base with the adapter merged into it, in 16 bit (FP32 jobs: fp32).

    For QLoRA the base is the dequantised 4-bit weight that training really used, not the weight it was made from.
    """
    dtype = _stored_dtype(config, loaded)
    merged = merge(config, loaded, checkpoint)
    names = [name for name, _ in merged.named_parameters()]
    tensors = dict(merged.named_parameters())
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    _write_shards(names, lambda name: tensors[name].detach().to(dtype), sizes, directory, dtype)
    _write_config(merged, dtype, directory)


def merge(config: WorkerConfig, loaded: LoadedModel, checkpoint: CheckpointReader) -> Any:
    """A plain transformers model on the CPU in fp32 whose weights are base plus adapter."""
    from peft import PeftModel, get_peft_model, set_peft_model_state_dict
    from peft.utils import get_peft_model_state_dict
    from transformers import AutoModelForCausalLM

    job = config.trainer
    remote_code = job.spec.model.trust_remote_code and job.allow_remote_code
    if job.spec.model.initialization.value == "Random":
        raise ModelError(
            "spec.output.format: MergedModel needs a pretrained base; use Adapter, or initialization Pretrained"
        )
    tuner = _lora(loaded)
    base = AutoModelForCausalLM.from_pretrained(
        config.model_directory, dtype=torch.float32, trust_remote_code=remote_code
    )
    _replace_by_trained_weights(base, loaded, tuner)
    _untie_what_was_trained_apart(base, loaded.module.model)
    trained = {"base_model.model." + name: checkpoint.weight(name) for name in checkpoint.names}
    state = get_peft_model_state_dict(tuner.peft_model, state_dict=trained, save_embedding_layers=False)
    tuned: PeftModel = get_peft_model(base, tuner.peft_model.peft_config["default"])
    set_peft_model_state_dict(tuned, state)
    return tuned.merge_and_unload()


@torch.no_grad()
def _replace_by_trained_weights(base: nn.Module, loaded: LoadedModel, tuner: Any) -> None:
    """Round the base as training did: to the compute dtype, and through 4 bit where layers were quantised."""
    for parameter in base.parameters():
        parameter.copy_(parameter.to(tuner.compute_dtype).float())
    for name, layer in loaded.module.model.named_modules():
        if is_packed(layer):
            linear: Any = base.get_submodule(tuner.source_name(name + ".weight").removesuffix(".weight"))
            stored: Any = layer
            twin = type(stored)(linear, stored.quant_type, stored.double, stored.compute_dtype)
            twin.quantize(linear.weight.to(stored.compute_dtype))
            linear.weight.copy_(twin.dequantize(torch.float32))


def _untie_what_was_trained_apart(base: Any, tuned: Any) -> None:
    """PEFT merges into the tensor that it finds: a shared one would change input and output embeddings alike."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    trained = (tuned.get_output_embeddings(), tuned.get_input_embeddings())
    if head.weight is embedding.weight and any(isinstance(m, BaseTunerLayer | ModulesToSaveWrapper) for m in trained):
        head.weight = nn.Parameter(head.weight.detach().clone())
        for settings in (base.config, base.config.get_text_config()):
            settings.tie_word_embeddings = False


def _lora(loaded: LoadedModel) -> Any:
    from finetune_trainer.tuners.lora import LoraTuner

    assert isinstance(loaded.tuner, LoraTuner), "the planner allows adapters for LoRA and QLoRA only"
    return loaded.tuner


def _stored_dtype(config: WorkerConfig, loaded: LoadedModel) -> torch.dtype:
    return torch.float32 if config.trainer.plan.precision.value == "FP32" else loaded.tuner.compute_dtype


def _write_config(model: Any, dtype: torch.dtype, directory: Path) -> None:
    settings = model.config.to_diff_dict()
    settings.pop("_attn_implementation", None)
    settings |= {"architectures": [type(model).__name__], "dtype": str(dtype).removeprefix("torch."), "use_cache": True}
    settings["model_type"] = model.config.model_type
    (directory / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True, default=str) + "\n")


def _write_shards(
    names: Iterable[str],
    tensor: Callable[[str], torch.Tensor],
    sizes: dict[str, int],
    directory: Path,
    dtype: torch.dtype,
) -> None:
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    filled, total = 0, 0
    width = torch.empty((), dtype=dtype).element_size()
    for name in names:
        size = sizes[name] * width
        if shards[-1] and filled + size > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled, total = filled + size, total + size
    count = len(shards)
    where = {}
    for number, members in enumerate(shards, start=1):
        file = "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
        save_file({name: tensor(name).contiguous() for name in members}, directory / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(members, file))
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


_EXPORTERS = {
    OutputFormat.ADAPTER: _adapter,
    OutputFormat.MERGED_MODEL: _merged_model,
    OutputFormat.FULL_MODEL: _full_model,
}
