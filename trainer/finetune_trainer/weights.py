"""Filling a skeleton unit by unit: no rank ever holds more than one unit beside what its engine keeps.

A unit is a decoder layer, or what remains around the layers. Safetensors are opened per unit and closed again, so that
their mapped pages do not pile up in a rank's memory.
"""

from __future__ import annotations

import ctypes
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune_api.errors import ModelError
from finetune_trainer.model import decoder_layers
from finetune_trainer.seeding import seed_for
from finetune_trainer.tuners.base import Tuner, is_packed


class WeightSource(ABC):
    """Where base weights come from. Names are those of the bare model."""

    description = ""

    @abstractmethod
    def fill(self, module: nn.Module, names: dict[str, str]) -> dict[str, torch.Tensor]:
        """CPU tensors for a module's own parameters; ``names`` maps attribute -> base name."""

    def close_unit(self) -> None:  # noqa: B027
        """Called after each unit."""


class PretrainedWeights(WeightSource):
    """Sharded or single safetensors. Raises ModelError for missing tensors and wrong shapes."""

    description = "safetensors read unit by unit"

    def __init__(self, directory: Path, base_prefix: str, tied_names: dict[str, list[str]]) -> None:
        self.directory = directory
        self.prefix = base_prefix + "."
        self.tied_names = tied_names
        self.files = _tensor_files(directory)
        self._open: dict[str, Any] = {}

    def resolve(self, name: str) -> str | None:
        """The checkpoint's spelling of a parameter's name: some checkpoints leave out the base model's prefix.

        A tied parameter is stored under one of its names, yet a method may ask for each (a copy to be trained apart).
        """
        for one in self.tied_names.get(name, [name]):
            candidates = (one, one.removeprefix(self.prefix), self.prefix + one)
            if found := next((candidate for candidate in candidates if candidate in self.files), None):
                return found
        return None

    def fill(self, module: nn.Module, names: dict[str, str]) -> dict[str, torch.Tensor]:
        found = {}
        for attribute, name in names.items():
            key = self.resolve(name)
            if key is None:
                raise ModelError(f"{self.directory}: no tensor '{name}' in its safetensors; the download is incomplete")
            tensor = self._handle(self.files[key]).get_tensor(key)
            expected = _expected_shape(module, attribute)
            if tensor.shape != expected:
                raise ModelError(
                    f"{self.directory / self.files[key]}: tensor '{key}' has shape {tuple(tensor.shape)}, config.json "
                    f"implies {tuple(expected)}; config.json and weights do not belong together"
                )
            found[attribute] = tensor
        return found

    def close_unit(self) -> None:
        self._open.clear()

    def _handle(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if file not in self._open:
            try:
                self._open[file] = safe_open(self.directory / file, framework="pt", device="cpu")
            except SafetensorError as error:
                raise ModelError(
                    f"{self.directory / file}: not a whole safetensors file ({error}); fetch it again"
                ) from error
        return self._open[file]


class ConvertedWeights(WeightSource):
    """For checkpoints whose tensors transformers renames or fuses: loaded whole by transformers, then dealt out.

    Host memory peaks at the whole model on every rank; the self-check report says so.
    """

    description = "whole model converted by transformers (its tensors need renaming or fusing)"

    def __init__(self, directory: Path, dtype: torch.dtype, allow_remote_code: bool) -> None:
        from transformers import AutoModelForCausalLM

        try:
            model, told = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, trust_remote_code=allow_remote_code, output_loading_info=True
            )
        except (RuntimeError, ValueError, OSError) as error:
            first = str(error).strip().splitlines()[0]
            raise ModelError(
                f"{directory}: transformers cannot convert its safetensors ({first.rstrip('.!')}); "
                "config.json and weights do not belong together"
            ) from error
        self.tensors = {name: tensor.data for name, tensor in model.named_parameters(remove_duplicate=False)}
        missing = [name for name in self.tensors if name in told["missing_keys"]]
        if missing:  # transformers would start them at random
            raise _lacking(directory, missing, len(self.tensors))

    def fill(self, module: nn.Module, names: dict[str, str]) -> dict[str, torch.Tensor]:  # noqa: ARG002
        return {attribute: self.tensors[name] for attribute, name in names.items()}


class RandomWeights(WeightSource):
    """The architecture's own initialisation, seeded per module name: the same on every engine and world size."""

    description = "random initialisation"

    def __init__(self, model: Any, seed: int) -> None:
        self.model, self.seed = model, seed

    @torch.no_grad()
    def fill(self, module: nn.Module, names: dict[str, str]) -> dict[str, torch.Tensor]:
        target: nn.Module = module
        if is_packed(module):
            linear: Any = module
            target = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        saved = dict(target._parameters)
        for attribute in names:
            shape = saved[attribute].shape  # type: ignore[union-attr]
            target._parameters[attribute] = nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_for(self.seed, "initialization", *sorted(names.values())))
            self.model._init_weights(target)
        found = {attribute: target._parameters[attribute].data for attribute in names}  # type: ignore[union-attr]
        if target is module:
            target._parameters.update(saved)
        return found


