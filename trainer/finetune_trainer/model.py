"""Building a causal LM without weights, finding its parts, and the module that engines wrap."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune_api.errors import ModelError
from finetune_api.spec import Precision
from finetune_trainer import attention
from finetune_trainer.data import Batch
from finetune_trainer.losses.causal_lm import HeadOptions, install_head_loss

DTYPES = {Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16, Precision.FP32: torch.float32}


def build_skeleton(directory: Path, dtype: torch.dtype, allow_remote_code: bool) -> Any:
    """The model of ``config.json`` with parameters on the meta device and real buffers. Raises ModelError."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    attention.register()
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=allow_remote_code)
        with _parameters_on_meta(), no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention.IMPLEMENTATION, trust_remote_code=allow_remote_code
            )
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{directory / 'config.json'}: transformers cannot build a causal LM from it ({first}); "
            "check architectures and the sizes in it"
        ) from error
    model.tie_weights()
    model.train()  # from_config leaves train mode, from_pretrained does not; 4-bit layers on CPU depend on it
    model.config.use_cache = False
    return model


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters become meta tensors as soon as a module registers them; buffers (rotary tables) stay real."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def decoder_layers(model: nn.Module) -> tuple[list[str], list[nn.Module]]:
    """Names and modules of the decoder layers: the units that engines shard and checkpoint."""
    config: Any = model.config  # type: ignore[attr-defined]
    count = config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return [f"{name}.{i}" for i in range(count)], list(module)
    raise ModelError(
        f"model {type(model).__name__}: no list of {count} decoder layers found; choose a decoder-only architecture"
    )


@dataclass
class LossOutput:
    """Sums over the micro-batch; the loop divides by the global batch's supervised tokens."""

    loss: torch.Tensor  # () fp32, sum of token losses
    correct: torch.Tensor  # () int64, tokens whose arg-max equals the label


def row_arguments(batch: Batch) -> dict[str, Any]:
    """A micro-batch in transformers' own keywords: one row, positions that restart, segment boundaries, no mask."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "use_cache": False,
        "cu_seq_lens_q": batch.cumulative_lengths,
        "cu_seq_lens_k": batch.cumulative_lengths,
        "max_length_q": batch.longest_segment,
        "max_length_k": batch.longest_segment,
    }


class CausalLMForTraining(nn.Module):
    """What an engine wraps: (input_ids, labels) -> loss sums. The head runs only where a label exists."""

    def __init__(self, model: Any, options: HeadOptions, neftune_alpha: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.options = options
        self.neftune_alpha = neftune_alpha
        self._boundaries: torch.Tensor | None = None  # (S + 1,), of the batch that is in the decoder
        if neftune_alpha > 0.0:
            model.get_input_embeddings().register_forward_hook(self._add_noise)
        install_head_loss(_innermost(model.get_output_embeddings()), options)

    def forward(self, batch: Batch, last_token: bool = False) -> Any:
        """A LossOutput; with ``last_token`` the logits after each segment instead: (S, V) fp32."""
        hidden = self.hidden_states(batch)  # (T, D)
        head = self.model.get_output_embeddings()
        if last_token:
            ends = batch.cumulative_lengths[1:].long() - 1
            return self.options.transform(head(hidden[ends])).float()
        labels = batch.labels[0, 1:]  # (T - 1,): the token after each position; -100 at every segment's first token
        chosen = (labels != -100).nonzero().squeeze(1)
        loss, correct = head(hidden[chosen], labels=labels[chosen])
        return LossOutput(loss, correct)

    def hidden_states(self, batch: Batch) -> torch.Tensor:
        """(T, D) after the last norm."""
        decoder = getattr(self.model, self.model.base_model_prefix)
        self._boundaries = batch.cumulative_lengths
        try:
            output = decoder(**row_arguments(batch))
        finally:
            self._boundaries = None
        return output.last_hidden_state[0]

    def _add_noise(self, module: nn.Module, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """NEFTune (arXiv:2310.05914): uniform noise while training, at most alpha / sqrt(length * dimension).

        The length is that of the token's own sample: the noise does not depend on what shares its micro-batch.
        """
        if not (self.training and torch.is_grad_enabled() and module.training):
            return output
        assert self._boundaries is not None, "the embeddings are used outside of the decoder's forward pass"
        lengths = self._boundaries.diff()  # (S,)
        lengths = lengths.repeat_interleave(lengths, output_size=output.shape[-2]).unsqueeze(1)  # (T, 1)
        bounds = self.neftune_alpha / (lengths * output.shape[-1]).sqrt()
        return output + torch.empty_like(output).uniform_(-1.0, 1.0) * bounds.to(output.dtype)


def _innermost(head: nn.Module) -> nn.Module:
    """The module whose forward becomes the loss: the trainable copy when PEFT saves the head as a whole."""
    copies = getattr(head, "modules_to_save", None)
    return copies["default"] if copies is not None and "default" in copies else head
