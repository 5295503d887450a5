"""Live progress of a run on standard error: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, TextIO

from finetune_api.report import Heartbeat, Phase, Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

_WORDS = {
    Phase.FETCHING_MODEL: "fetching model files",
    Phase.PREPARING_DATA: "preparing data",
    Phase.RENDEZVOUS: "waiting for all nodes",
    Phase.LOADING_MODEL: "loading model",
    Phase.TRAINING: "training",
    Phase.EVALUATING: "evaluating",
    Phase.CHECKPOINTING: "writing a checkpoint",
    Phase.PUBLISHING: "publishing",
    Phase.DONE: "done",
}
LINE_EVERY_SECONDS = 10.0
LINE_EVERY_FRACTION = 0.05
LINE_APART_SECONDS = 2.0


@dataclass(frozen=True)
class Snapshot:
    """One look at a job, wherever it runs: ``step`` once ``total_steps`` is known, ``done`` of ``total`` before."""

    kind: str  # changes with the phase; evaluating and checkpointing are part of training
    words: str
    step: int = 0
    total_steps: int = 0
    numbers: tuple[str, ...] = ()
    done: float | None = None
    total: float | None = None

    @property
    def text(self) -> str:
        """``step 3/6, loss 1.2345``; empty while nothing is trained."""
        return ", ".join([f"step {self.step}/{self.total_steps}", *self.numbers]) if self.total_steps else ""


class View(Protocol):
    """Shows the latest progress; ``say`` prints a sentence without disturbing it."""

    def __enter__(self) -> View: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def show(self, now: Snapshot) -> None: ...
    def say(self, sentence: str) -> None: ...


def make_view(stream: TextIO | None = None) -> View:
    """A bar where ``stream`` (default: standard error) is a terminal, else plain lines."""
    stream = stream or sys.stderr
    return BarView() if stream.isatty() else LineView(stream)


def leading_rank(progress: Progress) -> Heartbeat | None:
    """The heartbeat that speaks for the job: rank 0's, else the lowest one here."""
    return progress.ranks[0] if progress.ranks else None


def phase_words(progress: Progress) -> str:
    """Where the job is, in words."""
    if progress.stopping:
        return "writing a checkpoint before stopping"
    words = _WORDS[progress.phase]
    if not progress.ranks and progress.message:
        words = progress.message
        if progress.done is not None and progress.total:
            words += f" ({100 * progress.done / progress.total:.0f} %)"
    return words + (f" (attempt {progress.attempt})" if progress.attempt > 1 else "")


def snapshot(progress: Progress) -> Snapshot:
    """What a launcher's ``/progress`` says."""
    beat = leading_rank(progress)
    kind = "loop" if progress.phase in {Phase.TRAINING, Phase.EVALUATING, Phase.CHECKPOINTING} else progress.phase.value
    if beat is None or not beat.total_steps:
        return Snapshot(kind, phase_words(progress), done=progress.done, total=progress.total)
    return Snapshot(kind, phase_words(progress), beat.step, beat.total_steps, tuple(numbers(beat)))


def final_snapshot(step: int, metrics: Mapping[str, float]) -> Snapshot:
    """A job that has completed: its last page may have come and gone between two looks."""
    names = {"trainLoss": "loss", "validationLoss": "validation loss"}
    known = tuple(f"{words} {metrics[name]:.4f}" for name, words in names.items() if name in metrics)
    return Snapshot(Phase.DONE.value, _WORDS[Phase.DONE], step, step, known)


def eta_seconds(beat: Heartbeat) -> float | None:
    """Remaining steps times the mean step of this attempt."""
    steps = sum(beat.step_seconds_counts)
    if not steps or not beat.total_steps:
        return None
    return (beat.total_steps - beat.step) * beat.step_seconds_sum / steps


def duration(seconds: float) -> str:
    """``48 s``, ``3 min 20 s``, ``5 h 02 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def numbers(beat: Heartbeat) -> list[str]:
    """Loss, validation loss, speed and time left, as far as known."""
    parts = []
    if beat.loss is not None:
        parts.append(f"loss {beat.loss:.4f}")
    if beat.validation_loss is not None:
        parts.append(f"validation loss {beat.validation_loss:.4f}")
    if beat.tokens_per_second is not None:
        parts.append(f"{beat.tokens_per_second:,.0f} tokens/s")
    left = eta_seconds(beat)
    if left is not None and beat.phase in {Phase.TRAINING, Phase.EVALUATING, Phase.CHECKPOINTING}:
        parts.append(f"about {duration(left)} left")
    return parts


class LineView:
    """A line when the phase changes, every ten seconds, or every five percent of the steps (two seconds apart)."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._said_at = 0.0
        self._said: tuple[str, int] = ("", 0)

    def __enter__(self) -> LineView:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def show(self, now: Snapshot) -> None:
        stride = max(1.0, LINE_EVERY_FRACTION * now.total_steps) if now.total_steps else float("inf")
        at = time.monotonic()
        waited = at - self._said_at
        moved = now.step - self._said[1] >= stride and waited >= LINE_APART_SECONDS
        if now.kind == self._said[0] and not moved and waited < LINE_EVERY_SECONDS:
            return
        self._said, self._said_at = (now.kind, now.step), at
        self.say(f"{now.words}, {now.text}" if now.text else now.words)

    def say(self, sentence: str) -> None:
        print(sentence, file=self._stream, flush=True)


class BarView:
    """One live bar: phase, step of total, loss, speed, time left."""

    def __init__(self) -> None:
        self._bar: Bar | None = None

    def __enter__(self) -> BarView:
        from rich.console import Console
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=None, numbers="")
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, now: Snapshot) -> None:
        assert self._bar is not None
        trains = now.total_steps > 0
        self._bar.update(
            self._task,
            description=now.words,
            completed=now.step if trains else now.done or 0.0,
            total=now.total_steps if trains else now.total,
            numbers=now.text,
        )

    def say(self, sentence: str) -> None:
        assert self._bar is not None
        self._bar.console.print(sentence, markup=False, highlight=False)
