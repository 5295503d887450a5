"""What the planner wants to know before anything runs, from listings and headers: never weights, never whole data."""

from __future__ import annotations

import importlib.util
import io
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from finetune_api.errors import DataError, ModelError
from finetune_api.model_facts import model_facts_from_config
from finetune_api.plan import DatasetFacts, Facts, ModelFacts
from finetune_api.spec import Dataset, DataSource, FineTuneJobSpec, Initialization, Model, ObjectLocation
from finetune_storage.store import ObjectInfo, ObjectNotFound, ObjectStore
from finetune_storage.uri import split_uri

INDEX = "model.safetensors.index.json"
_DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".ndjson", ".parquet", ".arrow", ".csv")
_HEAD_BYTES = 256 * 1024
_PATIENCE_SECONDS = 20.0  # a person waits for `finetune plan`


def read_facts(spec: FineTuneJobSpec, *, environment: Mapping[str, str] | None = None) -> Facts:
    """Facts of the model and the data set that ``spec`` names.

    Raises:
        ModelError, DataError: something named is not there, or its header is unreadable.
        StorageError, StorageUnavailable: the store refuses or does not answer within 20 s.
    """
    return Facts(
        model=read_model_facts(spec.model, environment=environment),
        dataset=read_dataset_facts(spec.dataset, environment=environment),
    )


def read_model_facts(model: Model, *, environment: Mapping[str, str] | None = None) -> ModelFacts | None:
    """Facts from config.json and the weights' sizes; ``None`` for a hub model that cannot be looked up from here."""
    if model.uri.startswith("hf://"):
        return _hub_facts(model)
    store = _open(model, model.uri, environment)
    listing = {info.path: info.bytes for info in store.list() if "/" not in info.path}
    if "config.json" not in listing:
        raise ModelError(
            f"The base model {model.uri} has no config.json; point spec.model.uri at the directory that has it."
        )
    config = _json(store.get("config.json"), store.join("config.json"))
    facts = model_facts_from_config(config, _index(store, listing))
    sizes = [size for name, size in listing.items() if name.endswith(".safetensors")]
    if sizes and model.initialization is Initialization.PRETRAINED:
        facts = facts.model_copy(update={"weight_bytes": sum(sizes)})
    return facts.model_copy(update={"revision": model.revision}) if model.revision else facts


def _index(store: ObjectStore, listing: Mapping[str, int]) -> dict[str, Any] | None:
    return _json(store.get(INDEX), store.join(INDEX)) if INDEX in listing else None


