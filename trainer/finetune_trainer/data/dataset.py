"""Token files on disk and how ranks read them: memory-mapped, never copied as a whole.

Layout of a prepared directory::

    prepared.json                  facts, counts, samples, file names, sizes of everything below; written last
    tokens.i32 mask.u8             every sample's tokens and whether each carries loss, one after the other
    offsets.i64                    sample i is tokens[offsets[i]:offsets[i + 1]]
    origin_file.i32 origin_line.i64
    train.rows.i64 train.offsets.i64             row r holds samples rows[offsets[r]:offsets[r + 1]]
    validation.rows.i64 validation.offsets.i64   only with validation
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_api.errors import DataError
from finetune_api.plan import DatasetFacts

FORMAT_VERSION = 1
INDEX_FILE = "prepared.json"
IGNORED_LABEL = -100

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One row: T tokens in S segments that never see each other."""

    input_ids: NDArray[np.int32]  # (T,)
    labels: NDArray[np.int32]  # (T,), -100: no loss; not shifted; the first of each segment is -100
    segment_lengths: NDArray[np.int32]  # (S,), sums to T


class TokenStore:
    """All samples of a prepared directory, memory-mapped."""

    def __init__(self, directory: Path, files: list[str]) -> None:
        self._tokens = _map(directory / "tokens.i32", np.int32)
        self._mask = _map(directory / "mask.u8", np.uint8)
        self.offsets = _map(directory / "offsets.i64", np.int64)
        self.supervised = _map(directory / "supervised.i64", np.int64)
        self._origin_file = _map(directory / "origin_file.i32", np.int32)
        self._origin_line = _map(directory / "origin_line.i64", np.int64)
        self._files = files

    def tokens(self, sample: int) -> tuple[NDArray[np.int32], NDArray[np.uint8]]:
        """Token ids (T,) and loss mask (T,) of one sample."""
        part = slice(int(self.offsets[sample]), int(self.offsets[sample + 1]))
        return self._tokens[part], self._mask[part]

    def origin(self, sample: int) -> str:
        """``file:line`` of the row that a sample was made of."""
        return f"{self._files[self._origin_file[sample]]}:{self._origin_line[sample]}"


class TokenDataset:
    """Rows of one split. A packed row holds several samples, an unpacked row one."""

    def __init__(self, store: TokenStore, samples: IntArray, row_offsets: IntArray) -> None:
        self._store = store
        self._samples = samples  # (all samples of the split,) in row order
        self._row_offsets = row_offsets  # (N + 1,)
        sizes = np.diff(store.offsets)[samples]
        self.lengths: IntArray = _sum_by_row(sizes, row_offsets)  # (N,) tokens per row
        self.supervised: IntArray = _sum_by_row(store.supervised[samples], row_offsets)  # (N,) labels with loss

    def __len__(self) -> int:
        return len(self._row_offsets) - 1

    def __getitem__(self, row: int) -> Sample:
        tokens, labels, lengths = [], [], []
        for sample in self._members(row):
            ids, mask = self._store.tokens(int(sample))
            tokens.append(ids)
            labels.append(np.where(mask != 0, ids, np.int32(IGNORED_LABEL)))
            lengths.append(len(ids))
        return Sample(np.concatenate(tokens), np.concatenate(labels), np.asarray(lengths, dtype=np.int32))

    def origin(self, row: int) -> str:
        """Where a row comes from, for messages: ``train.jsonl:7`` or ``train.jsonl:7, train.jsonl:9 and 3 more``."""
        members = self._members(row)
        named = ", ".join(self._store.origin(int(sample)) for sample in members[:2])
        return named if len(members) <= 2 else f"{named} and {len(members) - 2} more"

    def _members(self, row: int) -> IntArray:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self._samples[int(self._row_offsets[row]) : int(self._row_offsets[row + 1])]


@dataclass(frozen=True)
class PreparedData:
    """What ``prepare`` leaves behind and ranks open."""

    directory: Path
    facts: DatasetFacts
    counts: dict[str, Any]
    train: TokenDataset
    validation: TokenDataset | None
    samples: list[dict[str, Any]]  # a few validation rows: prompt, reference, prompt_ids, origin

    @classmethod
    def open(cls, directory: str | Path) -> PreparedData:
        """Maps the files of a prepared directory. Raises DataError when something is missing or has another size."""
        directory = Path(directory)
        index = read_index(directory)
        store = TokenStore(directory, index["files"])
        return cls(
            directory=directory,
            facts=DatasetFacts.model_validate(index["facts"]),
            counts=index["counts"],
            train=_split(directory, store, "train"),
            validation=_split(directory, store, "validation") if index["validation"] else None,
            samples=index["samples"],
        )


def read_index(directory: Path) -> dict[str, Any]:
    """``prepared.json`` after checking that every file it names has its size."""
    remedy = "delete the directory and run the job again"
    try:
        index: dict[str, Any] = json.loads((directory / INDEX_FILE).read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{directory}: no readable {INDEX_FILE} ({type(error).__name__}); {remedy}") from error
    if index.get("format_version") != FORMAT_VERSION:
        raise DataError(f"{directory}: format version {index.get('format_version')}, not {FORMAT_VERSION}; {remedy}")
    for name, size in index["sizes"].items():
        path = directory / name
        actual = path.stat().st_size if path.exists() else None
        if actual != size:
            raise DataError(f"{path}: {'missing' if actual is None else f'{actual} bytes'}, not {size}; {remedy}")
    return index


def write_index(directory: Path, index: dict[str, Any]) -> None:
    """Writes ``prepared.json`` last, with the sizes of the other files, and makes everything durable."""
    paths = sorted(path for path in directory.iterdir() if path.is_file())
    sizes = {path.name: path.stat().st_size for path in paths}
    document = {"format_version": FORMAT_VERSION, **index, "sizes": sizes}
    target = directory / INDEX_FILE
    target.write_text(json.dumps(document, ensure_ascii=False, indent=1))
    for path in [*paths, target, directory]:
        fsync(path)


def fsync(path: Path) -> None:
    """Makes a file or directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _split(directory: Path, store: TokenStore, name: str) -> TokenDataset:
    rows = _map(directory / f"{name}.rows.i64", np.int64)
    return TokenDataset(store, rows, _map(directory / f"{name}.offsets.i64", np.int64))


def _map(path: Path, dtype: type) -> NDArray[Any]:
    if path.stat().st_size == 0:
        return np.empty(0, dtype=dtype)
    return np.memmap(path, dtype=dtype, mode="r")


def _sum_by_row(values: IntArray, row_offsets: IntArray) -> IntArray:
    totals = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(values, dtype=np.int64)])
    return totals[row_offsets[1:]] - totals[row_offsets[:-1]]
