"""Rows of the sources become samples in token files: parsed, selected, tokenised in batches, truncated, counted."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

import numpy as np

from finetune_api.errors import DataError
from finetune_api.spec import DataFormat, Dataset, Truncation
from finetune_trainer.data.chat import Span
from finetune_trainer.data.formats import Record, detect_format, parse_record
from finetune_trainer.data.readers import read_rows
from finetune_trainer.data.sources import Source, SourceFile
from finetune_trainer.data.tokenizing import Encoded, RecordEncoder

BATCH_ROWS = 512


@dataclass
class SourceCounts:
    """What became of a source's rows."""

    rows: int = 0
    used: int = 0
    too_long: int = 0  # truncation: Drop
    unsupervised: int = 0  # no label left that carries loss
    not_selected: int = 0  # by a weight below 1
    truncated: int = 0
    straddling: int = 0  # rows with a token over the start of a completion
    control_tokens: int = 0  # rows whose own text spells a special token


@dataclass(frozen=True)
class RowKey:
    """Two independent 64-bit numbers of a row's content: one decides the split, the other the weight."""

    split: int
    weight: int

    @classmethod
    def of(cls, digest: bytes) -> RowKey:
        return cls(int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little"))

    def copies(self, weight: float) -> int:
        """How often a row stands in an epoch: ``weight`` rounded down or, for the fraction's share of rows, up."""
        whole = math.floor(weight)
        return whole + (self.weight < (weight - whole) * 2.0**64)


@dataclass
class SampleTable:
    """One entry per sample, in the order of the token files."""

    lengths: array[int] = field(default_factory=lambda: array("q"))
    supervised: array[int] = field(default_factory=lambda: array("q"))
    prompt_tokens: array[int] = field(default_factory=lambda: array("q"))
    files: array[int] = field(default_factory=lambda: array("i"))
    lines: array[int] = field(default_factory=lambda: array("q"))
    sources: array[int] = field(default_factory=lambda: array("i"))
    split_keys: array[int] = field(default_factory=lambda: array("Q"))
    weight_keys: array[int] = field(default_factory=lambda: array("Q"))

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class _Pending:
    """A rendered row that waits for its batch."""

    rendered: tuple[str, tuple[Span, ...]]
    file: int
    line: int
    key: RowKey


class SampleWriter:
    """Appends samples to ``tokens.i32`` and ``mask.u8`` and remembers the rest in a table."""

    def __init__(self, directory: Path) -> None:
        self.table = SampleTable()
        self.end_tokens = 0  # labels that teach an end token
        self._directory = directory
        self._tokens = (directory / "tokens.i32").open("wb", buffering=2**20)
        self._mask = (directory / "mask.u8").open("wb", buffering=2**20)

    def __enter__(self) -> SampleWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._tokens.close()
        self._mask.close()

    def append(self, encoded: Encoded, pending: _Pending, source: int) -> None:
        """Adds one sample."""
        self._tokens.write(encoded.ids.tobytes())
        self._mask.write(encoded.mask.tobytes())
        table = self.table
        table.lengths.append(len(encoded.ids))
        table.supervised.append(int(encoded.mask.sum()))
        table.prompt_tokens.append(encoded.prompt_tokens)
        table.files.append(pending.file)
        table.lines.append(pending.line)
        table.sources.append(source)
        table.split_keys.append(pending.key.split)
        table.weight_keys.append(pending.key.weight)

    def write_table(self) -> None:
        """Writes the remaining files that ranks map."""
        lengths = np.array(self.table.lengths, dtype=np.int64)
        np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]).tofile(self._directory / "offsets.i64")
        np.array(self.table.supervised, dtype=np.int64).tofile(self._directory / "supervised.i64")
        np.array(self.table.files, dtype=np.int32).tofile(self._directory / "origin_file.i32")
        np.array(self.table.lines, dtype=np.int64).tofile(self._directory / "origin_line.i64")


