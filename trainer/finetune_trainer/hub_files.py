"""``hf://org/name@revision`` through huggingface_hub: honours HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from finetune_api.errors import ModelError, StorageUnavailable
from finetune_api.spec import Model


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


def fetch_from_hub(model: Model, patterns: Iterable[str], never: Iterable[str]) -> Path:
    """A snapshot's directory in the hub's cache, with the files that match ``patterns``.

    Raises:
        ModelError: the repository or revision does not exist, is gated, or is not cached while offline.
        StorageUnavailable: the hub does not answer.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub import errors as hub

    name, revision = repository(model)
    shown = f"hf://{name}" + (f"@{revision}" if revision else "")
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(never))
        )
    except hub.GatedRepoError:
        raise ModelError(f"{shown} is gated; accept its terms on the hub and set HF_TOKEN.") from None
    except hub.RepositoryNotFoundError:
        raise ModelError(f"{shown} does not exist or is private; correct spec.model.uri or set HF_TOKEN.") from None
    except hub.RevisionNotFoundError:
        raise ModelError(f"{shown} has no such revision; correct it in spec.model.") from None
    except hub.HFValidationError:
        raise ModelError(f"'{model.uri}' names no model repository; write hf://ORGANISATION/NAME@REVISION.") from None
    except hub.OfflineModeIsEnabled:
        raise _offline(shown) from None
    except hub.LocalEntryNotFoundError:
        if constants.is_offline_mode():
            raise _offline(shown) from None
        raise StorageUnavailable(
            f"{shown} is not in the local cache and the hub did not answer; check the network and HF_ENDPOINT."
        ) from None
    except hub.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "no status"
        raise StorageUnavailable(f"{shown} could not be fetched: the hub answered {status}; try again later.") from None


def _offline(shown: str) -> ModelError:
    return ModelError(f"{shown} is not in the local cache and HF_HUB_OFFLINE is set; unset it or fill HF_HOME.")
