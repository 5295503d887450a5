"""Where checkpoints live: ``step-00000200/`` directories whose manifest is written last, on disk or in a bucket.

The name of every file tells its content (``progress-3f9a5c0b12de.json``): no file that a manifest lists is replaced
when a step is saved again, or by two launchers at once, so that the manifest alone switches from one to the other.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from finetune_api.errors import CheckpointError, StorageError
from finetune_api.report import CheckpointManifest, FileEntry
from finetune_storage import (
    MANIFEST,
    DamagedBundle,
    ObjectNotFound,
    ObjectStore,
    bundle_names,
    commit,
    delete_bundle,
    fetch_bundle,
    file_digest,
    files_of,
    read_manifest,
    write_file,
)

_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Restored:
    """A verified checkpoint on local disk, and a sentence for every newer one that was skipped.

    ``damaged``: the committed ones among these, step to the sha256 that its manifest had.
    """

    manifest: CheckpointManifest
    directory: Path
    skipped: tuple[str, ...]
    damaged: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CheckpointStore:
    """Checkpoints of one job under ``store``; ``config_digest`` identifies what defines the job's result."""

    store: ObjectStore
    config_digest: str
    keep: int = 2

    def uri(self, step: int) -> str:
        """Where the checkpoint of ``step`` is (or would be)."""
        return self.store.child(_name(step)).uri

    def child(self, prefix: str, keep: int = 1) -> CheckpointStore:
        """A separate series below this one, for instance ``best/``."""
        return CheckpointStore(self.store.child(prefix), self.config_digest, keep)

    def upload(self, step: int, files: Mapping[str, Path]) -> list[FileEntry]:
        """Upload this rank's files (path in the checkpoint to local file) and read them back. Every rank calls it.

        In the store, and so in the entries, a path carries the beginning of its file's sha256.
        """
        place = self.store.child(_name(step))
        return [write_file(place, _with_digest(path, file), file) for path, file in sorted(files.items())]

    def commit(self, step: int, entries: Iterable[FileEntry], fields: Mapping[str, Any]) -> CheckpointManifest:
        """Rank 0, after every rank's ``upload``: write the manifest, which makes the checkpoint exist.

        ``fields``: those of CheckpointManifest besides step, config_digest, files and saved_at.
        """
        files = tuple(sorted(entries, key=lambda entry: entry.path))
        paths = [entry.path for entry in files]
        assert len(set(paths)) == len(paths), f"two ranks wrote the same checkpoint file: {paths}"
        manifest = CheckpointManifest(
            step=step,
            config_digest=self.config_digest,
            files=files,
            saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
            **fields,
        )
        commit(self.store, _name(step), manifest)
        return manifest

    def candidates(self) -> list[int]:
        """Steps with a committed manifest, newest first."""
        return sorted((step for step, committed in self.steps().items() if committed), reverse=True)

    def fetch(self, step: int, destination: Path) -> CheckpointManifest:
        """Download and verify one checkpoint.

        Raises:
            ObjectNotFound: it was never committed.
            DamagedBundle: lists every file that is missing, truncated or altered.
            CheckpointError: it belongs to another job.
        """
        manifest, _ = read_manifest(self.store, _name(step), CheckpointManifest)
        self._check_owner(step, manifest)
        return fetch_bundle(self.store, _name(step), CheckpointManifest, destination)

    def read(self, step: int, kind: str) -> bytes:
        """One small file of a checkpoint, whose name begins with ``kind``, unverified.

        Raises:
            ObjectNotFound: the checkpoint or the file is gone.
            DamagedBundle: its manifest is unreadable or lists no such file.
        """
        manifest, _ = read_manifest(self.store, _name(step), CheckpointManifest)
        for entry in files_of(manifest):
            if entry.path.startswith(kind):
                return self.store.child(_name(step)).get(entry.path)
        raise DamagedBundle(self.uri(step), [f"Its manifest lists no {kind} file."])

    def newest(self, destination: Path) -> Restored | None:
        """Fetch the newest whole checkpoint into ``destination`` (replaced); ``None`` where there is none at all.

        Raises:
            CheckpointError: checkpoints are there but every one is damaged, or the newest belongs to another job.
        """
        skipped: list[str] = []
        damaged: dict[int, str] = {}
        steps = self.steps()
        for step in sorted(steps, reverse=True):
            seen = self._manifest_sha256(step)
            try:
                if steps[step]:
                    return Restored(self.fetch(step, destination), destination, tuple(skipped), damaged)
                skipped.append(f"Skipped {self.uri(step)}: it was never finished (no manifest.json).")
            except DamagedBundle as error:
                damaged |= {step: seen} if seen else {}
                skipped.append(f"Skipped {self.uri(step)}: {' '.join(error.problems)}")
            except ObjectNotFound:
                skipped.append(f"Skipped {self.uri(step)}: its manifest.json vanished while it was read.")
        if any(steps.values()):
            raise CheckpointError(
                f"No checkpoint under {self.store.uri} can be used. {' '.join(skipped)} "
                "Delete them to start from the beginning, or restore one."
            )
        shutil.rmtree(destination, ignore_errors=True)
        return None

    def prune(self, newest: int, damaged: Mapping[int, str] | None = None) -> list[int]:
        """After the commit of step ``newest``: keep it and the ``keep - 1`` before it, remove what is older.

        Of later ones only the ``damaged``, which the resume passed over (see Restored), if nobody wrote them anew: a
        replacement of this launcher may have saved the others. Returns the steps that were removed.
        """
        steps = self.steps()
        committed = sorted((step for step in steps if steps[step] and step <= newest), reverse=True)
        kept = committed[: self.keep]
        passed_over = {step for step, seen in (damaged or {}).items() if seen == self._manifest_sha256(step)}
        doomed = [step for step in sorted(steps) if step not in kept and (step < newest or step in passed_over)]
        self.remove(doomed)
        return doomed

    def remove(self, steps: Iterable[int]) -> None:
        """Delete these checkpoints, finished or not."""
        for step in steps:
            delete_bundle(self.store, _name(step))

    def _manifest_sha256(self, step: int) -> str | None:
        try:
            return self.store.child(_name(step)).digest(MANIFEST)[0]
        except ObjectNotFound:
            return None

    def steps(self) -> dict[int, bool]:
        """Every step of which something is there, and whether its manifest was committed."""
        names = bundle_names(self.store)
        return {int(match.group(1)): done for name, done in names.items() if (match := _NAME.fullmatch(name))}

    def _check_owner(self, step: int, manifest: CheckpointManifest) -> None:
        if manifest.config_digest != self.config_digest:
            raise CheckpointError(
                f"The checkpoint {self.uri(step)} was written by another configuration "
                f"({manifest.config_digest[:12]}… instead of {self.config_digest[:12]}…); "
                "choose another output.uri or job name, or delete it."
            )
        if manifest.step != step:
            raise DamagedBundle(self.uri(step), [f"Its manifest names step {manifest.step}."])


def _with_digest(path: str, file: Path) -> str:
    plain = PurePosixPath(path)
    return str(plain.with_name(f"{plain.stem}-{file_digest(file)[0][:12]}{plain.suffix}"))


def _name(step: int) -> str:
    if step < 0:
        raise StorageError(f"A checkpoint step cannot be negative ({step}).")
    return f"step-{step:08d}"
