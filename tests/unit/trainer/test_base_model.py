"""Which commit of a hub model a job uses: real launchers' code, the real client of the hub, a hub that moves on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from tests.unit.trainer.hub import NAME, Answer, Hub

from finetune_api.plan import Facts
from finetune_api.planner import make_plan
from finetune_api.spec import FineTuneJobSpec
from finetune_api.trainer_config import JobIdentity, Rendezvous, TrainerConfig
from finetune_storage import ObjectStore

URI = f"hf://{NAME}"
RECORD = "default/job/u1/base-model.json"
# What a launcher does with the model before anything else.
LAUNCHER = """
import json, sys
from pathlib import Path
from finetune_api.errors import FineTuneError
from finetune_storage import file_digest
from finetune_trainer.base_model import fix_revision
from finetune_trainer.launcher import read_config
from finetune_trainer.model_files import describe_base_model, fetch_model
try:
    config = fix_revision(read_config(Path(sys.argv[1])))
    directory = fetch_model(config)
    said = {"revision": config.plan.model_revision, "weights": file_digest(directory / "model.safetensors")[0],
            "described": describe_base_model(config, directory)["revision"]}
except FineTuneError as error:
    said = {"error": type(error).__name__, "class": error.exit_class.value, "message": str(error), "hint": error.hint}
print(json.dumps(said))
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as started:
        started.push(_model(1))
        yield started


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.s3)])
def output(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/out"
    for name, value in request.getfixturevalue("s3_server").environment.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}/out"


def _model(mark: int) -> dict[str, bytes]:
    """Small, and of other weights for every ``mark``."""
    weights = save({"lm_head.weight": np.full((2, 2), mark, dtype=np.float32)})
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    return {"config.json": json.dumps(config).encode(), "model.safetensors": weights, "notes.txt": b"not wanted"}


