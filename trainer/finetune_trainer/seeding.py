"""Random numbers as pure functions of names, so that nothing random has to be carried in a checkpoint."""

from __future__ import annotations

import hashlib

import torch


def seed_for(*parts: object) -> int:
    """A 63-bit seed that depends on every part (job seed, step, rank, parameter name, ...)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator_for(*parts: object) -> torch.Generator:
    """A CPU generator seeded by ``parts``: the same numbers on every device and engine."""
    return torch.Generator(device="cpu").manual_seed(seed_for(*parts))
