"""``prepare``: sources in, a directory of memory-mapped token files out; done once per content and settings."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.errors import DataError
from finetune_api.plan import DatasetFacts
from finetune_api.spec import DataFormat, Dataset
from finetune_api.trainer_config import TrainerConfig
from finetune_trainer.data.dataset import FORMAT_VERSION, PreparedData, fsync, write_index
from finetune_trainer.data.samples import ProgressClock, SampleMaker, SampleWriter, SourceCounts, format_of
from finetune_trainer.data.sources import Source, fetch_sources
from finetune_trainer.data.split import Split, assemble
from finetune_trainer.data.tokenizing import RecordEncoder, TokenizerFacts, check_tokenizer, load_tokenizer
from finetune_trainer.model_files import TOKENIZER_PATTERNS, matching_files

PREPARATION_VERSION = 1  # raised when the same input gives other tokens, masks, rows or counts

ReportProgress = Callable[[str], None]


@dataclass(frozen=True)
class _Job:
    """Everything that the preparation needs, checked."""

    dataset: Dataset
    sources: list[Source]
    formats: list[DataFormat]  # one per source
    tokenizer: Any
    facts: TokenizerFacts
    digest: str


def prepare(config: TrainerConfig, model_directory: Path, report_progress: ReportProgress) -> PreparedData:
    """Reads, checks, tokenises and packs the data sets of a job into ``<cache>/data/<digest>/``.

    The digest covers file contents, tokenizer files and settings, so a second call with the same input returns at
    once. Several processes may call it at the same time, and it may be killed at any moment: the directory appears
    whole or not at all.

    Raises:
        DataError: the data cannot be trained on; names file, line and remedy.
        ModelError: the tokenizer does not fit the model.
        StorageError, StorageUnavailable: from object storage.
    """
    cache = Path(config.cache_directory)
    dataset = config.spec.dataset
    report_progress("reading the data sources")
    sources = fetch_sources(dataset, cache)
    formats = [format_of(source) for source in sources]
    tokenizer = load_tokenizer(model_directory, config.spec.model.uri)
    facts = check_tokenizer(tokenizer, model_directory, formats, config.spec.model.uri)
    job = _Job(dataset, sources, formats, tokenizer, facts, _digest(dataset, sources, model_directory))
    home = cache / "data"
    home.mkdir(parents=True, exist_ok=True)
    target = home / job.digest
    with _lock(home / f".{job.digest}.lock", report_progress) as alone:
        found = _open_whole(target)
        if found is not None:
            report_progress(f"found prepared data ({len(found.train):,} rows)")
            return found
        if alone:
            _remove_leftovers(home, job.digest)
        staging = home / f"{_staging_prefix(job.digest)}{os.getpid()}.{uuid.uuid4().hex[:8]}"
        staging.mkdir()
        try:
            _build(job, staging, report_progress)
            return _publish(staging, target)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _build(job: _Job, staging: Path, report_progress: ReportProgress) -> None:
    encoders = {kind: RecordEncoder(job.tokenizer, job.facts, kind, job.dataset.loss_on) for kind in set(job.formats)}
    counts: list[SourceCounts] = []
    clock = ProgressClock(report_progress)
    with SampleWriter(staging) as writer:
        maker = SampleMaker(job.dataset, encoders, writer)
        for number, (source, kind) in enumerate(zip(job.sources, job.formats, strict=True)):
            counts.append(SourceCounts())
            for _ in maker.add(number, source, kind, counts[-1]):
                clock.rows(maker.rows)
    _check_usable(job, counts)
    writer.write_table()
    report_progress("packing" if job.dataset.packing else "ordering")
    split = assemble(job.dataset, job.sources, writer.table)
    split.write(staging)
    index = {
        "facts": _facts(job, split),
        "counts": _counts(job, counts, split, writer),
        "samples": split.readable_samples(job.tokenizer, staging),
        "validation": split.validation is not None,
        "files": [file.name for source in job.sources for file in source.files],
    }
    write_index(staging, index)


def _check_usable(job: _Job, counts: list[SourceCounts]) -> None:
    for validation, place in ((False, "spec.dataset.train"), (True, "spec.dataset.validation.sources")):
        parts = [one for one, source in zip(counts, job.sources, strict=True) if source.validation is validation]
        if not parts or any(one.used for one in parts):
            continue
        limit = job.dataset.max_sequence_length
        longer = "raise spec.dataset.maxSequenceLength or give shorter rows"
        reasons = (
            (sum(one.too_long for one in parts), f"longer than maxSequenceLength {limit}", longer),
            (sum(one.unsupervised for one in parts), f"without a label within maxSequenceLength {limit}", longer),
            (sum(one.not_selected for one in parts), "not selected by the weight", "raise the weight"),
        )
        told = ", ".join(f"{number} {reason}" for number, reason, _ in reasons if number)
        remedies = dict.fromkeys(remedy for number, _, remedy in reasons if number)
        raise DataError(
            f"{place}: no usable row among {sum(one.rows for one in parts)} ({told}); {' and '.join(remedies)}"
        )


def _facts(job: _Job, split: Split) -> dict[str, Any]:
    files = [file for source in job.sources for file in source.files]
    facts = DatasetFacts(
        files=len(files),
        bytes=sum(file.bytes for file in files),
        train_samples=len(split.train.offsets) - 1,
        validation_samples=len(split.validation.offsets) - 1 if split.validation else 0,
        train_tokens=split.train.tokens,
        exact=True,
        digest=job.digest,
    )
    return facts.model_dump(mode="json", by_alias=True)


def _counts(job: _Job, counts: list[SourceCounts], split: Split, writer: SampleWriter) -> dict[str, Any]:
    """What the report tells about the data; every number is of one epoch or of the files."""
    capacity, packed = job.dataset.max_sequence_length, job.dataset.packing

    def total(name: str) -> int:
        return sum(getattr(one, name) for one in counts)

    messages = DataFormat.MESSAGES in job.formats
    return {
        "rowsRead": total("rows"),
        "rowsUsed": total("used"),
        "dropped": _dropped(total),
        "truncated": total("truncated"),
        "duplicates": split.duplicates,
        "overlap": split.overlap,
        "straddlingRows": total("straddling"),
        "controlTokenRows": total("control_tokens"),
        "endTokens": writer.end_tokens,
        "chatTemplate": job.facts.chat_template if messages else None,
        "train": split.train.describe(capacity, packed),
        "validation": split.validation.describe(capacity, packed) if split.validation else None,
        "sources": [_source_counts(*parts) for parts in zip(job.sources, job.formats, counts, strict=True)],
    }


def _dropped(total: Callable[[str], int]) -> dict[str, int]:
    return {
        "tooLong": total("too_long"),
        "noSupervisedTokens": total("unsupervised"),
        "notSelected": total("not_selected"),
    }


def _source_counts(source: Source, kind: DataFormat, counts: SourceCounts) -> dict[str, Any]:
    return {
        "source": source.place,
        "uri": source.spec.uri,
        "format": kind.value,
        "weight": source.spec.weight,
        "files": [{"name": file.name, "bytes": file.bytes, "sha256": file.sha256} for file in source.files],
        "rowsRead": counts.rows,
        "rowsUsed": counts.used,
        "dropped": _dropped(lambda name: getattr(counts, name)),
        "truncated": counts.truncated,
    }


def _digest(dataset: Dataset, sources: list[Source], model_directory: Path) -> str:
    """sha256 over everything that the prepared files follow from; URIs and credentials are not part of it."""
    import jinja2
    import tokenizers
    import transformers

    settings = dataset.model_dump(mode="json", include={"max_sequence_length", "packing", "loss_on", "truncation"})
    tokenizer_files = {
        name: hashlib.sha256((model_directory / name).read_bytes()).hexdigest()
        for name in matching_files(model_directory, ("config.json", *TOKENIZER_PATTERNS))
    }
    document = {
        "versions": [FORMAT_VERSION, PREPARATION_VERSION],
        "libraries": [tokenizers.__version__, transformers.__version__, jinja2.__version__],
        "settings": settings,
        "fraction": dataset.validation.fraction if dataset.validation else None,
        "tokenizer": tokenizer_files,
        "sources": [
            {
                "place": source.place,
                "format": source.spec.format,
                "weight": source.spec.weight,
                "files": [[file.name, file.sha256] for file in source.files],
            }
            for source in sources
        ],
    }
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


@contextmanager
def _lock(path: Path, report_progress: ReportProgress) -> Iterator[bool]:
    """One preparer at a time where the file system has locks (True); else the rename decides who was first."""
    held = True
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report_progress("waiting for another process that prepares the same data")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            held = False
            report_progress(f"preparing without a lock, for the cache's file system has none ({error.strerror})")
        yield held


def _open_whole(target: Path) -> PreparedData | None:
    if not target.exists():
        return None
    try:
        return PreparedData.open(target)
    except DataError:
        return None  # damaged from outside; built again and replaced


def _staging_prefix(digest: str) -> str:
    return f".{digest}.{socket.gethostname()}."


def _remove_leftovers(home: Path, digest: str) -> None:
    """Of preparers that were killed on this host: nobody else works on this digest while its lock is held."""
    for path in home.glob(f"{glob.escape(_staging_prefix(digest))}*"):
        shutil.rmtree(path, ignore_errors=True)


def _publish(staging: Path, target: Path) -> PreparedData:
    """Renames the finished directory into place; another preparer's whole result is as good as ours."""
    try:
        staging.rename(target)
    except OSError:
        found = _open_whole(target)
        if found is not None:
            return found
        damaged = staging.with_name(staging.name + ".damaged")
        target.rename(damaged)
        staging.rename(target)
        shutil.rmtree(damaged, ignore_errors=True)
    fsync(target.parent)
    return PreparedData.open(target)
