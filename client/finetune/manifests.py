"""From a manifest file to a job: relative ``file://`` URIs are resolved against the manifest's folder."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from finetune_api.errors import Problem, SpecError
from finetune_api.manifest import Place, parse_manifest, result_digest
from finetune_api.spec import FineTuneJobSpec
from finetune_api.trainer_config import JobIdentity

_RELATIVE = re.compile(r"file://(?P<path>\.{1,2}/[^\s\"',}\]#]*)")
_UID_LENGTH = 16


@dataclass(frozen=True)
class Job:
    """A valid manifest and the names that follow from it."""

    identity: JobIdentity
    spec: FineTuneJobSpec
    source: str


def read_job(path: str, place: Place | None = Place.LOCAL) -> Job:
    """Read and judge the manifest at ``path`` (``-``: standard input).

    Raises:
        SpecError: every problem at once.
    """
    metadata, spec = parse_manifest(manifest_text(path), source=path, place=place)
    uid = result_digest(spec)[:_UID_LENGTH]
    return Job(JobIdentity(namespace=metadata.namespace, name=metadata.name, uid=uid), spec, path)


def manifest_text(path: str) -> str:
    """The text at ``path`` (``-``: standard input) with absolute URIs.

    Raises:
        SpecError: it cannot be read.
    """
    text, folder = _read(path)
    return resolve_relative_uris(text, folder)


def resolve_relative_uris(text: str, folder: Path) -> str:
    """``file://./data.jsonl`` and ``file://../data.jsonl`` as absolute URIs; everything else stays as it is."""

    def absolute(match: re.Match[str]) -> str:
        typed = match["path"]
        trailing = "/" if typed.endswith(("/", "/.", "/..")) else ""
        steps = [part for part in typed.split("/") if part not in {"", "."}]
        base = folder
        while steps and steps[0] == "..":
            base, steps = base.parent, steps[1:]
        return "file://" + "/".join([quote(str(base)).rstrip("/"), *steps]) + (trailing if steps else "/")

    return _RELATIVE.sub(absolute, text)


def _read(path: str) -> tuple[str, Path]:
    if path == "-":
        return sys.stdin.read(), Path.cwd()
    try:
        return Path(path).read_text(encoding="utf-8-sig"), Path(os.path.abspath(path)).parent
    except UnicodeDecodeError as error:
        rule = f"is not UTF-8 text (byte {error.start})"
        raise SpecError([Problem(path, None, rule, "save the manifest as UTF-8")]) from error
    except OSError as error:
        rule = f"cannot be read ({error.strerror})"
        raise SpecError([Problem(path, None, rule, "name the manifest file, or - for standard input")]) from error
