"""The environment variables a rank starts with."""

from __future__ import annotations

import ipaddress
import os
import socket
import sys
from collections.abc import Mapping

from finetune_trainer.container import processors

_ALWAYS = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONFAULTHANDLER": "1",  # a crash in native code leaves a traceback in the log
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",  # the launcher fetched everything; a rank that asks a hub has a defect
    "HF_DATASETS_OFFLINE": "1",
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
}
_CPU = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
# Rows have many lengths: with the usual 1,024 compiled 16-bit products kept, memory grows by hundreds of MiB.
_CPU_DEFAULTS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
_CUDA = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}


def rank_environment(device: str, ranks_per_node: int, endpoint: str, base: Mapping[str, str]) -> dict[str, str]:
    """What every rank of this node shares. A variable the user has set wins, except those that make a rank ours."""
    defaults = {"OMP_NUM_THREADS": str(threads_per_rank(ranks_per_node))}
    defaults |= _CUDA if device == "cuda" else _CPU_DEFAULTS
    if device == "cpu" and is_loopback(host_of(endpoint)) and sys.platform == "linux":
        defaults["GLOO_SOCKET_IFNAME"] = "lo"  # all launchers are on this machine
    environment = {**defaults, **base, **_ALWAYS}
    return {**environment, **_CPU} if device == "cpu" else environment


def threads_per_rank(ranks_per_node: int) -> int:
    """This container's processors dealt to its ranks, at least one each."""
    allowed = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota = processors()
    return max(1, int(min(allowed, quota) if quota else allowed) // ranks_per_node)


def host_of(endpoint: str) -> str:
    """The host of ``host:port`` (IPv6 in brackets)."""
    return endpoint.rsplit(":", 1)[0].strip("[]")


def port_of(endpoint: str) -> int:
    """The port of ``host:port``. ``ValueError`` without one."""
    return int(endpoint.rsplit(":", 1)[1])


def is_loopback(host: str) -> bool:
    """Whether a host name or address means this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def own_address(endpoint: str) -> str:
    """The address of this machine that the other launchers can reach: the one that routes to the endpoint."""
    host = host_of(endpoint)
    if is_loopback(host):
        return "127.0.0.1" if host == "localhost" else host
    family, _, _, _, address = socket.getaddrinfo(host, port_of(endpoint), type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        return str(probe.getsockname()[0])
