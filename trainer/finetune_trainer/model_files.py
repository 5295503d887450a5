"""The base model's files on local disk: fetched once, checked before any process group exists."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from finetune_api.errors import ModelError, StorageError
from finetune_api.spec import Initialization
from finetune_api.trainer_config import TrainerConfig
from finetune_storage import ObjectInfo, ObjectStore, file_digest
from finetune_trainer.hub_files import fetch_from_hub, note_branch, repository
from finetune_trainer.safetensors_check import check_weights

Progress = Callable[[str, float | None, float | None], None]  # what, bytes on local disk, bytes in all

DOCUMENT_PATTERNS = ("README.md", "LICENSE*")
TOKENIZER_PATTERNS = (  # what text becomes tokens by, and where generation stops
    "generation_config.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "*.tiktoken",
    "chat_template.jin*",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
DESCRIPTION_PATTERNS = ("config.json", *TOKENIZER_PATTERNS, *DOCUMENT_PATTERNS)
WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json")
CODE_PATTERNS = ("*.py",)
_NEVER = ("consolidated*.safetensors", "adapter_model.safetensors")  # a second copy of the weights; an adapter
_BELOW = ("*/*.safetensors", "*/*.json", "*/*.model", "*/*.py")  # the hub's patterns cross directories
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_WORKERS = 4
_BLOCKS, _BLOCK_BYTES = 64, 65536  # of a fingerprint
_DOWNLOADING = "downloading model files (bytes)"


def fetch_model(config: TrainerConfig, progress: Progress | None = None) -> Path:
    """A local directory with config.json, tokenizer and (unless initialised at random) safetensors.

    ``file://`` is used in place; object stores are downloaded once per cache, ``hf://`` through its own cache, at the
    commit that the plan names (``base_model.fix_revision``).

    Raises:
        ModelError: a file is missing or damaged, weights are pickles, or remote code is not allowed.
        StorageError, StorageUnavailable: the store refuses or is away.
    """
    model = config.spec.model
    patterns = wanted_patterns(config)
    if model.uri.startswith("hf://"):
        commit = config.plan.model_revision
        assert commit is not None, "which commit is decided before anything is fetched"
        name, pinned = repository(model)
        directory = fetch_from_hub(name, commit, patterns, (*_NEVER, *_BELOW))
        if pinned is None:
            note_branch(name, commit)
    else:
        store = ObjectStore.open_location(model)
        directory = store.local_directory or _download(config, store, patterns, progress or _silent)
    check_model_directory(config, directory)
    return directory


def wanted_patterns(config: TrainerConfig) -> tuple[str, ...]:
    """File names that this job reads."""
    with_weights = config.spec.model.initialization is Initialization.PRETRAINED
    return (
        DESCRIPTION_PATTERNS
        + (WEIGHT_PATTERNS if with_weights else ())
        + (CODE_PATTERNS if remote_code_allowed(config) else ())
    )


def check_model_directory(config: TrainerConfig, directory: Path) -> None:
    """Refuse a directory that cannot be trained from.

    Raises:
        ModelError: says which file and what to do.
    """
    uri = config.spec.model.uri
    if not directory.is_dir():
        raise ModelError(f"The base model {uri} does not exist; correct spec.model.uri.")
    names = {file.name for file in directory.iterdir() if file.is_file()}
    _check_listing(uri, names, needs_weights=config.spec.model.initialization is Initialization.PRETRAINED)
    content = read_json(directory / "config.json", uri)
    _check_remote_code(config, content, directory)
    if config.spec.model.initialization is Initialization.PRETRAINED:
        check_weights(directory, uri)


def describe_base_model(config: TrainerConfig, directory: Path) -> dict[str, Any]:
    """``baseModel`` of a manifest: where the base model came from, which one exactly, and its licence where stated."""
    model = config.spec.model
    described: dict[str, Any] = {
        "uri": model.uri,
        "initialization": model.initialization.value,
        "configSha256": file_digest(directory / "config.json")[0],
    }
    if revision := config.plan.model_revision:
        described["revision"] = revision
    if licence := stated_licence(directory):
        described["licence"] = licence
    return described


def fingerprints(config: TrainerConfig, directory: Path) -> dict[str, str]:
    """What training reads of the base model, file -> sha256: of weights over their size and blocks spread over them.

    Other weights differ in every block; reading all of a large model once more would cost minutes. Documents
    (README.md, licences) may change.
    """
    patterns = [pattern for pattern in wanted_patterns(config) if pattern not in DOCUMENT_PATTERNS]
    return {
        name: _fingerprint(directory / name)
        for name in matching_files(directory, patterns)
        if not _matches(name, _NEVER)
    }


def matching_files(directory: Path, patterns: Iterable[str]) -> list[str]:
    """Paths below ``directory`` in order; a pattern crosses directories only where it says so."""
    found = {file for pattern in patterns for file in directory.glob(pattern) if file.is_file()}
    return sorted(file.relative_to(directory).as_posix() for file in found)


def _fingerprint(file: Path) -> str:
    size = file.stat().st_size
    if size <= _BLOCKS * _BLOCK_BYTES:
        return file_digest(file)[0]
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as content:
        for number in range(_BLOCKS):  # the first one has the header, the last one ends with the file
            content.seek((size - _BLOCK_BYTES) * number // (_BLOCKS - 1))
            digest.update(content.read(_BLOCK_BYTES))
    return digest.hexdigest()


def stated_licence(directory: Path) -> str | None:
    """``license`` of the front matter of the model's README.md; ``None`` where none is stated readably."""
    readme = directory / "README.md"
    if not readme.is_file():
        return None
    text = readme.read_text(encoding="utf-8", errors="replace")
    if not text.startswith("---\n") or "\n---" not in text[4:]:
        return None
    try:
        matter = YAML(typ="safe").load(text[4 : text.index("\n---", 4)])
    except YAMLError:
        return None
    licence = matter.get("license") if isinstance(matter, dict) else None
    return licence if isinstance(licence, str) and len(licence) <= 100 else None


