"""Where the launchers of a job meet: torchrun's c10d rendezvous at the endpoint of the launcher with node rank 0."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
import sys
import time
from collections.abc import Callable
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from finetune_api.errors import FineTuneError
from finetune_api.exits import ExitClass
from finetune_api.trainer_config import Rendezvous
from finetune_trainer.rank_environment import host_of, own_address, port_of

_READ_TIMEOUT_SECONDS = 60
LONGEST_SILENCE_SECONDS = 120  # a store that acknowledges nothing for so long is lost with its machine


class RendezvousFailedError(FineTuneError):
    """The launchers did not find each other in time."""

    exit_class = ExitClass.RENDEZVOUS_FAILED


def wait_for_endpoint(rendezvous: Rendezvous, node_rank: int, tick: Callable[[], None]) -> None:
    """Return when something listens at the endpoint (in a cluster its name may not even resolve at first).

    Done here rather than in the store's constructor because that one cannot be interrupted by a signal.
    """
    host, port = host_of(rendezvous.endpoint), port_of(rendezvous.endpoint)
    deadline = time.monotonic() + rendezvous.timeout_seconds
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise RendezvousFailedError(
                    f"the launcher of node {node_rank} could not reach node 0 at {rendezvous.endpoint} within"
                    f" {rendezvous.timeout_seconds} s ({error})",
                    "see whether the launcher of node 0 runs and whether a firewall or NetworkPolicy is in the way",
                ) from error
        tick()
        time.sleep(0.5)


def join(rendezvous: Rendezvous, node_rank: int, run_id: str, collective_timeout_seconds: int) -> RendezvousHandler:
    """Host the store (node rank 0) or connect to it. The launchers' patience with silence is not above the ranks'."""
    parameters = RendezvousParameters(
        backend="c10d",
        endpoint=rendezvous.endpoint,
        run_id=run_id,
        min_nodes=rendezvous.minimum_nodes,
        max_nodes=rendezvous.maximum_nodes,
        local_addr=own_address(rendezvous.endpoint),
        is_host="true" if node_rank == 0 else "false",
        join_timeout=str(rendezvous.timeout_seconds),
        read_timeout=str(_READ_TIMEOUT_SECONDS),
    )
    try:
        handler = get_rendezvous_handler(parameters)
    except RendezvousConnectionError as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        doing = "host" if node_rank == 0 else "reach"
        raise RendezvousFailedError(
            f"node {node_rank} could not {doing} the rendezvous store at {rendezvous.endpoint}: {reason}",
            "see whether the port is free and the address belongs to node 0",
        ) from error
    bound_silence(port_of(rendezvous.endpoint), min(LONGEST_SILENCE_SECONDS, collective_timeout_seconds))
    return handler


def bound_silence(port: int, seconds: int) -> int:
    """Let requests to stores at ``port`` of silent machines fail after ``seconds``. Returns how many connections.

    torch waits for most answers of its store without a limit: one whose machine lost power says nothing, and the kernel
    gives up after a quarter of an hour. torch keeps its sockets to itself, so they are found by what they are.
    """
    if sys.platform != "linux":
        return 0
    bounded = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile, or listens and has no peer
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as connection:
                if connection.family in {socket.AF_INET, socket.AF_INET6} and connection.getpeername()[1] == port:
                    _bound(connection, seconds)
                    bounded += 1
    return bounded


def _bound(connection: socket.socket, seconds: int) -> None:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, seconds * 1000)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # the answer may be lost and not the request
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, seconds // 3))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, seconds // 6))


class AttemptStore:
    """The store of one attempt, shared by its launchers: who is there, who failed, who is done."""

    _TIMEOUT = timedelta(seconds=_READ_TIMEOUT_SECONDS)

    def __init__(self, info: RendezvousInfo, node_rank: int) -> None:
        self._store: Store = PrefixStore("finetune", info.store)
        self._group_rank = info.rank
        self._node_rank = node_rank
        self.nodes = info.world_size
        self._server: TCPStore | None = None

    def node_position(self) -> int:
        """This node's place among those present, ordered by node rank (not by address, as torchrun does)."""
        self._store.set(f"node/{self._group_rank}", str(self._node_rank))
        keys = [f"node/{index}" for index in range(self.nodes)]
        self._store.wait(keys, self._TIMEOUT)
        return sorted(int(value) for value in self._store.multi_get(keys)).index(self._node_rank)

    def worker_endpoint(self, position: int, address: str) -> tuple[str, int]:
        """Where the ranks' process group meets: a fresh server per attempt, so that no key of a dead one is left."""
        if position == 0:
            self._server = TCPStore(address, 0, is_master=True, wait_for_workers=False)
            self._store.set("worker_endpoint", f"{address} {self._server.port}")
        self._store.wait(["worker_endpoint"], self._TIMEOUT)
        host, port = self._store.get("worker_endpoint").decode().split(" ")
        return host, int(port)

    def gang(self) -> str:
        """A word that names this attempt, the same on every launcher."""
        return self._store.compare_set("gang", "", secrets.token_hex(4)).decode()

    def agree_on_failure(self, text: str) -> str:
        """Propose the guilty rank; the first proposal stands for every launcher."""
        return self._store.compare_set("failure", "", text).decode()

    def failure(self) -> str | None:
        """What another launcher proposed, if one did."""
        return self._store.get("failure").decode() if self._store.check(["failure"]) else None

    def set_done(self) -> None:
        """All ranks of this node have completed."""
        self._store.set(f"done/{self._group_rank}", "1")

    def all_done(self) -> bool:
        """Whether the ranks of every node have completed."""
        return self._store.check([f"done/{index}" for index in range(self.nodes)])

    def leave(self, timeout_seconds: float) -> None:
        """Say good-bye; the host of the store waits until everybody has, because the store goes with it."""
        self._store.set(f"left/{self._group_rank}", "1")
        deadline = time.monotonic() + timeout_seconds
        keys = [f"left/{index}" for index in range(self.nodes)]
        while self._node_rank == 0 and not self._store.check(keys) and time.monotonic() < deadline:
            time.sleep(0.05)

    def close(self) -> None:
        """Stop serving the ranks' store."""
        self._server = None


__all__ = [
    "AttemptStore",
    "RendezvousFailedError",
    "join",
    "wait_for_endpoint",
]
