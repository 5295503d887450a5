"""Which samples are trained on, how often, which are held out, and which samples share a row."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finetune_api.errors import DataError
from finetune_api.spec import Dataset
from finetune_trainer.data.packing import one_per_row, pack
from finetune_trainer.data.samples import SampleTable
from finetune_trainer.data.sources import Source

READABLE_SAMPLES = 4

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Rows:
    """One split: row r holds samples ``samples[offsets[r]:offsets[r + 1]]``."""

    samples: IntArray
    offsets: IntArray
    tokens: int
    supervised: int
    longest: int

    def describe(self, capacity: int, packed: bool) -> dict[str, Any]:
        """Counts of the report."""
        rows = len(self.offsets) - 1
        return {
            "samples": len(self.samples),
            "rows": rows,
            "tokens": self.tokens,
            "supervisedTokens": self.supervised,
            "maskedShare": round(1.0 - self.supervised / self.tokens, 6),
            "longestSample": self.longest,
            "packingEfficiency": round(self.tokens / (rows * capacity), 6) if packed else None,
        }


@dataclass(frozen=True)
class Split:
    train: Rows
    validation: Rows | None
    duplicates: int  # samples whose content an earlier sample has
    overlap: int  # samples of validation sources that are also trained on
    prompt_tokens: IntArray  # (samples of the store,)

    def write(self, directory: Path) -> None:
        """Writes the row tables of both splits."""
        for name, rows in (("train", self.train), ("validation", self.validation)):
            if rows is not None:
                rows.samples.tofile(directory / f"{name}.rows.i64")
                rows.offsets.tofile(directory / f"{name}.offsets.i64")

    def readable_samples(self, tokenizer: Any, directory: Path) -> list[dict[str, Any]]:
        """A few validation samples as text, for answers before and after training."""
        if self.validation is None:
            return []
        offsets = np.fromfile(directory / "offsets.i64", dtype=np.int64)
        tokens = np.memmap(directory / "tokens.i32", dtype=np.int32, mode="r")
        readable: list[dict[str, Any]] = []
        for sample in np.sort(self.validation.samples):
            ids = tokens[offsets[sample] : offsets[sample + 1]]
            cut = int(self.prompt_tokens[sample])
            if not 0 < cut < len(ids):
                continue
            prompt_ids = [int(token) for token in ids[:cut]]
            prompt = tokenizer.decode(prompt_ids, skip_special_tokens=False)
            reference = tokenizer.decode(ids[cut:].tolist(), skip_special_tokens=True).strip()
            readable.append({"prompt": prompt, "reference": reference, "prompt_ids": prompt_ids})
            if len(readable) == READABLE_SAMPLES:
                break
        return readable


def assemble(dataset: Dataset, sources: list[Source], table: SampleTable) -> Split:
    """Splits by content, copies by weight and packs.

    Raises:
        DataError: a split is left without a row.
    """
    source_of = np.array(table.sources, dtype=np.int64)
    from_validation = np.array([source.validation for source in sources])[source_of]
    split_keys = np.array(table.split_keys, dtype=np.uint64)
    fraction = dataset.validation.fraction if dataset.validation else None
    held_out = from_validation.copy()
    if fraction is not None:
        held_out |= ~from_validation & (split_keys < np.float64(fraction) * 2.0**64)
    weights = np.array([source.spec.weight for source in sources])[source_of]
    copies = _copies(np.array(table.weight_keys, dtype=np.uint64), weights)
    copies[held_out & ~from_validation] = 1  # a held-out row is measured once
    train = _repeated(np.flatnonzero(~held_out), copies[~held_out])
    validation = _repeated(np.flatnonzero(held_out), copies[held_out])
    _check_split(dataset, len(train), len(validation), int((~from_validation).sum()))
    overlap = np.isin(split_keys[from_validation], split_keys[~held_out]).sum()
    return Split(
        train=_rows(dataset, table, train),
        validation=_rows(dataset, table, validation) if len(validation) else None,
        duplicates=len(split_keys) - len(np.unique(split_keys)) - _shared(split_keys, from_validation),
        overlap=int(overlap),
        prompt_tokens=np.array(table.prompt_tokens, dtype=np.int64),
    )


def _copies(keys: NDArray[np.uint64], weights: NDArray[np.float64]) -> IntArray:
    """``RowKey.copies`` for all samples."""
    whole = np.floor(weights)
    return (whole + (keys < (weights - whole) * 2.0**64)).astype(np.int64)


def _repeated(samples: IntArray, copies: IntArray) -> IntArray:
    """All first copies, then all second ones, ...: packing then seldom puts two of a sample into one row."""
    rounds = range(int(copies.max(initial=0)))
    return np.concatenate([samples[:0], *(samples[copies > number] for number in rounds)])


def _shared(keys: NDArray[np.uint64], from_validation: NDArray[np.bool_]) -> int:
    """Contents that stand in training and in validation sources: told as overlap, not as duplicates."""
    return len(np.intersect1d(keys[from_validation], keys[~from_validation]))


def _rows(dataset: Dataset, table: SampleTable, samples: IntArray) -> Rows:
    lengths = np.array(table.lengths, dtype=np.int64)[samples]
    items, offsets = pack(lengths, dataset.max_sequence_length) if dataset.packing else one_per_row(len(samples))
    return Rows(
        samples=samples[items],
        offsets=offsets,
        tokens=int(lengths.sum()),
        supervised=int(np.array(table.supervised, dtype=np.int64)[samples].sum()),
        longest=int(lengths.max()),
    )


def _check_split(dataset: Dataset, train: int, validation: int, usable: int) -> None:
    if dataset.validation is None:
        return
    fraction = dataset.validation.fraction
    if not train:
        raise DataError(
            f"spec.dataset.validation.fraction: {fraction:g} holds out every one of {usable} usable rows; lower it"
        )
    if not validation and fraction is not None:
        raise DataError(
            f"spec.dataset.validation.fraction: {fraction:g} holds out none of {usable} usable rows; raise it, "
            "add rows or name spec.dataset.validation.sources"
        )
