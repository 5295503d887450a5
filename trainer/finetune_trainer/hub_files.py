"""``hf://org/name@revision`` through huggingface_hub: honours HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE."""

from __future__ import annotations

import logging
import re
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finetune_api.errors import FineTuneError, ModelError, StorageUnavailable
from finetune_api.spec import Model

log = logging.getLogger(__name__)

_RESOLVE_SECONDS = 30.0


def repository(model: Model) -> tuple[str, str | None]:
    """``org/name`` and the revision, from the URI or ``model.revision``.

    Raises:
        ModelError: the URI does not name a repository, or names another revision than ``model.revision``.
    """
    name, _, revision = model.uri.removeprefix("hf://").partition("@")
    name = name.strip("/")
    if name.count("/") > 1 or not name:
        raise ModelError(f"'{model.uri}' names no model repository; write hf://ORGANISATION/NAME@REVISION.")
    if revision and model.revision and revision != model.revision:
        raise ModelError(
            f"spec.model.uri names revision {revision} and spec.model.revision {model.revision}; remove one."
        )
    return name, revision or model.revision


def resolve_commit(name: str) -> str:
    """The commit that the default branch of ``org/name`` is at now; without the hub, the one that the cache knows.

    Raises:
        ModelError: the repository does not exist, may not be read, or has no commit; offline: it is not cached.
        StorageUnavailable: the hub does not answer, and the cache knows no commit.
    """
    from huggingface_hub import HfApi, constants

    shown = f"hf://{name}"
    if constants.is_offline_mode():
        with _in_sentences(shown):
            return _cached_commit(name)
    try:
        with _in_sentences(shown):
            commit = HfApi().model_info(name, timeout=_RESOLVE_SECONDS).sha
    except StorageUnavailable as error:
        with suppress(FileNotFoundError):
            commit = _cached_commit(name)
            log.warning("%s The newest commit in the local cache is used: %s", error, commit)
            return commit
        raise
    if commit is None or not re.fullmatch("[0-9a-f]{40}", commit):
        raise ModelError(f"The hub does not say which commit {shown} is at; name one in spec.model.revision.")
    return commit


def _cached_commit(name: str) -> str:
    """Raises LocalEntryNotFoundError of huggingface_hub, a FileNotFoundError."""
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, local_files_only=True, allow_patterns=[])).name


def note_branch(name: str, commit: str) -> None:
    """Note in the cache that the default branch is at a commit that was fetched, for jobs that start without the hub.

    huggingface_hub does so only where a branch is fetched by its name. A cache that cannot be written stays as it is.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=name, repo_type="model")
    file = folder / "refs" / constants.DEFAULT_REVISION
    fresh = folder / f".{constants.DEFAULT_REVISION}-{secrets.token_hex(8)}"
    try:
        if file.is_file() and file.read_text(encoding="utf-8") == commit:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(commit, encoding="utf-8")
        fresh.replace(file)
    except OSError as error:
        log.warning("'%s' cannot be written (%s); jobs that start without the hub miss it.", file, error.strerror)


def fetch_from_hub(name: str, revision: str, patterns: Iterable[str], never: Iterable[str]) -> Path:
    """A snapshot's directory in the hub's cache, with the files that match ``patterns``.

    Raises:
        ModelError: the repository or revision does not exist, is gated, or is not cached while offline.
        StorageUnavailable: the hub does not answer.
    """
    from huggingface_hub import snapshot_download

    with _in_sentences(f"hf://{name}@{revision}"):
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(never))
        )


@contextmanager
def _in_sentences(shown: str) -> Iterator[None]:
    """What huggingface_hub raises, as an error for users."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    try:
        yield
    except hub.GatedRepoError:
        raise ModelError(f"{shown} is gated; accept its terms on the hub and set HF_TOKEN.") from None
    except hub.RepositoryNotFoundError:
        raise ModelError(f"{shown} does not exist or is private; correct spec.model.uri or set HF_TOKEN.") from None
    except hub.RevisionNotFoundError:
        raise ModelError(f"{shown} has no such revision; correct it in spec.model.") from None
    except hub.HFValidationError:
        raise ModelError(f"'{shown}' names no model repository; write hf://ORGANISATION/NAME@REVISION.") from None
    except hub.OfflineModeIsEnabled:
        raise _offline(shown) from None
    except hub.LocalEntryNotFoundError:
        if constants.is_offline_mode():
            raise _offline(shown) from None
        raise StorageUnavailable(
            f"{shown} is not in the local cache and the hub did not answer; check the network and HF_ENDPOINT."
        ) from None
    except hub.HfHubHTTPError as error:
        raise _refused(shown, error.response.status_code if error.response is not None else None) from None
    except hub.HTTPError:  # type: ignore[attr-defined]  # of the library below it, whatever its name
        raise StorageUnavailable(
            f"{shown} could not be looked up: the hub did not answer; check the network and HF_ENDPOINT."
        ) from None


def _refused(shown: str, status: int | None) -> FineTuneError:
    if status in {401, 403}:
        return ModelError(f"{shown} may not be read: the hub answered {status}; set HF_TOKEN to one that may.")
    told = status or "without a status"
    return StorageUnavailable(f"{shown} could not be fetched: the hub answered {told}; try again later.")


def _offline(shown: str) -> ModelError:
    return ModelError(f"{shown} is not in the local cache and HF_HUB_OFFLINE is set; unset it or fill HF_HOME.")
