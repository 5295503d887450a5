from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from finetune_api.errors import CheckpointError
from finetune_api.report import CheckpointManifest
from finetune_storage import DamagedBundle, ObjectNotFound, ObjectStore, write_file
from finetune_trainer.checkpoint_store import CheckpointStore, Restored

FIELDS = {"epoch": 1.0, "samples_seen": 8, "tokens_seen": 100, "world_size": 2, "strategy": "DDP"}


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def checkpoints(request: pytest.FixtureRequest, tmp_path: Path) -> CheckpointStore:
    if request.param == "file":
        store = ObjectStore.open(f"file://{tmp_path}/checkpoints")
    else:
        server: Any = request.getfixturevalue("s3_server")
        store = ObjectStore.open(f"s3://bucket/{tmp_path.name}/checkpoints", environment=server.environment)
    return CheckpointStore(store, "a" * 64, keep=2)


def _save(checkpoints: CheckpointStore, step: int, tmp_path: Path, commit: bool = True) -> CheckpointManifest | None:
    entries = []
    for rank in range(2):
        file = tmp_path / f"rank-{rank}"
        file.write_bytes(f"step {step} rank {rank}".encode())
        entries += checkpoints.upload(step, {f"weights-{rank}.safetensors": file})
    return checkpoints.commit(step, entries, FIELDS) if commit else None


def _weights(step: int, rank: int) -> str:
    """What the file of a rank is called: its name and the beginning of its digest."""
    return f"weights-{rank}-{hashlib.sha256(f'step {step} rank {rank}'.encode()).hexdigest()[:12]}.safetensors"


