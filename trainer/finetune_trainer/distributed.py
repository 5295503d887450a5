"""One rank's place in the job, and the few collectives the loop needs."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from finetune_api.errors import FineTuneError

T = TypeVar("T")
_MEETING_SECONDS = 3.0  # well below the shortest collective timeout, which is 10 s


@dataclass(frozen=True)
class RankContext:
    """Who this process is. ``device`` computes; collectives on small Python objects go through the CPU (gloo)."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    @property
    def is_first_on_node(self) -> bool:
        return self.local_rank == 0

    def all_reduce_sum(self, values: Sequence[float]) -> list[float]:
        """Element-wise sum over ranks, in fp64 on the CPU group."""
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """One object per rank, in rank order, on every rank."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def broadcast(self, value: Any) -> Any:
        """Rank 0's object on every rank."""
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def barrier(self) -> None:
        self.all_reduce_sum([0.0])

    def apart(self, work: Callable[[], T]) -> list[T]:
        """Work without collectives that takes some rank long (storage, a merge); what came of it, in rank order.

        The others would give up a collective that waits for it: so the ranks meet again and again while it goes on,
        on a thread of its own. What ``work`` raises is raised on its rank alone.
        """
        if self.world_size == 1:
            return [work()]
        going = _Going(work)
        while True:
            told = self.gather(going.wait(_MEETING_SECONDS))
            if all(over for over, _ in told):
                return [result for _, result in told]

    def together(self, work: Callable[[], T]) -> list[T]:
        """The same, but a :class:`FineTuneError` of any rank is raised on every rank."""

        def guarded() -> tuple[T | None, tuple[Any, ...] | None]:
            try:
                return work(), None
            except FineTuneError as error:
                troubles.append(error)
                return None, (error.exit_class, str(error), error.hint)

        troubles: list[FineTuneError] = []
        ended = self.apart(guarded)
        if troubles:
            raise troubles[0]
        for _, told in ended:
            if told is not None:
                trouble = FineTuneError(told[1], hint=told[2])
                trouble.exit_class = told[0]
                raise trouble
        return [result for result, _ in ended]  # type: ignore[misc]


class _Going(Generic[T]):
    """Work on a thread of its own, which holds up no end of the process."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._result: tuple[bool, T | None] = (False, None)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._result = (True, self._work())
        except BaseException as error:
            self._error = error

    def wait(self, seconds: float) -> tuple[bool, Any]:
        """Whether it is over by then, and what came of it; raises what it raised."""
        self._thread.join(seconds)
        if self._error is not None:
            raise self._error
        return self._result


def join_process_group(device_type: str, timeout_seconds: int) -> RankContext:
    """Initialise torch.distributed from torchrun's environment (also for one rank) and return this rank's place."""
    local_rank = int(os.environ["LOCAL_RANK"])
    if device_type == "cuda":
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_seconds))
    return RankContext(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        local_rank=local_rank,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        device=device,
    )
