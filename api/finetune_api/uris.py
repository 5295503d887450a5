"""What is wrong with a URI, in a sentence that never repeats a secret."""

from __future__ import annotations

import re

from finetune_api.names import nearest

MODEL_SCHEMES = ("hf", "s3", "gs", "az", "pvc", "file")
OBJECT_SCHEMES = ("s3", "gs", "az", "pvc", "file")
CLAIMS_DIRECTORY = "/mnt/pvc"  # pvc://claim/path is CLAIMS_DIRECTORY/claim/path in a training pod
_REVISION = re.compile(r"^[0-9a-f]{40}$")


def without_secrets(uri: str) -> str:
    """The URI with user information blanked."""
    return re.sub(r"://[^/]*@", "://***@", uri) if uri.partition("://")[2].partition("/")[0].count("@") else uri


def claim_of(uri: str) -> str | None:
    """The PersistentVolumeClaim that a ``pvc://`` URI names, else ``None``."""
    return uri.removeprefix("pvc://").partition("/")[0] if uri.startswith("pvc://") else None


def is_claim_name(name: str) -> bool:
    """Whether a PersistentVolumeClaim can be called so (DNS subdomain)."""
    return (
        len(name) <= 253
        and re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", name) is not None
    )


def uri_trouble(uri: str, is_model: bool) -> tuple[str, str] | None:
    """(rule, remedy) for a URI that cannot be used, else ``None``."""
    schemes = MODEL_SCHEMES if is_model else OBJECT_SCHEMES
    listed = ", ".join(f"{scheme}://" for scheme in schemes)
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return "is not a URI", f"start it with one of {listed}"
    if scheme == "hf" and not is_model:
        return "hf:// can only name a base model", "put the files under s3://, gs://, az://, pvc:// or file://"
    if scheme not in schemes:
        guess = nearest(scheme, schemes)
        return f"has the unknown scheme {scheme}://", f"did you mean {guess}://?" if guess else f"use one of {listed}"
    if not rest.strip("/"):
        return "names nothing after its scheme", f"write {scheme}://{_example(scheme)}"
    if re.search(r"\s", uri):
        return "contains white space", "remove it, or write %20"
    if len(uri) > 1024:
        return "is longer than 1024 characters", "shorten it"
    if scheme == "hf":
        return _hub_trouble(rest)
    if "@" in rest.partition("/")[0]:
        return "carries user information before '@'", "name a Secret in credentials.secretName instead"
    if "@" in rest:
        return "contains '@'", "rename the object, or move it"
    if scheme == "file" and not rest.startswith("/"):
        return "is not absolute", "write file:///absolute/path, or file://./path beside the manifest"
    if any(part in {".", ".."} for part in rest.split("/")):
        return "contains '.' or '..'", "write the path out"
    return None


def _hub_trouble(rest: str) -> tuple[str, str] | None:
    repository, at, revision = rest.partition("@")
    if at and not _REVISION.match(revision):
        return "is pinned to something that is no commit", "use the 40 hexadecimal digits of a commit after '@'"
    if repository.count("/") != 1 or not all(repository.split("/")):
        return "must name one repository as hf://owner/name", "write hf://owner/name or hf://owner/name@<commit>"
    return None


def _example(scheme: str) -> str:
    return {"hf": "owner/name", "file": "/absolute/path", "pvc": "claim/path"}.get(scheme, "bucket/path")