def test_the_newest_checkpoint_comes_back_whole(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    _save(checkpoints, 100, tmp_path)
    manifest = _save(checkpoints, 200, tmp_path)
    assert checkpoints.candidates() == [200, 100]
    restored = checkpoints.newest(tmp_path / "restored")
    assert restored is not None
    assert (restored.manifest, restored.skipped) == (manifest, ())
    assert (restored.directory / _weights(200, 1)).read_bytes() == b"step 200 rank 1"


def test_no_checkpoint_is_none(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    assert checkpoints.newest(tmp_path / "restored") is None
    _save(checkpoints, 100, tmp_path, commit=False)
    assert checkpoints.newest(tmp_path / "restored") is None
    with pytest.raises(ObjectNotFound):
        checkpoints.fetch(100, tmp_path / "restored")


@pytest.mark.parametrize("fault", ["truncated", "flipped", "missing", "manifest", "unfinished"])
def test_a_damaged_checkpoint_is_skipped_with_its_reason(
    checkpoints: CheckpointStore, tmp_path: Path, fault: str
) -> None:
    _save(checkpoints, 100, tmp_path)
    _save(checkpoints, 200, tmp_path)
    place, name = checkpoints.store.child("step-00000200"), _weights(200, 0)
    flipped = b"Step 200 rank 0"
    digests = [hashlib.sha256(text).hexdigest()[:12] for text in (flipped, b"step 200 rank 0")]
    reason = {
        "truncated": f"'{name}' has 4 bytes instead of 15.",
        "flipped": f"'{name}' has sha256 {digests[0]}… instead of {digests[1]}….",
        "missing": f"'{name}' is missing.",
        "manifest": "manifest.json is not readable (1 faults).",
        "unfinished": "it was never finished (no manifest.json).",
    }[fault]
    if fault == "truncated":
        place.put(name, b"step")
    elif fault == "flipped":
        place.put(name, flipped)
    elif fault == "manifest":
        place.put("manifest.json", place.get("manifest.json")[:-10])
    else:
        place.delete(name if fault == "missing" else "manifest.json")
    restored = checkpoints.newest(tmp_path / "restored")
    assert restored is not None
    assert restored.manifest.step == 100
    assert restored.skipped == (f"Skipped {checkpoints.store.uri}step-00000200/: {reason}",)
    assert (restored.directory / _weights(100, 0)).read_bytes() == b"step 100 rank 0"


def test_only_damaged_checkpoints_are_an_error(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    _save(checkpoints, 100, tmp_path)
    checkpoints.store.delete(f"step-00000100/{_weights(100, 1)}")
    with pytest.raises(CheckpointError) as caught:
        checkpoints.newest(tmp_path / "restored")
    uri = checkpoints.store.uri
    assert str(caught.value) == (
        f"No checkpoint under {uri} can be used. Skipped {uri}step-00000100/: '{_weights(100, 1)}' is missing. "
        "Delete them to start from the beginning, or restore one."
    )


def test_the_checkpoint_of_another_job_is_refused(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    _save(checkpoints, 100, tmp_path)
    other = CheckpointStore(checkpoints.store, "b" * 64)
    with pytest.raises(CheckpointError) as caught:
        other.newest(tmp_path / "restored")
    assert str(caught.value) == (
        f"The checkpoint {other.uri(100)} was written by another configuration "
        "(aaaaaaaaaaaa… instead of bbbbbbbbbbbb…); choose another output.uri or job name, or delete it."
    )


def test_a_checkpoint_under_anothers_name_is_damage(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    _save(checkpoints, 100, tmp_path)
    for info in checkpoints.store.list("step-00000100"):
        checkpoints.store.put(info.path.replace("100", "300"), checkpoints.store.get(info.path))
    with pytest.raises(DamagedBundle) as caught:
        checkpoints.fetch(300, tmp_path / "restored")
    assert caught.value.problems == ("Its manifest names step 100.",)


def test_pruning_keeps_the_newest_and_leaves_other_series_alone(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    for step in (100, 200, 300, 400):
        _save(checkpoints, step, tmp_path)
    best = checkpoints.child("best")
    _save(best, 150, tmp_path)
    _save(checkpoints, 350, tmp_path, commit=False)
    _save(checkpoints, 500, tmp_path, commit=False)
    assert checkpoints.prune(400) == [100, 200, 350]
    assert checkpoints.candidates() == [400, 300]
    left = {info.path.split("/")[0] for info in checkpoints.store.list()}
    assert left == {"best", "step-00000300", "step-00000400", "step-00000500"}
    assert best.candidates() == [150]


def _passes_over(checkpoints: CheckpointStore, steps: tuple[int, ...], folder: Path) -> Restored:
    """A resume that finds these steps damaged."""
    for step in steps:
        checkpoints.store.put(f"step-00000{step}/{_weights(step, 0)}", b"damaged")
    restored = checkpoints.newest(folder / "restored")
    assert restored is not None
    return restored


def test_damaged_checkpoints_that_a_resume_passed_over_do_not_push_out_whole_ones(
    checkpoints: CheckpointStore, tmp_path: Path
) -> None:
    for step in (100, 200, 300):
        _save(checkpoints, step, tmp_path)
    restored = _passes_over(checkpoints, (200, 300), tmp_path)
    assert restored.manifest.step == 100
    _save(checkpoints, 150, tmp_path)
    assert checkpoints.prune(150, restored.damaged) == [200, 300]
    assert checkpoints.candidates() == [150, 100]


def test_an_older_launcher_leaves_the_checkpoints_of_its_replacement_alone(
    checkpoints: CheckpointStore, tmp_path: Path
) -> None:
    for step in (100, 200, 300, 400):
        _save(checkpoints, step, tmp_path)
        checkpoints.prune(step)
    _save(checkpoints, 250, tmp_path)  # by one that was cut off from the cluster and not from the store
    assert checkpoints.prune(250) == []
    assert checkpoints.candidates() == [400, 300, 250]


def test_a_damaged_checkpoint_that_somebody_wrote_anew_is_not_pruned(
    checkpoints: CheckpointStore, tmp_path: Path
) -> None:
    for step in (200, 300, 400):
        _save(checkpoints, step, tmp_path)
    restored = _passes_over(checkpoints, (300, 400), tmp_path)
    entries = [write_file(checkpoints.store.child("step-00000300"), "weights.safetensors", b"anew")]
    checkpoints.commit(300, entries, FIELDS)
    _save(checkpoints, 250, tmp_path)
    assert checkpoints.prune(250, restored.damaged) == [400]
    assert checkpoints.fetch(300, tmp_path / "copy").step == 300


def test_a_checkpoint_that_was_half_deleted_does_not_exist(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    _save(checkpoints, 100, tmp_path)
    _save(checkpoints, 200, tmp_path)
    checkpoints.store.delete("step-00000100/manifest.json")  # what a kill in the middle of prune leaves
    assert checkpoints.candidates() == [200]
    assert checkpoints.prune(200) == [100]
    assert checkpoints.store.list("step-00000100") == []


def test_saving_a_step_again_mends_it(checkpoints: CheckpointStore, tmp_path: Path) -> None:
    _save(checkpoints, 100, tmp_path)
    checkpoints.store.put(f"step-00000100/{_weights(100, 0)}", b"damaged")
    _save(checkpoints, 100, tmp_path)
    assert checkpoints.fetch(100, tmp_path / "restored").step == 100


class Evicted(BaseException):
    """The pod is gone, right after a write."""


def test_saving_a_committed_step_again_leaves_a_whole_checkpoint_after_every_write(
    checkpoints: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(seconds: int) -> None:
        progress, weights = tmp_path / "progress", tmp_path / "weights"
        progress.write_text(f'{{"seconds": {seconds}}}')  # never the same twice
        weights.write_bytes(b"weights" * (1 + seconds % 2))  # other numbers, as another world size leads to
        files = {"progress.json": progress, "state-00000-of-00001.safetensors": weights}
        checkpoints.commit(100, checkpoints.upload(100, files), FIELDS)

    writes = 0
    real = ObjectStore.put

    def put(self: ObjectStore, path: str, content: bytes | Path) -> None:
        nonlocal writes
        real(self, path, content)
        writes += 1
        if writes == last:
            raise Evicted

    monkeypatch.setattr(ObjectStore, "put", put)
    last, seconds = 0, 0
    save(seconds)
    for last in (1, 2, 3):
        writes, seconds = 0, seconds + 1
        with pytest.raises(Evicted):
            save(seconds)
        restored = checkpoints.newest(tmp_path / "restored")
        assert restored is not None
        assert (restored.manifest.step, restored.skipped) == (100, ())
        (progress,) = restored.directory.glob("progress-*.json")
        assert progress.read_text() == f'{{"seconds": {seconds if last == 3 else 0}}}'


def test_a_checkpoint_of_before_the_names_told_the_content_is_fetched(
    checkpoints: CheckpointStore, tmp_path: Path
) -> None:
    place = checkpoints.store.child("step-00000100")
    checkpoints.commit(100, [write_file(place, "progress.json", b"{}")], FIELDS)
    restored = checkpoints.newest(tmp_path / "restored")
    assert restored is not None
    assert (restored.directory / "progress.json").read_bytes() == b"{}"
