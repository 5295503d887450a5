"""The ledger of attempts: every start of all ranks, how it ended, from where it resumed and what that cost. Pure.

An attempt is known by the word its launchers share (``gang``) and by its pods. Each pod stands in one attempt only, the
last one it took part in, so an end that is seen twice, late, or by several witnesses lands in the same entry, and
folding the same facts again changes nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from finetune_api.exits import ExitClass
from finetune_api.report import Phase
from finetune_api.status import FineTuneJobStatus, StatusAttempt, StatusRestarts
from finetune_operator.ends import End, ends, gone, leaving, published_at, publisher, short_uid, stopping
from finetune_operator.failures import ECHO, PodCause, policy
from finetune_operator.observe import Observed, PodView, parse_time
from finetune_operator.progress_view import STEPPING
from finetune_operator.sentences import ATTEMPT_LENGTH, cut, time_text

KEPT = 20
_CLOCKS_APART = timedelta(seconds=3)  # of nodes
_STEPPING = {phase.value for phase in (*STEPPING, Phase.PUBLISHING)}


@dataclass(frozen=True)
class Ledger:
    """What is known of all attempts."""

    attempts: tuple[StatusAttempt, ...] = ()
    total: int = 0
    restarts: Mapping[str, int] = field(default_factory=dict)  # ended attempts by cause

    @property
    def last(self) -> StatusAttempt | None:
        return self.attempts[-1] if self.attempts else None

    @property
    def is_open(self) -> bool:
        return self.last is not None and self.last.ended_at is None


def fold(before: FineTuneJobStatus, observed: Observed, newest: Sequence[PodView]) -> Ledger:
    """The ledger after this look. ``newest``: the newest pod of every index (empty if pods were not looked at)."""
    book = _Book(before)
    published = published_at(before, newest)
    for end in ends(observed):
        if published is None or end.ended_at < published:
            book.note(end)
    if published is None or book.last is None:
        book.note_missing(observed)
        book.open(observed, newest)
    book.finish(observed, newest)
    return book.closed()


class _Book:
    """The ledger while it is written; lives for one fold."""

    def __init__(self, before: FineTuneJobStatus) -> None:
        self.entries = list(before.attempts)
        self.total = max(before.total_attempts or 0, self.entries[-1].number if self.entries else 0)
        kept = Counter(entry.cause for entry in self.entries if entry.cause)
        known = Counter({row.cause: row.count for row in before.restarts})
        self.dropped = known - kept  # by attempts that are no longer listed
        said = before.progress
        self.step = said.step if said and said.phase in _STEPPING else None  # of the attempt that runs

    @property
    def last(self) -> StatusAttempt | None:
        return self.entries[-1] if self.entries else None

    # ---- ends -----------------------------------------------------------------------------------------------------

    def note(self, end: End) -> None:
        """Write ``end`` where it belongs; an attempt nobody has heard of gets an entry of its own."""
        if self._forgotten(end):
            return
        place = self._place(end)
        if place is None:
            place = self._enter(end)
        self.entries[place] = self._merged(self.entries[place], end)
        if end.uid:
            self._move({end.uid}, place)

    def _enter(self, end: End) -> int:
        """The place of a new entry: the last one, or before the attempt that runs now if it began after ``end``."""
        self.total += 1
        last = self.last
        if last is not None and last.ended_at is None:
            started = parse_time(last.started_at)
            if started is not None and started > end.ended_at:
                self.entries[-1:] = [_entry(last.number, end), last.model_copy(update={"number": self.total})]
                return len(self.entries) - 2
            self._close(end.started_at or end.created or end.ended_at)  # it ended unseen: two looks were far apart
        self.entries.append(_entry(self.total, end))
        return len(self.entries) - 1

    def _close(self, when: datetime) -> None:
        """The last attempt ended unseen, at ``when`` at the latest."""
        end = End("Unknown", when, "it ended between two looks of the operator")
        self.entries[-1] = self._merged(self.entries[-1], end)

    def _forgotten(self, end: End) -> bool:
        """Whether it belongs to an attempt that is no longer listed."""
        oldest = parse_time(self.entries[0].ended_at) if self.entries else None
        return self.total > len(self.entries) and oldest is not None and end.ended_at < oldest

    def _place(self, end: End) -> int | None:
        by_gang = self._of_gang(end.gang)
        if by_gang is not None:
            return by_gang
        by_pod = self._where(lambda entry: end.uid != "" and end.uid in entry.pods)
        if by_pod is not None and (not end.gang or not self.entries[by_pod].gang):
            return by_pod
        at = len(self.entries) - 1
        if at >= 0 and _began_after(self.entries[at], end):
            at -= 1
        if at < 0 or (end.gang and self.entries[at].gang):
            return None
        ended_at = parse_time(self.entries[at].ended_at)
        if ended_at is None:
            return at
        existed = end.created or end.started_at
        return at if existed is not None and existed <= ended_at else None

    def _of_gang(self, gang: str) -> int | None:
        return self._where(lambda entry: gang != "" and entry.gang == gang)

    def _where(self, matches: Callable[[StatusAttempt], bool]) -> int | None:
        return next((at for at in reversed(range(len(self.entries))) if matches(self.entries[at])), None)

    def _merged(self, entry: StatusAttempt, end: End) -> StatusAttempt:
        """The guilty end names the entry, best if it knows the pod; the first end dates it; all may fill in steps."""
        update: dict[str, object] = {"gang": entry.gang or end.gang or None}
        ended_at = parse_time(entry.ended_at)
        started_at = parse_time(entry.started_at)
        if end.started_at is not None and (started_at is None or end.started_at < started_at):
            update["started_at"] = time_text(end.started_at)
        if ended_at is None or end.ended_at < ended_at:
            update["ended_at"] = time_text(end.ended_at)
        blame, known = policy(end.cause).blame, policy(entry.cause).blame if entry.cause else None
        same_and_where = end.cause == entry.cause and bool(end.pod) and not entry.pod
        if known is None or blame < known or same_and_where:
            update |= {
                "cause": end.cause,
                "exit_code": end.exit_code,
                "pod": end.pod or None,
                "node": end.node or None,
                "message": cut(end.message, ATTEMPT_LENGTH) or None,
            }
        if entry.resumed_from_step is None and end.resumed_from_step is not None:
            update["resumed_from_step"] = end.resumed_from_step
        reached = [step for step in (entry.last_step, end.last_step) if step is not None]
        if entry.ended_at is None and entry.last_step is None and self.step is not None:
            reached.append(self.step)
        update["last_step"] = max(reached, default=None)
        return entry.model_copy(update=update)

    def note_missing(self, observed: Observed) -> None:
        """Pods of the last attempt that vanished or must go: its end if it is open, its cause if nobody knew better.

        An open one waits for its pods to end, unless they were suspended and the job is already resumed: who asked
        them to go is known now, and not when they have gone.
        """
        last = self.last
        if last is None or (last.cause is not None and policy(last.cause).blame < ECHO):
            return
        members = frozenset(last.pods)
        for end in gone(observed, members):
            self.note(end)
        for end in leaving(observed, members):
            if last.ended_at is not None or (end.cause == PodCause.SUSPENDED and not stopping(observed)):
                self.note(end)

    # ---- beginnings -----------------------------------------------------------------------------------------------

    def open(self, observed: Observed, newest: Sequence[PodView]) -> None:
        """Enter the attempt that runs now, and keep what is known of it up to date."""
        for page in observed.progress:
            if page.gang and self._of_gang(page.gang) is None and not _is_over(observed, page.gang):
                started = datetime.fromtimestamp(
                    page.attempt_started_at or observed.now.timestamp(), observed.now.tzinfo
                )
                self._begin(observed, page.gang, started)
        if self._should_begin_unnamed(observed, newest):
            self._begin(observed, "", observed.now)
        last = self.last
        if last is None or last.ended_at is not None:
            return
        alive = {short_uid(pod.uid) for pod in newest if pod.started is not None and not pod.ended}
        self._move(alive, len(self.entries) - 1)
        resumed = [
            rank.resumed_from_step
            for page in observed.progress
            if page.gang and page.gang == last.gang
            for rank in page.ranks
            if rank.resumed_from_step is not None
        ]
        if resumed:
            self.entries[-1] = self.entries[-1].model_copy(update={"resumed_from_step": min(resumed)})

    def _begin(self, observed: Observed, gang: str, started: datetime) -> None:
        last = self.last
        if last is not None and last.ended_at is None:
            if gang and not last.gang:
                self.entries[-1] = last.model_copy(update={"gang": gang})
                return
            self._close(observed.now)
        self.total += 1
        self.entries.append(StatusAttempt(number=self.total, started_at=time_text(started), gang=gang or None))

    def _should_begin_unnamed(self, observed: Observed, newest: Sequence[PodView]) -> bool:
        """All pods are ready: for the first time, or with a new one among them and no launcher to ask for its gang."""
        job, last = observed.job, self.last
        if job is None or job.complete or job.failure or job.suspended or job.ready < job.nodes:
            return False
        if last is None:
            return not any(pod.ended for pod in newest)
        if last.ended_at is None or observed.pods is None or len(newest) < job.nodes:
            return False
        known = {uid for entry in self.entries for uid in entry.pods}
        all_ready = all(pod.ready and not pod.ended and pod.deleted is None for pod in newest)
        return all_ready and not observed.progress and any(short_uid(pod.uid) not in known for pod in newest)

    def _move(self, uids: set[str], place: int) -> None:
        """A pod stands in the last attempt that it took part in, and there only."""
        here = self.entries[place]
        later = {uid for entry in self.entries[place + 1 :] for uid in entry.pods}
        new = uids - set(here.pods) - later
        if not new:
            return
        for at, entry in enumerate(self.entries[:place]):
            if new & set(entry.pods):
                self.entries[at] = entry.model_copy(update={"pods": tuple(u for u in entry.pods if u not in new)})
        self.entries[place] = here.model_copy(update={"pods": (*here.pods, *sorted(new))})

    # ---- the last page --------------------------------------------------------------------------------------------

    def finish(self, observed: Observed, newest: Sequence[PodView]) -> None:
        """The job is over: so is its last attempt."""
        job, last = observed.job, self.last
        if job is None or last is None or last.ended_at is not None:
            return
        first = publisher(newest)
        if job.complete or first is not None:
            first = first or next((pod for pod in newest if pod.index == 0 and pod.phase == "Succeeded"), None)
            said = first.termination if first else None
            step = said.step if said else self.step
            ended_at = (first.finished if first else None) or observed.now
            self.note(
                End(
                    ExitClass.COMPLETED.value,
                    ended_at,
                    "training finished",
                    last.gang or "",
                    exit_code=0,
                    resumed_from_step=said.resumed_from_step if said else None,
                    last_step=step,
                )
            )
        elif job.failure:
            reason, message = job.failure
            cause = reason if reason == "DeadlineExceeded" else "Unknown"
            self.note(End(cause, observed.now, message, last.gang or ""))

    def closed(self) -> Ledger:
        """With costs, totals, and the oldest entries left out.

        A step that is resumed from was reached, whether or not the last words of a pod that was removed were heard.
        """
        for at, (entry, following) in enumerate(zip(self.entries, self.entries[1:], strict=False)):
            if entry.last_step is not None and following.resumed_from_step is not None:
                reached = max(entry.last_step, following.resumed_from_step)
                costs = {"last_step": reached, "lost_steps": reached - following.resumed_from_step}
                self.entries[at] = entry.model_copy(update=costs)
        counts = self.dropped + Counter(entry.cause for entry in self.entries if entry.cause)
        return Ledger(tuple(self.entries[-KEPT:]), self.total, dict(sorted(counts.items())))


def _entry(number: int, end: End) -> StatusAttempt:
    started = end.started_at or end.created
    return StatusAttempt(number=number, started_at=time_text(started) if started else None, gang=end.gang or None)


def _began_after(entry: StatusAttempt, end: End) -> bool:
    """Whether the attempt that runs began when a pod that nobody had seen was dead already; launchers date it."""
    started = parse_time(entry.started_at)
    if entry.ended_at is not None or not entry.gang or started is None:
        return False
    return end.ended_at + _CLOCKS_APART < started


def _is_over(observed: Observed, gang: str) -> bool:
    return any(ended.gang == gang for page in observed.progress for ended in page.ended)


def restart_rows(restarts: Mapping[str, int]) -> tuple[StatusRestarts, ...]:
    """The totals as they stand in the status; attempts that completed are not restarts."""
    return tuple(
        StatusRestarts(cause=cause, count=number)
        for cause, number in restarts.items()
        if cause != ExitClass.COMPLETED.value
    )
