"""Token cross entropy of a causal LM without ever holding the logits of the whole batch.

The language-model head runs only where a label exists, in chunks. For a plain linear head the gradients are computed in
the forward pass, chunk by chunk (the idea of Liger and of Wijmans et al. 2024, arXiv:2411.09009), so the backward pass
needs no second matrix product for the logits. Any other head (LoRA on it, soft-capping) runs chunk by chunk under
activation checkpointing with the same result.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

_CHUNK_LOGITS = 2**25  # logits per chunk: 128 MiB in fp32
_MAXIMUM_CHUNK = 1024  # tokens


@dataclass(frozen=True)
class LogitTransform:
    """What an architecture does between its head and the softmax: ``softcap * tanh(scale * logits / softcap)``."""

    scale: float = 1.0
    softcap: float | None = None

    @property
    def identity(self) -> bool:
        return self.scale == 1.0 and self.softcap is None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits

    @classmethod
    def of(cls, config: Any) -> LogitTransform:
        """From the names public configurations use (Gemma 2, Granite, Cohere, Falcon H1)."""
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
        if scaling := getattr(config, "logits_scaling", None):
            scale /= float(scaling)
        return cls(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


@dataclass(frozen=True)
class HeadOptions:
    """How labels become a loss."""

    label_smoothing: float = 0.0
    transform: LogitTransform = LogitTransform()


def install_head_loss(head: nn.Module, options: HeadOptions) -> None:
    """Give ``head`` a second way to be called: ``head(hidden, labels=labels) -> (loss_sum, correct)``.

    The loss runs inside the head's own ``forward`` so that whatever gathers its parameters (FSDP2 root, ZeRO-3 hooks)
    does it once for all chunks.
    """
    original = head.forward
    plain = type(head) is nn.Linear and options.transform.identity

    def forward(self: nn.Module, hidden: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        if labels is None:
            return original(hidden)
        if plain:
            return _FusedLinearCrossEntropy.apply(hidden, self.weight, self.bias, labels, options.label_smoothing)
        return _chunked_cross_entropy(original, hidden, labels, options)

    head.forward = types.MethodType(forward, head)  # type: ignore[method-assign]


def token_losses(logits: torch.Tensor, labels: torch.Tensor, label_smoothing: float) -> torch.Tensor:
    """Cross entropy per token, fp32. logits: (N, V), labels: (N,) without ignored positions -> (N,)."""
    return F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=label_smoothing)


def chunk_length(vocabulary: int) -> int:
    """Tokens per chunk so that one chunk's logits stay within 2^25 numbers and 1024 tokens."""
    return max(16, min(_MAXIMUM_CHUNK, _CHUNK_LOGITS // vocabulary))


def _chunked_cross_entropy(
    head: Any, hidden: torch.Tensor, labels: torch.Tensor, options: HeadOptions
) -> tuple[torch.Tensor, torch.Tensor]:
    def one_chunk(piece: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = options.transform(head(piece))
        correct = (logits.detach().argmax(-1) == target).sum()
        return token_losses(logits, target, options.label_smoothing).sum(), correct

    loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
    correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
    size = 256  # the vocabulary is behind the head; small enough for every known one
    for piece, target in zip(hidden.split(size), labels.split(size), strict=True):
        if torch.is_grad_enabled():
            chunk_loss, chunk_correct = checkpoint(one_chunk, piece, target, use_reentrant=False)
        else:
            chunk_loss, chunk_correct = one_chunk(piece, target)
        loss, correct = loss + chunk_loss, correct + chunk_correct
    return loss, correct


class _FusedLinearCrossEntropy(torch.autograd.Function):
    """Sum of token losses of ``softmax(hidden @ weight.T + bias)`` with gradients computed in the forward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: torch.Tensor,  # (N, D)
        weight: torch.Tensor,  # (V, D)
        bias: torch.Tensor | None,  # (V,)
        labels: torch.Tensor,  # (N,)
        smoothing: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        device_type = hidden.device.type
        dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else weight.dtype
        w = weight.to(dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        # every chunk reads and writes the whole gradient of the weight: on fast devices that is what a chunk costs
        whole = needs_weight and device_type == "cuda"
        size = _MAXIMUM_CHUNK if whole else chunk_length(weight.shape[0])
        with torch.autocast(device_type, enabled=False):
            for start in range(0, hidden.shape[0], size):
                rows = slice(start, start + size)
                h, target = hidden[rows].to(dtype), labels[rows]
                logits = F.linear(h, w).float()  # (n, V)
                if bias is not None:
                    logits += bias.float()
                correct += (logits.argmax(-1) == target).sum()
                chunk_loss, probabilities = _loss_and_probabilities(logits, target, smoothing)
                loss += chunk_loss
                if not (needs_hidden or needs_weight or needs_bias):
                    continue
                gradient = _logit_gradient(probabilities, target, smoothing)  # (n, V), in place
                low = gradient.to(dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = (low @ w).to(hidden.dtype)
                if grad_weight is not None:
                    grad_weight += low.t() @ h
                if grad_bias is not None:
                    grad_bias += gradient.sum(0)
        ctx.gradients = (grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, None if bias is None else bias.dtype)
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _grad_correct: Any) -> Any:  # type: ignore[override]
        grad_hidden, grad_weight, grad_bias = ctx.gradients
        ctx.gradients = None
        weight_dtype, bias_dtype = ctx.dtypes
        return (
            None if grad_hidden is None else _scale(grad_hidden, grad_loss),
            None if grad_weight is None else grad_weight.mul_(grad_loss).to(weight_dtype),
            None if grad_bias is None else grad_bias.mul_(grad_loss).to(bias_dtype),
            None,
            None,
        )


def _scale(gradient: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``gradient * factor`` in place, computed in fp32: a factor rounded to 16 bit would bias every gradient below."""
    if gradient.dtype is torch.float32:
        return gradient.mul_(factor)
    for rows in gradient.split(_MAXIMUM_CHUNK):
        rows.copy_(rows.float() * factor)
    return gradient


def _loss_and_probabilities(
    logits: torch.Tensor, target: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of token losses, and the softmax written over ``logits``. (n, V), (n,) -> (), (n, V)."""
    chosen = logits.gather(1, target[:, None]).squeeze(1)
    mean = logits.mean(-1) if smoothing else None
    normalizer = torch.logsumexp(logits, dim=-1)
    losses = normalizer - chosen
    if mean is not None:
        losses = (1.0 - smoothing) * losses + smoothing * (normalizer - mean)
    return losses.sum(), logits.sub_(normalizer[:, None]).exp_()


def _logit_gradient(probabilities: torch.Tensor, target: torch.Tensor, smoothing: float) -> torch.Tensor:
    """d loss / d logits, in place: softmax - (1 - s) one_hot - s / V."""
    if smoothing:
        probabilities -= smoothing / probabilities.shape[1]
    ones = torch.full((target.shape[0], 1), -(1.0 - smoothing), dtype=probabilities.dtype, device=probabilities.device)
    return probabilities.scatter_add_(1, target[:, None], ones)
