"""``hf://org/name@revision`` through huggingface_hub: honours HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from finetune_api.errors import FineTuneError, ModelError, StorageUnavailable
from finetune_api.spec import Model

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
    """The commit that the default branch of ``org/name`` is at now; offline, the one that the cache knows.

    Raises:
        ModelError: the repository does not exist, may not be read, or has no commit; offline: it is not cached.
        StorageUnavailable: the hub does not answer.
    """
    from huggingface_hub import HfApi, constants, snapshot_download

    with _in_sentences(f"hf://{name}"):
        if constants.is_offline_mode():
            return Path(snapshot_download(name, local_files_only=True, allow_patterns=[])).name
        commit = HfApi().model_info(name, timeout=_RESOLVE_SECONDS).sha
    if commit is None or not re.fullmatch("[0-9a-f]{40}", commit):
        raise ModelError(f"The hub does not say which commit hf://{name} is at; name one in spec.model.revision.")
    return commit


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