def pretrained_source(directory: Path, model: Any, dtype: torch.dtype, allow_remote_code: bool) -> WeightSource:
    """Unit-by-unit reading where every tensor has the model's own name, else transformers' conversion."""
    source = PretrainedWeights(directory, model.base_model_prefix, _tied_names(model))
    names = [name for name, _ in model.named_parameters()]
    if all(source.resolve(name) is not None for name in names):
        return source
    from transformers.conversion_mapping import get_model_conversion_mapping

    if get_model_conversion_mapping(model):
        return ConvertedWeights(directory, dtype, allow_remote_code)
    raise _lacking(directory, [name for name in names if source.resolve(name) is None], len(names))


def _lacking(directory: Path, missing: list[str], count: int) -> ModelError:
    return ModelError(
        f"{directory}: its safetensors lack {len(missing)} of the model's {count} tensors, first '{missing[0]}'; "
        "config.json and weights do not belong together"
    )


class ModelLoader:
    """Materialises units on ``device`` in the right dtype and hands each to the engine's ``shard``."""

    def __init__(
        self,
        model: Any,
        tuner: Tuner,
        source: WeightSource,
        device: torch.device,
        trained: Callable[[str], torch.Tensor] | None = None,
    ) -> None:
        self.model, self.tuner, self.source, self.device = model, tuner, source, device
        self.trained = trained  # weights of a checkpoint that is resumed, by name
        self._done: dict[int, nn.Parameter] = {}  # tied parameters stay one object
        self._tied = _tied(model)
        self._resumed: set[str] = set()
        self._keep: list[nn.Parameter] = []  # ids are unique only while the objects live

    def load(self, shard: Callable[[nn.Module], None]) -> None:
        """Every decoder layer, then the rest. ``shard`` sees each layer right after it is filled."""
        names, layers = decoder_layers(self.model)
        for name, layer in zip(names, layers, strict=True):
            self._fill_unit(layer, name)
            shard(layer)
            _return_freed_memory()
        self._fill_unit(self.model, "")
        self._move_buffers()
        left = [n for n, p in self.model.named_parameters() if p.device.type == "meta"]
        assert not left, f"parameters never filled: {left[:3]}"

    def _move_buffers(self) -> None:
        """Only buffers: an engine may keep its shards of parameters elsewhere (offload to the host)."""
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(self.device)

    def _fill_unit(self, unit: nn.Module, prefix: str) -> None:
        for name, module in unit.named_modules(prefix=prefix):
            self._fill_module(module, name)
        for name, module in unit.named_modules(prefix=prefix):
            if _has_meta(module):
                self.tuner.initialize(module, name)
        if self.trained is not None:
            for name, parameter in unit.named_parameters(prefix=prefix):
                # by name: the engine has replaced the parameters of layers that are sharded already
                if parameter.requires_grad and name not in self._resumed:
                    parameter.data.copy_(self.trained(name))
                    self._resumed.add(name)
        self.source.close_unit()

    def _fill_module(self, module: nn.Module, name: str) -> None:
        wanted = {}
        for attribute, parameter in module._parameters.items():
            full = f"{name}.{attribute}" if name else attribute
            if parameter is None or parameter.device.type != "meta" or self.tuner.owns(full):
                continue
            if id(parameter) in self._done:
                setattr(module, attribute, self._done[id(parameter)])
            else:
                wanted[attribute] = self.tuner.source_name(full)
        if not wanted:
            return
        for attribute, tensor in self.source.fill(module, wanted).items():
            if is_packed(module) and attribute == "weight":
                module.quantize(tensor.to(self.device, module.compute_dtype))
                continue
            old = module._parameters[attribute]
            assert old is not None
            dtype = torch.float32 if old.requires_grad else self.tuner.compute_dtype
            fresh = nn.Parameter(tensor.to(self.device, dtype, copy=True), requires_grad=old.requires_grad)
            if id(old) in self._tied:  # any other would outlive its sharding here: the whole model in host memory
                self._done[id(old)] = fresh
                self._keep.append(old)
            setattr(module, attribute, fresh)


def _expected_shape(module: nn.Module, attribute: str) -> torch.Size:
    """What the configuration implies; a 4-bit layer's own weight is packed."""
    if is_packed(module) and attribute == "weight":
        linear: Any = module
        return torch.Size((linear.out_features, linear.in_features))
    parameter = module._parameters[attribute]
    assert parameter is not None, attribute
    return parameter.shape


def _tied(model: nn.Module) -> set[int]:
    """Ids of the parameters that have more than one name."""
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    return {identity for identity, count in uses.items() if count > 1}


def _tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Name of a tied parameter -> all its names, in the model's order."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {name: names for names in groups.values() if len(names) > 1 for name in names}


def _return_freed_memory() -> None:
    """Have glibc give freed pages back: it keeps tensors of up to 32 MiB, which adds up to a good part of a model."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _has_meta(module: nn.Module) -> bool:
    return any(parameter.device.type == "meta" for parameter in module.parameters())


def _tensor_files(directory: Path) -> dict[str, str]:
    """Tensor name -> file name, from the index or the single file's header."""
    from safetensors import SafetensorError, safe_open

    index = directory / "model.safetensors.index.json"
    if index.exists():
        return dict(json.loads(index.read_text())["weight_map"])
    single = directory / "model.safetensors"
    if not single.exists():
        raise ModelError(f"{directory}: no model.safetensors and no index of shards; weights must be safetensors")
    try:
        with safe_open(single, framework="pt") as handle:
            return dict.fromkeys(handle.keys(), single.name)
    except SafetensorError as error:
        raise ModelError(f"{single}: not a whole safetensors file ({error}); fetch it again") from error
