"""What is wrong with a URI, in a sentence that never repeats a secret."""

from __future__ import annotations

import re

from finetune_api.fields import AUTHORITY
from finetune_api.kubernetes_names import is_subdomain
from finetune_api.names import nearest

MODEL_SCHEMES = ("hf", "s3", "gs", "az", "pvc", "file")
OBJECT_SCHEMES = ("s3", "gs", "az", "pvc", "file")
CLAIMS_DIRECTORY = "/mnt/pvc"  # pvc://claim/path is CLAIMS_DIRECTORY/claim/path in a training pod
_REVISION = re.compile(r"^[0-9a-f]{40}$")
_AUTHORITY = re.compile(AUTHORITY)
_FIRST = {"az": "container", "pvc": "claim"}  # what stands after the scheme, if no bucket


def without_secrets(uri: str) -> str:
    """The URI with user information, query and fragment blanked."""
    scheme, _, rest = uri.partition("://")
    # A secret key may have '/' in it; of hf:// only what follows a name and '@' is no secret but a revision.
    _, at, place = rest.rpartition("@")
    if at and (scheme != "hf" or "@" in rest.partition("/")[0] or ":" in rest):
        # With a query as well nobody knows which of the two the '@' belongs to.
        return f"{scheme}://***" if re.search("[?#]", rest) else f"{scheme}://***@{place}"
    return re.sub("[?#].*", lambda found: f"{found[0][0]}***", uri, count=1, flags=re.DOTALL)


def is_bucket_name(name: str) -> bool:
    """Whether a bucket, a container or an owner can be called so: nothing that would end a host name."""
    return _AUTHORITY.fullmatch(name) is not None


def claim_of(uri: str) -> str | None:
    """The PersistentVolumeClaim that a ``pvc://`` URI names, else ``None``."""
    return uri.removeprefix("pvc://").partition("/")[0] if uri.startswith("pvc://") else None


def is_claim_name(name: str) -> bool:
    """Whether a PersistentVolumeClaim can be called so (DNS subdomain)."""
    return is_subdomain(name)


def uri_trouble(uri: str, block: str) -> tuple[str, str] | None:
    """(rule, remedy) for a URI that ``block`` of the spec (model, dataset, output) cannot use, else ``None``."""
    is_model = block == "model"
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
    authority = rest.partition("/")[0]
    if "=" in rest.partition("?")[2] or ("?" in rest and block != "dataset") or "?" in authority:
        return "carries a query after '?'", "remove it; keys and signatures belong in a Secret (credentials.secretName)"
    if "#" in rest:
        coded = scheme in {"file", "pvc"}
        return "contains '#'", "write %23" if coded else "rename the object, or move it"
    if scheme == "hf":
        return _hub_trouble(rest)
    if "@" in authority:
        return "carries user information before '@'", "name a Secret in credentials.secretName instead"
    if "@" in rest:
        return "contains '@'", "rename the object, or move it"
    if scheme != "file" and not is_bucket_name(authority):
        return (
            f"names a {_FIRST.get(scheme, 'bucket')} that cannot exist",
            "use letters, digits, '.', '_' and '-' after a letter or digit",
        )
    if scheme == "file" and not rest.startswith("/"):
        return "is not absolute", "write file:///absolute/path, or file://./path beside the manifest"
    if any(part in {".", ".."} for part in rest.split("/")):
        return "contains '.' or '..'", "write the path out"
    return None


def _hub_trouble(rest: str) -> tuple[str, str] | None:
    repository, at, revision = rest.partition("@")
    if at and not _REVISION.match(revision):
        return "is pinned to something that is no commit", "use the 40 hexadecimal digits of a commit after '@'"
    owner = repository.partition("/")[0]
    if repository.count("/") != 1 or not all(repository.split("/")) or not is_bucket_name(owner):
        return "must name one repository as hf://owner/name", "write hf://owner/name or hf://owner/name@<commit>"
    return None


def _example(scheme: str) -> str:
    return {"hf": "owner/name", "file": "/absolute/path", "pvc": "claim/path"}.get(scheme, "bucket/path")
