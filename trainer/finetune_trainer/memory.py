"""How much memory a rank uses: the device's allocator on CUDA, resident memory on the CPU."""

from __future__ import annotations

import resource

import psutil
import torch

_PROCESS = psutil.Process()


def memory_bytes(device: torch.device) -> int:
    """Allocated device memory, or this process's resident memory, now."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(_PROCESS.memory_info().rss)


def peak_memory_bytes(device: torch.device) -> int:
    """The highest value since the process started."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