def read_json(file: Path, uri: str) -> dict[str, Any]:
    """A JSON object of the base model.

    Raises:
        ModelError: it is not one.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file.name} of the base model {uri} is not readable JSON ({error}); restore it.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{file.name} of the base model {uri} is not a JSON object; restore it.")
    return content


def _check_listing(uri: str, names: Iterable[str], needs_weights: bool) -> None:
    """Judge a listing of a model, local or remote, before anything large is read."""
    known = set(names)
    if "config.json" not in known:
        if "adapter_config.json" in known:
            raise ModelError(f"{uri} holds an adapter, not a base model; merge it first or name its base model.")
        raise ModelError(f"The base model {uri} has no config.json; point spec.model.uri at the directory that has it.")
    if needs_weights and not any(_matches(name, WEIGHT_PATTERNS[:1]) for name in known):
        if any(_matches(name, _PICKLES) for name in known):
            raise ModelError(
                f"The base model {uri} has only pickled weights, which can run code when loaded; "
                "safetensors only: convert it with save_pretrained(safe_serialization=True)."
            )
        raise ModelError(
            f"The base model {uri} has no *.safetensors weights; add them, or set model.initialization: Random."
        )


def _check_remote_code(config: TrainerConfig, content: dict[str, Any], directory: Path) -> None:
    tokenizer = directory / "tokenizer_config.json"
    settings = read_json(tokenizer, config.spec.model.uri) if tokenizer.is_file() else {}
    named = [
        name for name, found in (("config.json", content), ("tokenizer_config.json", settings)) if "auto_map" in found
    ]
    if not named or remote_code_allowed(config):
        return
    needed = (
        "the administrator must allow remote code"
        if config.spec.model.trust_remote_code
        else "set spec.model.trustRemoteCode if you trust it (the administrator must allow it too)"
    )
    raise ModelError(
        f"The base model {config.spec.model.uri} brings its own Python code (auto_map in {' and '.join(named)}); "
        f"{needed}, or remove auto_map where transformers knows the architecture."
    )


def remote_code_allowed(config: TrainerConfig) -> bool:
    """Whether both consents are there, the job's and the administrator's."""
    return config.spec.model.trust_remote_code and config.allow_remote_code


def _download(config: TrainerConfig, store: ObjectStore, patterns: tuple[str, ...], progress: Progress) -> Path:
    found = [info for info in store.list() if not _matches(info.path, _NEVER)]
    names = {info.path for info in found}
    _check_listing(store.uri, names, needs_weights=config.spec.model.initialization is Initialization.PRETRAINED)
    files = [info for info in found if _matches(info.path, patterns)]
    models = Path(config.cache_directory) / "models"
    target = models / _listing_digest(store.uri, files)
    with _locked(models, target.name):
        if not _is_whole(target, files):
            _fill(store, files, target, progress)
    return target


def _fill(store: ObjectStore, files: list[ObjectInfo], target: Path, progress: Progress) -> None:
    """Download what is missing beside ``target`` and give it its name when it is whole; a killed one goes on."""
    partial = target.with_name(f"{target.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    missing = [info for info in files if not _has_size(partial / info.path, info.bytes)]
    total = sum(info.bytes for info in files)
    done = total - sum(info.bytes for info in missing)
    progress(_DOWNLOADING, done, total)
    with ThreadPoolExecutor(_WORKERS) as pool:
        jobs = {pool.submit(store.download, info.path, partial / info.path): info for info in missing}
        for job, info in jobs.items():
            job.result()
            done += info.bytes
            progress(_DOWNLOADING, done, total)
    wrong = [info.path for info in files if not _has_size(partial / info.path, info.bytes)]
    if wrong:
        raise StorageError(
            f"{store.uri} changed while it was read ({', '.join(wrong)}); run again when it is complete."
        )
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


def _listing_digest(uri: str, files: list[ObjectInfo]) -> str:
    """Names a cached copy: changes when any file's etag or size changes."""
    lines = [uri, *(f"{info.path} {info.etag} {info.bytes}" for info in files)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:24]


def _is_whole(target: Path, files: list[ObjectInfo]) -> bool:
    return target.is_dir() and all(_has_size(target / info.path, info.bytes) for info in files)


def _has_size(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(name.count("/") == pattern.count("/") and fnmatch(name, pattern) for pattern in patterns)


@contextmanager
def _locked(directory: Path, name: str) -> Iterator[None]:
    """One launcher of this node downloads; the others wait and find it done."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _silent(_what: str, _done: float | None, _total: float | None) -> None:
    """No one listens."""