class SampleMaker:
    """Reads one source after the other into a writer."""

    def __init__(self, dataset: Dataset, encoders: dict[DataFormat, RecordEncoder], writer: SampleWriter) -> None:
        self._dataset = dataset
        self._encoders = encoders
        self._writer = writer
        self._files = 0
        self.rows = 0  # read so far, for progress

    def add(self, number: int, source: Source, kind: DataFormat, counts: SourceCounts) -> Iterator[None]:
        """Reads a source into the writer and its counts; yields after every batch so that progress can be told."""
        for index, file in enumerate(source.files, start=self._files):
            batch: list[_Pending] = []
            for pending in self._pending(source, kind, file, index, counts):
                batch.append(pending)
                if len(batch) == BATCH_ROWS:
                    self._encode(number, kind, file.name, batch, counts)
                    batch = []
                    yield
            self._encode(number, kind, file.name, batch, counts)
        self._files += len(source.files)

    def _pending(
        self, source: Source, kind: DataFormat, file: SourceFile, index: int, counts: SourceCounts
    ) -> Iterator[_Pending]:
        encoder, ids = self._encoders[kind], UniqueIds(file)
        for line, row in read_rows(file.path, file.name):
            place = f"{file.name}:{line}"
            record = parse_record(row, kind, self._dataset.loss_on, place)
            ids.add(row.get("id"), record, line)
            counts.rows += 1
            self.rows += 1
            key = RowKey.of(record.digest)
            if key.copies(source.spec.weight) == 0:
                counts.not_selected += 1
                continue
            counts.control_tokens += encoder.spells_special_token(record)
            yield _Pending(encoder.render(record, place), index, line, key)
        ids.check()

    def _encode(self, number: int, kind: DataFormat, name: str, batch: list[_Pending], counts: SourceCounts) -> None:
        encoder = self._encoders[kind]
        for pending, encoded in zip(batch, encoder.encode([one.rendered for one in batch]), strict=True):
            fitted = self._fit(encoded, f"{name}:{pending.line}", counts)
            if fitted is None:
                continue
            if not fitted.mask.any():
                counts.unsupervised += 1
                continue
            counts.used += 1
            counts.straddling += fitted.straddling
            self._writer.end_tokens += encoder.end_tokens(fitted)
            self._writer.append(fitted, pending, number)

    def _fit(self, encoded: Encoded, place: str, counts: SourceCounts) -> Encoded | None:
        limit, tokens = self._dataset.max_sequence_length, len(encoded.ids)
        if tokens <= limit:
            return encoded
        if self._dataset.truncation is Truncation.FAIL:
            raise DataError(
                f"{place}: {tokens} tokens, more than maxSequenceLength {limit}; shorten the row, raise "
                "spec.dataset.maxSequenceLength or set truncation to Drop or Truncate"
            )
        if self._dataset.truncation is Truncation.DROP:
            counts.too_long += 1
            return None
        counts.truncated += 1
        return Encoded(encoded.ids[:limit], encoded.mask[:limit], min(encoded.prompt_tokens, limit), encoded.straddling)


class UniqueIds:
    """Notices rows of one file that share their ``id`` but not their content. 24 bytes per row that has an id."""

    def __init__(self, file: SourceFile) -> None:
        self._file = file
        self._ids, self._contents, self._lines = array("q"), array("Q"), array("q")

    def add(self, identity: Any, record: Record, line: int) -> None:
        if isinstance(identity, str | int) and identity != "":
            self._ids.append(hash_of(identity))
            self._contents.append(RowKey.of(record.digest).split)
            self._lines.append(line)

    def check(self) -> None:
        """Raises DataError naming both lines and the id."""
        ids, contents = np.array(self._ids, dtype=np.int64), np.array(self._contents, dtype=np.uint64)
        order = np.lexsort((np.array(self._lines, dtype=np.int64), ids))
        same = (ids[order][1:] == ids[order][:-1]) & (contents[order][1:] != contents[order][:-1])
        if not same.any():
            return
        at = int(np.flatnonzero(same)[np.argmin(np.array(self._lines)[order][1:][same])])
        first, second = self._lines[order[at]], self._lines[order[at + 1]]
        value = next(row["id"] for line, row in read_rows(self._file.path, self._file.name) if line == second)
        raise DataError(
            f"{self._file.name}:{second}: id {value!r} stands also in line {first} with other content; "
            "make ids unique or remove the wrong row"
        )


def hash_of(identity: str | int) -> int:
    """A 64-bit number of an id that is the same in every process."""
    from hashlib import blake2b

    return int.from_bytes(
        blake2b(repr(identity).encode(errors="replace"), digest_size=8).digest(), "little", signed=True
    )


def format_of(source: Source) -> DataFormat:
    """The format that the spec sets, else the one that the columns of the first row show."""
    if source.spec.format is not None:
        return source.spec.format
    for file in source.files:
        for _, row in read_rows(file.path, file.name):
            return detect_format(list(row), source.place, file.name)
    names = ", ".join(file.name for file in source.files[:3])
    raise DataError(f"{source.place}: no row in {names}; add rows or remove the source")


@dataclass
class ProgressClock:
    """Lets a message through at most once per second."""

    report: Any
    started: float = field(default_factory=monotonic)
    last: float = 0.0

    def rows(self, count: int) -> None:
        now = monotonic()
        if now - self.last >= 1.0:
            self.last = now
            rate = count / max(now - self.started, 1e-9)
            self.report(f"tokenised {count:,} rows ({rate:,.0f} rows/s)")