class Node:
    """A launcher of the job; ``wait`` tells what it said."""

    def __init__(self, folder: Path, endpoint: str, output: str, node: str = "a", **model: Any) -> None:
        variables = {name: model.pop(name) for name in [*model] if name.isupper()}
        spec = FineTuneJobSpec.model_validate(
            {
                "model": {"uri": URI, **model},
                "dataset": {"train": [{"uri": "file:///data.jsonl", "format": "Messages"}]},
                "method": {"type": "LoRA"},
                "output": {"uri": output},
            }
        )
        identity = JobIdentity(name="job", uid="u1")
        config = TrainerConfig(
            job=identity,
            spec=spec,
            plan=make_plan(spec, Facts(), identity),
            rendezvous=Rendezvous(endpoint="127.0.0.1:1", minimum_nodes=1, maximum_nodes=1),
            work_directory=str(folder / f"work-{node}"),
            cache_directory=str(folder / f"cache-{node}"),
        )
        file = folder / f"{node}.json"
        file.write_text(config.model_dump_json(by_alias=True))
        known = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
        home = {"HF_HOME": str(folder / f"hub-{node}"), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(file)],
            env={**known, **home, "FINETUNE_STORAGE_RETRY_SECONDS": "2", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> dict[str, Any]:
        output, errors = self._process.communicate(timeout=120)
        assert self._process.returncode == 0, errors
        said: dict[str, Any] = json.loads(output)
        return said


def test_launchers_that_ask_at_once_and_are_told_different_commits_use_one(
    hub: Hub, output: str, tmp_path: Path
) -> None:
    first = hub.main
    second = hub.push(_model(2))
    answers = iter([first, second])
    both, lock = threading.Barrier(2, timeout=60), threading.Lock()

    def pushed_in_between() -> str:
        both.wait()  # nobody has recorded anything when both are told
        with lock:
            return next(answers)

    hub.which = pushed_in_between
    nodes = [Node(tmp_path, hub.endpoint, output, node) for node in "ab"]
    one, other = (node.wait() for node in nodes)
    assert one == other
    assert one["revision"] == one["described"]
    assert one["revision"] in {first, second}
    assert hub.questions == 2
    assert json.loads(ObjectStore.open(output).get(RECORD)) == {
        "schemaVersion": 1,
        "uri": URI,
        "revision": one["revision"],
    }
    late = Node(tmp_path, hub.endpoint, output, "c").wait()
    assert (late, hub.questions) == (one, 2)


def test_a_push_between_two_starts_changes_nothing(hub: Hub, output: str, tmp_path: Path) -> None:
    before = Node(tmp_path, hub.endpoint, output, "a").wait()
    assert before["revision"] == hub.main
    pushed = hub.push(_model(2))
    assert Node(tmp_path, hub.endpoint, output, "a").wait() == before
    assert Node(tmp_path, hub.endpoint, output, "fresh").wait() == before
    other_job = Node(tmp_path, hub.endpoint, f"{output}/other").wait()
    assert (other_job["revision"], other_job["weights"] == before["weights"]) == (pushed, False)


def test_a_recorded_commit_is_fetched_from_a_hub_that_cannot_say_which_one_is_newest(hub: Hub, tmp_path: Path) -> None:
    output = f"file://{tmp_path}/out"
    before = Node(tmp_path, hub.endpoint, output, "a").wait()
    hub.push(_model(2))
    hub.trouble_with_commits = Answer(500)
    assert Node(tmp_path, hub.endpoint, output, "b").wait() == before


def test_a_recorded_and_cached_commit_needs_no_hub(hub: Hub, tmp_path: Path) -> None:
    output = f"file://{tmp_path}/out"
    before = Node(tmp_path, hub.endpoint, output).wait()
    hub.trouble = Answer(503)
    assert Node(tmp_path, hub.endpoint, output).wait() == before
    assert Node(tmp_path, "http://127.0.0.1:9", output).wait() == before
    assert Node(tmp_path, hub.endpoint, output, HF_HUB_OFFLINE="1").wait() == before


@pytest.mark.parametrize("where", ["uri", "revision"])
def test_a_pinned_revision_asks_nobody_and_is_not_recorded(hub: Hub, tmp_path: Path, where: str) -> None:
    pinned = hub.main
    hub.push(_model(2))
    hub.trouble_with_commits = Answer(500)
    model = {"uri": f"{URI}@{pinned}"} if where == "uri" else {"revision": pinned}
    said = Node(tmp_path, hub.endpoint, f"file://{tmp_path}/out", **model).wait()
    assert (said["revision"], said["described"]) == (pinned, pinned)
    assert hub.questions == 0
    assert not (tmp_path / "out").exists()


def test_the_job_s_token_is_used(hub: Hub, tmp_path: Path) -> None:
    Node(tmp_path, hub.endpoint, f"file://{tmp_path}/out", HF_TOKEN="hf_mine").wait()
    assert hub.tokens[f"/api/models/{NAME}"] == "Bearer hf_mine"
    assert {token for path, token in hub.tokens.items() if NAME in path} == {"Bearer hf_mine"}


@pytest.mark.parametrize(
    ("trouble", "exit_class", "message"),
    [
        (
            Answer(401, b"", {"X-Error-Code": "RepoNotFound"}),
            "InvalidModel",
            f"{URI} does not exist or is private; correct spec.model.uri or set HF_TOKEN.",
        ),
        (
            Answer(403, b"", {"X-Error-Code": "GatedRepo"}),
            "InvalidModel",
            f"{URI} is gated; accept its terms on the hub and set HF_TOKEN.",
        ),
        (
            Answer(401, b"", {"X-Error-Message": "Invalid credentials in Authorization header"}),
            "InvalidModel",
            f"{URI} may not be read: the hub answered 401; set HF_TOKEN to one that may.",
        ),
        (
            Answer(500),
            "StorageUnavailable",
            f"{URI} could not be fetched: the hub answered 500; try again later.",
        ),
        (
            Answer(200, b'{"id": "org/base"}', {"Content-Type": "application/json"}),
            "InvalidModel",
            f"The hub does not say which commit {URI} is at; name one in spec.model.revision.",
        ),
    ],
    ids=["absent", "gated", "bad token", "broken", "no commit"],
)
def test_a_hub_that_names_no_commit_is_told_in_a_sentence(
    hub: Hub, tmp_path: Path, trouble: Answer, exit_class: str, message: str
) -> None:
    hub.trouble = trouble
    said = Node(tmp_path, hub.endpoint, f"file://{tmp_path}/out").wait()
    assert (said["class"], said["message"]) == (exit_class, message)
    assert not (tmp_path / "out").exists()


def test_a_hub_that_does_not_answer_is_told_in_a_sentence(tmp_path: Path) -> None:
    said = Node(tmp_path, "http://127.0.0.1:9", f"file://{tmp_path}/out").wait()
    assert (said["class"], said["message"]) == (
        "StorageUnavailable",
        f"{URI} could not be looked up: the hub did not answer; check the network and HF_ENDPOINT.",
    )


def test_offline_an_empty_cache_is_told_in_a_sentence(hub: Hub, tmp_path: Path) -> None:
    said = Node(tmp_path, hub.endpoint, f"file://{tmp_path}/out", HF_HUB_OFFLINE="1").wait()
    assert said["message"] == (f"{URI} is not in the local cache and HF_HUB_OFFLINE is set; unset it or fill HF_HOME.")


@pytest.mark.parametrize("without", ["offline", "unreachable", "broken"])
def test_without_the_hub_the_commit_is_the_one_that_the_cache_knows(hub: Hub, tmp_path: Path, without: str) -> None:
    Node(tmp_path, hub.endpoint, f"file://{tmp_path}/first").wait()
    hub.push(_model(2))
    known = Node(tmp_path, hub.endpoint, f"file://{tmp_path}/second").wait()
    assert known["revision"] == hub.main
    pinned = next(commit for commit in hub.commits if commit != hub.main)
    Node(tmp_path, hub.endpoint, f"file://{tmp_path}/third", revision=pinned).wait()
    hub.push(_model(3))
    variables = {"HF_HUB_OFFLINE": "1"} if without == "offline" else {}
    endpoint = "http://127.0.0.1:9" if without == "unreachable" else hub.endpoint
    hub.trouble = Answer(500) if without == "broken" else None
    assert Node(tmp_path, endpoint, f"file://{tmp_path}/new", **variables).wait() == known


def test_a_node_that_was_told_the_commit_can_start_jobs_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    known = Node(tmp_path, hub.endpoint, f"file://{tmp_path}/out", "a").wait()
    Node(tmp_path, hub.endpoint, f"file://{tmp_path}/out", "b").wait()
    assert hub.questions == 1
    assert Node(tmp_path, hub.endpoint, f"file://{tmp_path}/new", "b", HF_HUB_OFFLINE="1").wait() == known


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ("{", "it names no commit"),
        ('{"schemaVersion": 1, "uri": "hf://org/base", "revision": "main"}', "it names no commit"),
        (f'{{"schemaVersion": 1, "uri": "hf://org/other", "revision": "{"0" * 40}"}}', "it is of another model"),
    ],
)
def test_a_damaged_record_is_refused_instead_of_asking_again(
    hub: Hub, tmp_path: Path, content: str, fault: str
) -> None:
    file = tmp_path / "out" / RECORD
    file.parent.mkdir(parents=True)
    file.write_text(content)
    said = Node(tmp_path, hub.endpoint, f"file://{tmp_path}/out").wait()
    assert (said["class"], said["message"]) == (
        "StorageRefused",
        f"file://{file}, which fixes the commit of {URI} for this job, is damaged ({fault}); "
        f"restore it, or delete file://{file.parent}/ to start from the beginning.",
    )
    assert hub.requests == []


def test_a_store_that_cannot_write_only_once_is_refused(hub: Hub, tmp_path: Path) -> None:
    class Old(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            code = "NoSuchKey" if self.command == "GET" else "NotImplemented"
            body = f"<Error><Code>{code}</Code></Error>".encode()
            self.send_response(404 if self.command == "GET" else 501)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_PUT = do_GET

        def log_message(self, *_: Any) -> None:
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Old)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        access = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        access["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.server_port}"
        said = Node(tmp_path, hub.endpoint, "s3://bucket/out", **access).wait()
    finally:
        server.shutdown()
    assert (said["class"], said["message"], said["hint"]) == (
        "StorageRefused",
        f"Could not create s3://bucket/out/{RECORD}: its store does not know If-None-Match; use another one.",
        "Or write the commit into spec.model.revision: then nothing has to be recorded.",
    )