def _hub_facts(model: Model) -> ModelFacts | None:
    """Through huggingface_hub where it is installed; the trainer reads the same files again."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return None
    from huggingface_hub import errors, hf_hub_download

    name, _, revision = model.uri.removeprefix("hf://").partition("@")
    revision = revision or (model.revision or "")
    try:
        with open(hf_hub_download(name, "config.json", revision=revision or None), "rb") as file:
            config = _json(file.read(), f"{model.uri}/config.json")
    except errors.EntryNotFoundError:
        raise ModelError(f"The base model {model.uri} has no config.json; correct spec.model.uri.") from None
    except (errors.HfHubHTTPError, errors.HFValidationError, OSError):
        return None  # offline or private: the launcher, which has the credentials, says so if it matters
    facts = model_facts_from_config(config)
    return facts.model_copy(update={"revision": revision}) if revision else facts


def read_dataset_facts(dataset: Dataset, *, environment: Mapping[str, str] | None = None) -> DatasetFacts:
    """Number and size of the training files, and an estimate of their rows (``exact`` is always False).

    Rows are estimated from the first 256 KiB of text files and read from Parquet footers where pyarrow is installed;
    ``train_samples`` stays ``None`` for packed data, whose rows are known only after tokenisation.
    """
    files, size, rows = 0, 0, 0.0
    known = True
    for position, source in enumerate(dataset.train):
        for found in list_source(source, f"spec.dataset.train[{position}]", environment=environment):
            files += 1
            size += found.info.bytes
            estimate = _estimate_rows(found)
            known = known and estimate is not None
            rows += (estimate or 0.0) * source.weight
    held_out = dataset.validation.fraction if dataset.validation and dataset.validation.fraction else 0.0
    train = None if dataset.packing or not known else max(1, round(rows * (1.0 - held_out)))
    validation = round(rows * held_out) if known and held_out else None
    return DatasetFacts(files=files, bytes=size, train_samples=train, validation_samples=validation)


@dataclass(frozen=True)
class SourceFile:
    """One file of a data source."""

    store: ObjectStore
    info: ObjectInfo

    @property
    def uri(self) -> str:
        return self.store.join(self.info.path)


def list_source(source: DataSource, place: str, *, environment: Mapping[str, str] | None = None) -> list[SourceFile]:
    """The files behind a source: one file, a directory's data files, or the matches of a glob; sorted by path.

    Raises:
        DataError: there is none; ``place`` names the field.
    """
    parent, rest = split_uri(source.uri)
    store = _open(source, parent, environment)
    if rest and not any(sign in rest for sign in "*?["):
        try:
            return [SourceFile(store, store.head(rest))]
        except ObjectNotFound:
            store, rest = store.child(rest), ""
    listing = store.list()
    if rest:
        found = [info for info in listing if _glob_matches(info.path, rest)]
    else:
        found = [info for info in listing if info.path.endswith(_DATA_SUFFIXES) and "/" not in info.path]
    if not found:
        raise DataError(f"{place}.uri: no file is behind {source.uri}; correct the URI or upload the data.")
    return [SourceFile(store, info) for info in found]


def _glob_matches(path: str, pattern: str) -> bool:
    """Segment by segment: ``*`` does not cross a ``/``."""
    parts, wanted = path.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(fnmatchcase(part, glob) for part, glob in zip(parts, wanted, strict=True))


def _open(location: ObjectLocation, uri: str, environment: Mapping[str, str] | None) -> ObjectStore:
    return ObjectStore.open_location(location, uri=uri, environment=environment, retry_seconds=_PATIENCE_SECONDS)


def _estimate_rows(file: SourceFile) -> float | None:
    name, size = file.info.path, file.info.bytes
    if size == 0:
        return 0.0
    if name.endswith(".parquet"):
        return _parquet_rows(file)
    if name.endswith((".zst", ".arrow")):
        return None
    head = file.store.get_range(name, 0, min(size, _HEAD_BYTES))
    text = _inflate(head) if name.endswith(".gz") else head
    if text is None:
        return None
    lines = text.count(b"\n")
    if len(head) == size:
        return float(lines + (not text.endswith(b"\n")) - name.endswith(".csv"))
    complete = text.rfind(b"\n") + 1
    share = len(head) * complete / len(text) if text else 0.0  # bytes of the file that the complete lines take
    return lines * size / share if lines else None


def _inflate(head: bytes) -> bytes | None:
    try:
        return zlib.decompressobj(wbits=31).decompress(head)
    except zlib.error:
        return None  # the preparation names the damaged file with its line


def _parquet_rows(file: SourceFile) -> float | None:
    """``num_rows`` of the footer; ``None`` where pyarrow is not installed or the footer is damaged."""
    if importlib.util.find_spec("pyarrow") is None:
        return None
    import pyarrow
    import pyarrow.parquet

    size = file.info.bytes
    tail = file.store.get_range(file.info.path, max(0, size - 8), size)
    length = int.from_bytes(tail[:4], "little") + 8
    if tail[4:] != b"PAR1" or length > size:
        return None
    footer = file.store.get_range(file.info.path, size - length, size)
    try:
        # The reader wants a file that begins with the magic number; the footer alone is enough for the metadata.
        return float(pyarrow.parquet.read_metadata(io.BytesIO(b"PAR1" + footer)).num_rows)
    except (pyarrow.ArrowException, OSError):
        return None


def _json(content: bytes, uri: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ModelError(f"{uri} is not a JSON object; restore it.")
    return value
