"""The cluster commands of ``finetune`` against a real API server; the test writes what the operator would write."""

from __future__ import annotations

import copy
import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

import pytest
from ruamel.yaml import YAML
from tests.apiserver.kube import Kube
from tests.apiserver.log_kubelet import Log, LogKubelet
from tests.apiserver.manifests import manifest
from tests.apiserver.proxy import Proxy, dropped, gone, internal_error
from tests.apiserver.server import binary
from tests.unit.client.jobs import complete, condition, dump, failed, running

from finetune.cli import main
from finetune_api.report import ArtifactManifest, Termination
from finetune_api.status import FineTuneJobStatus, StatusArtifacts
from finetune_storage import ObjectStore, commit, write_file
from finetune_storage.artifact import write_pointer

COMMAND = str(Path(sys.executable).with_name("finetune"))
INDEX = "batch.kubernetes.io/job-completion-index"


class Shell:
    """Runs ``finetune`` with a kubeconfig: here, or (``start``) as a process of its own."""

    def __init__(self, kubeconfig: Path, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "KUBECONFIG": str(kubeconfig), "COLUMNS": "200"}

    def __call__(self, *arguments: str | Path, stdin: str = "") -> tuple[int, str, str]:
        said, complaint = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(said), redirect_stderr(complaint):
            patch.chdir(self.folder)
            patch.setenv("KUBECONFIG", self.environment["KUBECONFIG"])
            patch.setattr("sys.stdin", io.StringIO(stdin))
            patch.setattr("sys.argv", [COMMAND])
            code = main(list(map(str, arguments)))
        return code, said.getvalue(), complaint.getvalue()

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [COMMAND, *arguments],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_hear_ctrl_c,
        )

    def start_hasty(self, *arguments: str, **seconds: float) -> subprocess.Popen[str]:
        """``finetune logs`` whose patience (a constant of its module) is measured in seconds of a test."""
        hasty = "".join(f"logs.{name} = {value}\n" for name, value in seconds.items())
        program = (
            "import sys\nfrom finetune.cli import main\nfrom finetune.cluster import logs\n"
            f"{hasty}sys.exit(main(['logs', *sys.argv[1:]]))"
        )
        return subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_hear_ctrl_c,
        )


def _hear_ctrl_c() -> None:
    """As in a terminal: what a shell starts in the background ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Timeless(datetime):
    """The time of a line that a kubelet writes without one."""

    def strftime(self, format: str) -> str:
        return ""


class Reading:
    """Lines of a running command as they come."""

    def __init__(self, stream: TextIO | None) -> None:
        assert stream is not None
        self.lines: list[str] = []
        self._stream = stream
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._stream:
            self.lines.append(line.rstrip("\n"))

    def until(self, kube: Kube, *expected: str) -> None:
        """Wait for these lines among those that have come."""
        kube.wait(lambda: all(line in self.lines for line in expected), f"{expected} among {self.lines}", seconds=60)


@pytest.fixture
def shell(kubeconfig: Path, tmp_path: Path) -> Shell:
    return Shell(kubeconfig, tmp_path)


def write(folder: Path, content: dict[str, Any], name: str = "job.yaml") -> Path:
    with (folder / name).open("w", encoding="utf-8") as file:
        YAML().dump(copy.deepcopy(content), file)
    return folder / name


def be_operator(kube: Kube, name: str, status: FineTuneJobStatus) -> None:
    """Write the whole status, as a fresh look of the operator does."""
    content = dump(status)
    if "conditions" in content:
        generation = kube.get("FineTuneJob", name)["metadata"]["generation"]
        content["conditions"] = [{**known, "observedGeneration": generation} for known in content["conditions"]]
    change = [{"op": "add", "path": "/status", "value": content}]
    path = kube.path("FineTuneJob", name, subresource="status")
    answer = kube.call("PATCH", path, change, content_type="application/json-patch+json")
    assert answer.code == 200, answer.body


@pytest.fixture
def bot(kube: Kube) -> str:
    kube.create(manifest(name="bot", distributed={"nodes": 2, "processesPerNode": 2}))
    return "bot"


# ---- submit


def test_a_manifest_is_submitted_and_the_next_command_is_named(shell: Shell, kube: Kube, kubeconfig: Path) -> None:
    write(shell.folder, manifest())
    assert shell("submit", "job.yaml") == (
        0,
        f"FineTuneJob 'support-bot' created in the namespace '{kube.namespace}'\n"
        f"see how it goes: finetune status support-bot --namespace {kube.namespace}\n",
        "",
    )
    made = kube.get("FineTuneJob", "support-bot")
    assert made["spec"]["model"] == {"uri": "s3://models/base/"}
    assert [entry["manager"] for entry in made["metadata"]["managedFields"]] == ["finetune-client"]


def test_a_manifest_comes_from_standard_input_and_goes_where_the_command_line_says(shell: Shell, kube: Kube) -> None:
    content = json.dumps(manifest())
    code, said, _ = shell("submit", "-", "--namespace", kube.namespace, "-o", "json", stdin=content)
    assert (code, json.loads(said)["metadata"]["namespace"]) == (0, kube.namespace)


def test_several_manifests_are_one_list_also_where_the_cluster_refuses_the_last(shell: Shell, kube: Kube) -> None:
    for name in ("one", "two"):
        write(shell.folder, manifest(name=name), f"{name}.yaml")
    write(shell.folder, manifest(name="one", training={"epochs": 2}), "other.yaml")
    code, said, _ = shell("submit", "one.yaml", "two.yaml", "-o", "json")
    listed = json.loads(said)
    assert (code, listed["kind"]) == (0, "List")
    assert [item["metadata"]["name"] for item in listed["items"]] == ["one", "two"]
    code, said, _ = shell("submit", "two.yaml", "other.yaml", "-o", "yaml")
    assert code == 1
    assert [item["metadata"]["name"] for item in YAML(typ="safe").load(said)["items"]] == ["two"]


def test_every_problem_of_every_manifest_is_told_before_anything_is_created(shell: Shell, kube: Kube) -> None:
    write(shell.folder, manifest())
    write(shell.folder, manifest(model={"uri": "file:///models/base"}, method={"type": "Lora"}), "bad.yaml")
    code, said, complaint = shell("submit", "job.yaml", "bad.yaml")
    assert (code, said) == (10, "")
    *problems, last = complaint.splitlines()
    assert [problem.split(" (line")[0] for problem in problems] == [
        "bad.yaml: spec.model.uri",
        "bad.yaml: spec.method.type",
    ]
    assert last == "nothing was submitted"
    assert kube.list("FineTuneJob") == []


def test_submitting_the_same_job_again_changes_nothing_and_another_result_is_refused(shell: Shell, kube: Kube) -> None:
    write(shell.folder, manifest())
    shell("submit", "job.yaml")
    before = kube.get("FineTuneJob", "support-bot")["metadata"]["resourceVersion"]
    write(shell.folder, manifest(runPolicy={"maxRestarts": 7}))
    assert shell("submit", "job.yaml") == (
        0,
        f"FineTuneJob 'support-bot' exists in the namespace '{kube.namespace}' with the same result (Unseen)\n"
        "spec.runPolicy differ from the manifest and stay as they are; to change them: kubectl apply -f MANIFEST\n",
        "",
    )
    write(shell.folder, manifest(training={"epochs": 2}))
    assert shell("submit", "job.yaml") == (
        1,
        "",
        f"another FineTuneJob 'support-bot' exists in the namespace '{kube.namespace}' (Unseen), with another"
        " spec.training; choose another metadata.name, or delete that job first\n",
    )
    assert kube.get("FineTuneJob", "support-bot")["metadata"]["resourceVersion"] == before


def test_two_namespaces_that_contradict_each_other_are_refused(shell: Shell) -> None:
    write(shell.folder, manifest(metadata={"namespace": "elsewhere"}))
    assert shell("submit", "job.yaml", "-n", "here") == (
        10,
        "",
        "metadata.namespace: is not the namespace of the command line ('elsewhere');"
        " drop --namespace here, or remove the field\n",
    )
    assert shell("submit", "job.yaml") == (
        1,
        "",
        "the namespace 'elsewhere' does not exist; create it (kubectl create namespace elsewhere)"
        " or name another with --namespace\n",
    )


# ---- list, status


def test_jobs_are_listed_with_their_states(shell: Shell, kube: Kube, bot: str) -> None:
    kube.create(manifest(name="quiet"))
    be_operator(kube, bot, running())
    code, said, _ = shell("list")
    assert code == 0
    assert [line.split() for line in said.splitlines()] == [
        ["NAME", "STATE", "STEP", "TOTAL", "LOSS", "ETA", "METHOD", "NODES", "AGE"],
        ["bot", "Running", "420", "1170", "1.31", "38m", "LoRA", "2", said.splitlines()[1].split()[-1]],
        ["quiet", "Unseen", "LoRA", "1", said.splitlines()[2].split()[-1]],
    ]
    everywhere = shell("list", "-A")[1].splitlines()
    assert everywhere[0].startswith("NAMESPACE")
    assert [line.split()[1] for line in everywhere if line.startswith(f"{kube.namespace} ")] == ["bot", "quiet"]
    listed = json.loads(shell("list", "-o", "json")[1])
    assert [item["metadata"]["name"] for item in listed["items"]] == ["bot", "quiet"]
    as_yaml = YAML(typ="safe").load(shell("list", "-o", "yaml")[1])
    assert [item["kind"] for item in as_yaml["items"]] == ["FineTuneJob", "FineTuneJob"]


def test_a_namespace_without_jobs_says_so(shell: Shell, kube: Kube) -> None:
    assert shell("list") == (0, "", f"there is no FineTuneJob in the namespace '{kube.namespace}'\n")


def test_the_status_shows_plan_attempts_conditions_and_events(shell: Shell, kube: Kube, bot: str) -> None:
    be_operator(kube, bot, running())
    job = kube.get("FineTuneJob", bot)
    stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    reference = {"apiVersion": job["apiVersion"], "kind": "FineTuneJob", "name": bot, "uid": job["metadata"]["uid"]}
    for name, reason in (("mine", "Restarted"), ("other", "Foreign")):
        about = reference if name == "mine" else {**reference, "uid": "another"}
        kube.create(
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"name": name, "namespace": kube.namespace},
                "involvedObject": {**about, "namespace": kube.namespace},
                "reason": reason,
                "message": "attempt 2 starts from step 200",
                "type": "Normal",
                "count": 1,
                "firstTimestamp": stamp,
                "lastTimestamp": stamp,
            }
        )
    code, said, complaint = shell("status", bot)
    assert (code, complaint) == (0, "")
    lines = said.splitlines()
    assert lines[0].startswith(f"{kube.namespace}/bot   Running   created ")
    for heading in ("plan", "attempts", "conditions", "events"):
        assert heading in lines
    assert lines[-1].split(maxsplit=2)[1:] == ["Normal", "Restarted   attempt 2 starts from step 200"]
    assert "Foreign" not in said
    assert json.loads(shell("status", bot, "-o", "json")[1])["status"]["state"] == "Running"


# ---- what is not there, not allowed, not reachable


def test_a_missing_job_is_told_with_the_nearest_name(shell: Shell, kube: Kube, bot: str) -> None:
    assert shell("status", "bott") == (
        1,
        "",
        f"there is no FineTuneJob 'bott' in the namespace '{kube.namespace}'; did you mean 'bot'?\n",
    )


def test_who_may_not_is_told_verb_resource_and_namespace(shell: Shell, kube: Kube, tmp_path: Path) -> None:
    poor = kube.server.write_kubeconfig(
        tmp_path / "poor", token=kube.account_token("default"), namespace=kube.namespace
    )
    assert shell("list", "--kubeconfig", poor) == (
        1,
        "",
        f"the user 'system:serviceaccount:{kube.namespace}:default' may not list finetunejobs.finetune.dev in the"
        f" namespace '{kube.namespace}'; ask the administrator of the cluster for that permission\n",
    )


def test_credentials_that_do_not_count_are_told(shell: Shell, kube: Kube, tmp_path: Path) -> None:
    stranger = kube.server.write_kubeconfig(tmp_path / "stranger", token="no-such-token", namespace=kube.namespace)
    assert shell("list", "--kubeconfig", stranger) == (
        1,
        "",
        f"the cluster at {kube.server.url} does not accept the credentials of this context (401);"
        " log in again, or name another --context\n",
    )


def test_a_cluster_without_the_crd_is_told_how_to_install_it(
    shell: Shell, kube: Kube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = (
        "import sys, finetune_api; finetune_api.API_GROUP = 'absent.finetune.dev'\n"
        "from finetune.cli import main\nsys.exit(main(['list']))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], env=shell.environment, capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (
        1,
        "this cluster does not know FineTuneJobs (the CustomResourceDefinition finetunejobs.absent.finetune.dev is not"
        " installed); install the operator (docs/install.md: which images to name): helm install finetune-operator"
        " charts/finetune-operator --namespace finetune-system --create-namespace\n",
    )


def test_a_cluster_that_does_not_answer_is_told_at_once(shell: Shell, kube: Kube, tmp_path: Path) -> None:
    nowhere = kube.server.write_kubeconfig(tmp_path / "nowhere", url="http://127.0.0.1:9")
    started = time.monotonic()
    assert shell("list", "--kubeconfig", nowhere) == (
        1,
        "",
        "the cluster at http://127.0.0.1:9 cannot be reached: connection refused; see whether it runs, whether this"
        " machine can reach it, and whether the context is the right one\n",
    )
    assert time.monotonic() - started < 25


def test_a_list_of_kubeconfigs_is_merged_and_the_first_current_context_wins(
    shell: Shell, kube: Kube, kubeconfig: Path, tmp_path: Path
) -> None:
    other = YAML(typ="safe").load(kubeconfig.read_text())
    for name in ("clusters", "users", "contexts"):
        other[name][0]["name"] = "other"
    other["contexts"][0]["context"] = {"cluster": "other", "user": "other", "namespace": "elsewhere"}
    other["current-context"] = "other"
    second = write(tmp_path, other, "second")
    shell.environment["KUBECONFIG"] = os.pathsep.join((str(tmp_path / "absent"), str(kubeconfig), str(second)))
    assert shell("list")[2] == f"there is no FineTuneJob in the namespace '{kube.namespace}'\n"
    assert shell("list", "--context", "other")[2] == "there is no FineTuneJob in the namespace 'elsewhere'\n"
    code, _, complaint = shell("list", "--context", "third")
    assert (code, complaint) == (
        1,
        f"there is no context 'third' in {kubeconfig}, {second}; known there: other, test\n",
    )


def test_without_any_kubeconfig_and_outside_a_pod_a_sentence_says_what_to_set(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    shell.environment["KUBECONFIG"] = ""
    assert shell("list") == (
        1,
        "",
        f"no cluster is configured: {tmp_path}/.kube/config names none, and this is not a pod with a service account;"
        " set KUBECONFIG or name the file with --kubeconfig\n",
    )


def test_in_a_pod_its_service_account_and_namespace_are_used(
    shell: Shell, kube: Kube, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mounted = tmp_path / "serviceaccount"
    mounted.mkdir()
    (mounted / "token").write_text(kube.account_token("default"))
    (mounted / "ca.crt").write_bytes(kube.server.ca_file.read_bytes())
    (mounted / "namespace").write_text(kube.namespace)
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_TOKEN_FILENAME", str(mounted / "token"))
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_CERT_FILENAME", str(mounted / "ca.crt"))
    monkeypatch.setattr("finetune.cluster.kubeconfig.POD_NAMESPACE", mounted / "namespace")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", kube.server.url.rpartition(":")[2])
    shell.environment["KUBECONFIG"] = str(tmp_path / "absent")
    assert shell("list")[2].startswith(
        f"the user 'system:serviceaccount:{kube.namespace}:default' may not list finetunejobs.finetune.dev in the"
        f" namespace '{kube.namespace}'"
    )


def test_kubectl_finds_its_plugin_and_the_help_says_so(shell: Shell, kube: Kube, bot: str) -> None:
    kubectl = binary("kubectl")
    environment = {**shell.environment, "PATH": f"{Path(COMMAND).parent}{os.pathsep}{os.environ['PATH']}"}

    def run(*arguments: str) -> str:
        command = [str(kubectl), "finetune", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    assert run("--help").startswith("usage: kubectl finetune ")
    assert run("suspend", bot).splitlines()[-1] == f"to go on: kubectl finetune resume bot --namespace {kube.namespace}"


# ---- wait


def test_waiting_ends_when_the_job_is_complete(shell: Shell, kube: Kube, bot: str) -> None:
    be_operator(kube, bot, running())
    with Proxy(kube.server) as proxy:
        kube.server.write_kubeconfig(shell.folder / "proxied", url=proxy.url, namespace=kube.namespace)
        waiting = shell.start("wait", bot, "--timeout", "300s", "--kubeconfig", "proxied")
        kube.wait(lambda: [one for one in proxy.seen if one.is_watch], "it has looked, and waits for news")
        assert waiting.poll() is None
        be_operator(kube, bot, complete())
        said, complaint = waiting.communicate(timeout=60)
    assert (waiting.returncode, said, complaint) == (
        0,
        "FineTuneJob 'bot' is Complete: completed after 1170 steps\n",
        "",
    )


def test_waiting_for_a_job_that_failed_ends_with_its_exit_code(shell: Shell, kube: Kube, bot: str) -> None:
    be_operator(kube, bot, failed())
    assert shell("wait", bot) == (
        11,
        "",
        "the FineTuneJob 'bot' is Failed and will not be Complete: train.jsonl:7 is not a conversation\n",
    )
    assert shell("wait", bot, "--for", "failed")[0] == 0


def test_waiting_for_an_invalid_job_ends_with_code_10(shell: Shell, kube: Kube, bot: str) -> None:
    status = FineTuneJobStatus(state="Invalid", message="no", conditions=(condition("Accepted", "False"),))
    be_operator(kube, bot, status)
    assert shell("wait", bot, "--for", "Running")[0] == 10


def test_waiting_goes_on_once_an_invalid_spec_was_mended(shell: Shell, kube: Kube, bot: str) -> None:
    status = FineTuneJobStatus(state="Invalid", message="no", conditions=(condition("Accepted", "False"),))
    be_operator(kube, bot, status)
    kube.patch("FineTuneJob", bot, {"spec": {"runPolicy": {"maxRestarts": 7}}})
    with Proxy(kube.server) as proxy:
        kube.server.write_kubeconfig(shell.folder / "proxied", url=proxy.url, namespace=kube.namespace)
        waiting = shell.start("wait", bot, "--kubeconfig", "proxied")
        kube.wait(
            lambda: waiting.poll() is not None or [one for one in proxy.seen if one.is_watch],
            "the old verdict was read, and news are waited for",
            seconds=60,
        )
        be_operator(kube, bot, complete())
        assert (waiting.communicate(timeout=60)[1], waiting.returncode) == ("", 0)


def test_waiting_too_long_ends_with_code_124(shell: Shell, kube: Kube, bot: str) -> None:
    be_operator(kube, bot, running())
    started = time.monotonic()
    assert shell("wait", bot, "--for", "condition=Suspended", "--timeout", "1s") == (
        124,
        "",
        "the FineTuneJob 'bot' was not Suspended within 1 s; it is Running:"
        " step 420 of 1170, loss 1.31, 2,913 tokens/s, about 38 min left\n",
    )
    assert time.monotonic() - started < 25


def test_waiting_for_deletion_and_being_surprised_by_it(shell: Shell, kube: Kube, bot: str) -> None:
    with Proxy(kube.server) as proxy:
        kube.server.write_kubeconfig(shell.folder / "proxied", url=proxy.url, namespace=kube.namespace)
        patient = shell.start("wait", bot, "--for", "Deleted", "--kubeconfig", "proxied")
        surprised = shell.start("wait", bot, "--kubeconfig", "proxied")
        kube.wait(lambda: len([one for one in proxy.seen if not one.is_watch]) >= 4, "both have looked", seconds=60)
        kube.delete("FineTuneJob", bot)
        assert (patient.communicate(timeout=60)[0], patient.returncode) == ("FineTuneJob 'bot' is Deleted\n", 0)
        assert (surprised.communicate(timeout=60)[1], surprised.returncode) == (
            "the FineTuneJob 'bot' was deleted before it was Complete\n",
            1,
        )
    assert shell("wait", bot, "--for", "Deleted") == (0, "FineTuneJob 'bot' is Deleted\n", ""), "as kubectl wait"


def test_a_wait_survives_410_errors_and_broken_connections(shell: Shell, kube: Kube, bot: str) -> None:
    with Proxy(kube.server) as proxy:
        kube.server.write_kubeconfig(shell.folder / "proxied", url=proxy.url, namespace=kube.namespace)
        proxy.inject(gone(lambda seen: seen.is_watch))
        waiting = shell.start("wait", bot, "--timeout", "300s", "--kubeconfig", "proxied")
        kube.wait(lambda: [one for one in proxy.seen if one.fault == "410"], "a watch has ended with 410", seconds=60)
        proxy.inject(dropped(lambda seen: seen.is_watch))
        proxy.inject(internal_error(lambda seen: seen.method == "GET" and not seen.is_watch, times=2))
        proxy.break_watches()
        kube.wait(lambda: {"drop", "500"} <= {one.fault for one in proxy.seen}, "all faults have struck", seconds=60)
        be_operator(kube, bot, complete())
        said, complaint = waiting.communicate(timeout=60)
    assert (waiting.returncode, complaint) == (0, "")
    assert said == "FineTuneJob 'bot' is Complete: completed after 1170 steps\n"


# ---- suspend, resume, cancel


def test_a_job_is_suspended_and_resumed(shell: Shell, kube: Kube, bot: str) -> None:
    code, said, _ = shell("suspend", bot)
    assert (code, said) == (
        0,
        "FineTuneJob 'bot' writes a checkpoint, frees its pods and waits\n"
        f"to go on: finetune resume bot --namespace {kube.namespace}\n",
    )
    assert kube.get("FineTuneJob", bot)["spec"]["runPolicy"]["suspend"] is True
    assert shell("suspend", bot)[1] == "FineTuneJob 'bot' is already suspended (Unseen)\n"
    code, said, _ = shell("resume", bot)
    assert (code, said.splitlines()[0]) == (0, "FineTuneJob 'bot' goes on from its newest checkpoint")
    assert kube.get("FineTuneJob", bot)["spec"]["runPolicy"]["suspend"] is False
    assert shell("resume", bot)[1] == "FineTuneJob 'bot' is not suspended (Unseen)\n"


def test_a_job_that_has_ended_can_no_longer_be_suspended(shell: Shell, kube: Kube, bot: str) -> None:
    be_operator(kube, bot, complete())
    assert shell("suspend", bot) == (1, "", "the FineTuneJob 'bot' is Complete and can no longer be suspended\n")


def test_a_job_is_cancelled_only_after_a_yes(shell: Shell, kube: Kube, bot: str) -> None:
    be_operator(kube, bot, running())
    assert shell("cancel", bot, stdin="") == (
        1,
        "",
        "nobody can be asked here whether to delete the FineTuneJob 'bot'; add --yes\n",
    )
    assert kube.find("FineTuneJob", bot) is not None
    assert shell("cancel", bot, "--yes") == (
        0,
        f"FineTuneJob 'bot' deleted from the namespace '{kube.namespace}'; its pods write a checkpoint and stop\n"
        f"artifacts and checkpoints stay where they are: s3://adapters/team/{kube.namespace}/bot/\n",
        "",
    )
    assert kube.find("FineTuneJob", bot) is None


def test_the_end_of_input_is_a_no(shell: Shell, kube: Kube, bot: str) -> None:
    ours, theirs = pty.openpty()
    asked = subprocess.Popen(
        [COMMAND, "cancel", bot],
        env=shell.environment,
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(theirs)
    os.write(ours, b"\x04")  # Ctrl-D
    said, complaint = asked.communicate(timeout=60)
    os.close(ours)
    question = f"delete the Unseen FineTuneJob 'bot' in the namespace '{kube.namespace}'? [y/N] \n"
    assert (asked.returncode, said, complaint) == (1, question, "nothing was deleted\n")
    assert kube.find("FineTuneJob", bot) is not None


# ---- fetch, run


def publish(folder: Path) -> tuple[str, str]:
    """A real artifact; its URI and the digest of its manifest."""
    return publish_at(ObjectStore.open(f"file://{folder}/published/"))


def publish_at(store: ObjectStore) -> tuple[str, str]:
    entries = tuple(write_file(store, name, name.encode() * 100) for name in ("adapter.bin", "adapter_config.json"))
    about = ArtifactManifest(
        job={"name": "bot"},
        format="Adapter",
        base_model={},
        dataset={},
        seed=0,
        versions={},
        config={},
        plan={},
        metrics={},
        files=entries,
        created_at="2026-11-21T12:00:00Z",
    )
    return store.uri, commit(store, "", about)


def test_an_artifact_is_fetched_and_verified(shell: Shell, kube: Kube, bot: str) -> None:
    uri, sha256 = publish(shell.folder)
    be_operator(kube, bot, complete(uri, sha256))
    assert shell("fetch", bot, "-o", "adapter") == (
        0,
        "adapter: 2 files, 2.9 KiB, every digest verified (Adapter)\n",
        "",
    )
    assert (shell.folder / "adapter" / "adapter.bin").read_bytes() == b"adapter.bin" * 100
    assert shell("fetch", bot, "-o", "adapter")[0] == 0, "it is there already"
    (shell.folder / "adapter" / "manifest.json").unlink()
    code, _, complaint = shell("fetch", bot, "-o", "adapter")
    assert (code, complaint) == (
        16,
        "'adapter' is not empty; choose another directory for the artifact.\n",
    )


def test_an_artifact_is_fetched_to_the_folder_that_the_user_is_in(shell: Shell, kube: Kube, bot: str) -> None:
    uri, sha256 = publish(shell.folder / "elsewhere")
    be_operator(kube, bot, complete(uri, sha256))
    shell.folder = shell.folder / "here"
    shell.folder.mkdir()
    assert shell("fetch", bot, "-o", ".") == (0, ".: 2 files, 2.9 KiB, every digest verified (Adapter)\n", "")
    assert (shell.folder / "adapter.bin").exists()


def test_an_artifact_that_is_not_the_reported_one_is_refused(shell: Shell, kube: Kube, bot: str) -> None:
    uri, _ = publish(shell.folder)
    be_operator(kube, bot, complete(uri, "ab" * 32))
    code, _, complaint = shell("fetch", bot)
    assert code == 16
    assert "instead of abababababab" in complaint
    assert not (shell.folder / bot).exists()


@pytest.fixture
def wordless(kube: Kube, s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> ObjectStore:
    """The job 'bot' is complete and the last word of its pod was lost; where it has published."""
    for name, value in s3_server.environment.items():
        if name != "AWS_ENDPOINT_URL":
            monkeypatch.setenv(name, value)
    place = {"uri": f"s3://bucket/{kube.namespace}", "endpoint": "http://minio.inside.the.cluster:9000"}
    uid = kube.create(manifest(name="bot", output={**place, "pathStyle": True}))["metadata"]["uid"]
    lost = condition("ArtifactsPublished", "Unknown", "LastWordLost")
    conditions = (condition("Accepted"), lost, condition("Complete"))
    be_operator(kube, "bot", FineTuneJobStatus(state="Complete", message="the pod is gone", conditions=conditions))
    uri = f"{place['uri']}/{kube.namespace}/bot/{uid}/"
    return ObjectStore.open(uri, endpoint=s3_server.endpoint, path_style=True)


def test_an_artifact_whose_pod_said_no_last_word_is_found_by_its_pointer(
    shell: Shell, wordless: ObjectStore, s3_server: Any
) -> None:
    fetch = ("fetch", "bot", "-o", "adapter", "--endpoint", s3_server.endpoint)
    assert shell(*fetch) == (
        1,
        "",
        f"the FineTuneJob 'bot' is Complete, but nothing is published at {wordless.uri}; the pod is gone\n",
    )
    uri, sha256 = publish_at(wordless.child("artifacts/0123456789ab/"))
    write_pointer(wordless, "artifacts/0123456789ab", sha256)
    assert shell(*fetch) == (
        0,
        "adapter: 2 files, 2.9 KiB, every digest verified (Adapter)\n",
        f"the training pod's last word was lost: it did not confirm that the artifact is {uri}"
        f" (manifest sha256 {sha256}), which the object storage names as the newest\n",
    )
    assert (shell.folder / "adapter" / "adapter.bin").read_bytes() == b"adapter.bin" * 100


def test_a_job_without_an_artifact_says_how_to_wait_for_it(shell: Shell, kube: Kube, bot: str) -> None:
    be_operator(kube, bot, running())
    assert shell("fetch", bot) == (
        1,
        "",
        "the FineTuneJob 'bot' has published nothing; it is Running; wait for it: finetune wait bot\n",
    )


def test_run_on_kubernetes_submits_follows_and_fetches(shell: Shell, kube: Kube) -> None:
    write(shell.folder, manifest(name="bot"))
    uri, sha256 = publish(shell.folder)
    process = shell.start("run", "--on", "kubernetes", "job.yaml", "--output", "json")
    told = Reading(process.stderr)
    told.until(kube, f"FineTuneJob 'bot' created in the namespace '{kube.namespace}'")
    be_operator(kube, "bot", FineTuneJobStatus(state="Pending", message="waiting for 2 nodes"))
    told.until(kube, "pending: waiting for 2 nodes")
    be_operator(kube, "bot", running())
    told.until(kube, "training (attempt 2), step 420/1170, loss 1.31, 2,913 tokens/s, about 38 min 00 s left")
    be_operator(kube, "bot", complete(uri, sha256))
    said = process.stdout.read() if process.stdout else ""
    assert process.wait(60) == 0, told.lines
    result = json.loads(said)
    assert (result["state"], result["job"], result["fetchedTo"]) == ("Completed", f"{kube.namespace}/bot", "bot")
    assert result["artifacts"]["manifestSha256"] == sha256
    assert (shell.folder / "bot" / "adapter.bin").exists()
    told.until(kube, "fetched to bot, every digest verified")
    assert "attempt 1 ended at step 217 (RankKilled): rank 3 was killed by SIGKILL" in told.lines
    assert "Completed: completed after 1170 steps" in told.lines


def test_a_run_whose_folder_is_taken_is_refused_before_anything_is_created(shell: Shell, kube: Kube) -> None:
    write(shell.folder, manifest(name="bot"))
    (shell.folder / "bot").mkdir()
    (shell.folder / "bot" / "notes").touch()
    run = ("run", "--on", "kubernetes", "job.yaml")
    how = "name another with --directory, or leave the artifact where it is with --no-fetch\n"
    assert shell(*run) == (16, "", f"'bot' is not empty and the artifact of 'bot' is to go there; {how}")
    assert shell(*run, "--directory", "/proc/nope/bot") == (
        16,
        "",
        "'/proc/nope/bot' cannot be written (No such file or directory); choose another directory for the artifact.\n",
    )
    assert kube.find("FineTuneJob", "bot") is None
    kube.create(manifest(name="bot"))
    be_operator(kube, "bot", failed())
    assert shell(*run)[0] == 11, "nothing will be fetched"


def test_the_same_run_again_finds_its_artifact_where_it_was_fetched_to(shell: Shell, kube: Kube) -> None:
    uri, sha256 = publish(shell.folder)
    kube.create(manifest(name="bot"))
    be_operator(kube, "bot", complete(uri, sha256))
    write(shell.folder, manifest(name="bot"))
    for _ in range(2):
        code, said, complaint = shell("run", "--on", "kubernetes", "job.yaml")
        assert (code, said.splitlines()[-1]) == (0, "fetched to bot, every digest verified"), complaint
    (shell.folder / "bot" / "adapter.bin").write_bytes(b"changed")
    code, _, complaint = shell("run", "--on", "kubernetes", "job.yaml")
    assert (code, complaint.splitlines()[-1]) == (
        16,
        "'bot' holds this artifact, changed since it was fetched: 'adapter.bin' has 7 bytes instead of 1100."
        " Remove it, or choose another directory for the artifact.",
    )


def test_an_artifact_in_a_volume_of_the_cluster_is_left_there(shell: Shell, kube: Kube) -> None:
    content = manifest(name="bot", output={"uri": "pvc://models/out"})
    write(shell.folder, content)
    kube.create(content)
    be_operator(kube, "bot", complete("pvc://models/out/artifacts/0123456789ab/"))
    code, said, _ = shell("run", "--on", "kubernetes", "job.yaml")
    assert (code, said.splitlines()[-1]) == (
        0,
        "not fetched: the PersistentVolumeClaim 'models' is not mounted on this machine",
    )
    assert shell("fetch", "bot") == (
        16,
        "",
        "the artifact lies in the PersistentVolumeClaim 'models' (pvc://models/out/artifacts/0123456789ab/), which is"
        " not mounted on this machine; run this in a pod that mounts it at /mnt/pvc/models\n",
    )


def test_a_fetch_that_failed_is_offered_again_as_it_was_meant(
    shell: Shell, kube: Kube, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNE_STORAGE_RETRY_SECONDS", "1")
    write(shell.folder, manifest(name="bot"))
    kube.create(manifest(name="bot"))
    be_operator(kube, "bot", complete())
    options = ("--directory", "my adapter", "--endpoint", "http://127.0.0.1:9")
    code, _, complaint = shell("run", "--on", "kubernetes", "job.yaml", *options)
    assert code != 0
    assert (
        f"the job is complete; to fetch it later: finetune fetch bot --namespace {kube.namespace}"
        " --directory 'my adapter' --endpoint http://127.0.0.1:9"
    ) in complaint.splitlines()


def test_ctrl_c_detaches_and_the_same_command_comes_back(shell: Shell, kube: Kube) -> None:
    write(shell.folder, manifest(name="bot"))
    options = ("--no-fetch", "--endpoint", "http://s3:9000", "-o", "json", "--directory", "my adapter")
    process = shell.start("run", "--on", "kubernetes", "job.yaml", *options)
    told = Reading(process.stderr)
    told.until(kube, "waiting for the operator: no operator has looked at it yet")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    told.until(kube, f"to stop it: finetune cancel bot --namespace {kube.namespace}")
    assert told.lines[-3:-1] == [
        "detached; the job goes on in the cluster",
        "to come back: finetune run --on kubernetes job.yaml --directory 'my adapter' --endpoint http://s3:9000"
        " --no-fetch --output json",
    ]
    be_operator(kube, "bot", failed())
    code, said, complaint = shell("run", "--on", "kubernetes", "job.yaml")
    assert (code, said) == (11, "Failed: train.jsonl:7 is not a conversation\n")
    assert complaint.splitlines() == [
        f"FineTuneJob 'bot' found (Failed) in the namespace '{kube.namespace}'",
        "failed: train.jsonl:7 is not a conversation",
        f"the first error: finetune logs bot --namespace {kube.namespace} --first-error",
    ]


# ---- logs


@pytest.fixture
def kubelet(kube: Kube, tmp_path: Path) -> Iterator[LogKubelet]:
    with LogKubelet(tmp_path, f"n-{uuid.uuid4().hex[:8]}").registered(kube) as registered:
        yield registered


def run_pod(kube: Kube, kubelet: LogKubelet, job: str, index: int, suffix: str) -> Log:
    """A running training pod of ``job``; returns its log."""
    name = make_pod(kube, kubelet, job, index, suffix)
    log = kubelet.logs.setdefault(name, Log())
    set_state(kube, name, "Running", {"running": {"startedAt": "2026-11-21T12:00:00Z"}})
    return log


def make_pod(kube: Kube, kubelet: LogKubelet, job: str, index: int, suffix: str) -> str:
    """A training pod whose kubelet has not looked at it."""
    name = f"ftj-{job}-{index}-{suffix}"
    container = {
        "name": "trainer",
        "image": "trainer",
        "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
    }
    pod_context = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    kube.create(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": {"finetune.dev/job": job, INDEX: str(index)}},
            "spec": {"nodeName": kubelet.node, "containers": [container], "securityContext": pod_context},
        }
    )
    return name


def end_pod(kube: Kube, kubelet: LogKubelet, name: str, termination: Termination | None, exit_code: int) -> None:
    kubelet.logs[name].open = False
    message = termination.model_dump_json(by_alias=True, exclude_defaults=True) if termination else ""
    ended = {"exitCode": exit_code, "reason": "Error" if exit_code else "Completed", "message": message}
    set_state(kube, name, "Failed" if exit_code else "Succeeded", {"terminated": ended})


def set_state(kube: Kube, name: str, phase: str, state: dict[str, Any]) -> None:
    container = {
        "name": "trainer",
        "image": "trainer",
        "imageID": "",
        "ready": phase == "Running",
        "restartCount": 0,
        "state": state,
        "containerID": "containerd://1",
    }
    kube.patch("Pod", name, {"status": {"phase": phase, "containerStatuses": [container]}}, subresource="status")


def test_logs_follow_a_rank_across_replaced_pods_and_broken_connections(
    shell: Shell, kube: Kube, bot: str, kubelet: LogKubelet
) -> None:
    be_operator(kube, bot, running())
    first = run_pod(kube, kubelet, bot, 0, "aaaaa")
    run_pod(kube, kubelet, bot, 1, "other").write("not of rank 0")
    first.write("step 1", "step 2")
    first.break_after = 3
    process = shell.start("logs", bot)
    read, told = Reading(process.stdout), Reading(process.stderr)
    read.until(kube, "step 1", "step 2")
    first.write("step 3", "step 3", "step 4")
    read.until(kube, "step 4")
    assert [request.get("sinceTime") for request in first.requests[:2]] == [
        None,
        first.lines[2][0].strftime("%Y-%m-%dT%H:%M:%SZ"),
    ]
    end_pod(kube, kubelet, f"ftj-{bot}-0-aaaaa", None, 31)
    second = run_pod(kube, kubelet, bot, 0, "bbbbb")
    second.write("again from step 2")
    read.until(kube, "again from step 2")
    end_pod(kube, kubelet, f"ftj-{bot}-0-bbbbb", None, 0)
    be_operator(kube, bot, complete())
    told.until(kube, "the FineTuneJob 'bot' is Complete: completed after 1170 steps")
    assert process.wait(60) == 0
    assert read.lines == ["step 1", "step 2", "step 3", "step 3", "step 4", "again from step 2"]
    assert [line for line in told.lines if not line.startswith("waiting")] == [
        f"--- pod ftj-bot-0-aaaaa on node {kubelet.node} ---",
        f"--- pod ftj-bot-0-bbbbb on node {kubelet.node} ---",
        "the FineTuneJob 'bot' is Complete: completed after 1170 steps",
    ]


def test_a_stream_that_breaks_amid_old_lines_loses_none_of_them(
    shell: Shell, kube: Kube, bot: str, kubelet: LogKubelet
) -> None:
    be_operator(kube, bot, running())
    log = run_pod(kube, kubelet, bot, 0, "aaaaa")
    began = datetime.now(UTC) - timedelta(hours=2)
    log.lines += [(began + timedelta(minutes=number), f"step {number}") for number in range(60)]
    log.break_after = 20
    process = shell.start("logs", bot)
    read = Reading(process.stdout)
    read.until(kube, *(f"step {number}" for number in range(60)))
    end_pod(kube, kubelet, f"ftj-{bot}-0-aaaaa", None, 0)
    be_operator(kube, bot, complete())
    assert process.wait(60) == 0
    assert len(read.lines) == 60


def test_logs_go_on_behind_a_pod_that_its_kubelet_refused(
    shell: Shell, kube: Kube, bot: str, kubelet: LogKubelet
) -> None:
    be_operator(kube, bot, running())
    refused = make_pod(kube, kubelet, bot, 0, "aaaaa")
    reason = {"reason": "OutOfcpu", "message": "Pod was rejected: Node didn't have enough resource: cpu"}
    kube.patch("Pod", refused, {"status": {"phase": "Failed", **reason}}, subresource="status")
    process = shell.start("logs", bot)
    read, told = Reading(process.stdout), Reading(process.stderr)
    told.until(
        kube,
        f"pod {refused} ended before its container started:"
        " OutOfcpu: Pod was rejected: Node didn't have enough resource: cpu",
    )
    run_pod(kube, kubelet, bot, 0, "bbbbb").write("step 1")
    read.until(kube, "step 1")
    end_pod(kube, kubelet, f"ftj-{bot}-0-bbbbb", None, 0)
    be_operator(kube, bot, complete())
    assert process.wait(60) == 0
    assert len([line for line in told.lines if refused in line]) == 1


def test_a_complaint_of_the_kubelet_does_not_end_the_logs(
    shell: Shell, kube: Kube, bot: str, kubelet: LogKubelet
) -> None:
    trouble = "failed to create fsnotify watcher: too many open files"
    be_operator(kube, bot, running())
    log = run_pod(kube, kubelet, bot, 0, "aaaaa")
    log.write("step 1")
    log.lines.append((Timeless.now(UTC), trouble))
    log.break_after = 2
    process = shell.start("logs", bot)
    read, told = Reading(process.stdout), Reading(process.stderr)
    told.until(kube, f"the kubelet says: {trouble}")
    log.write("step 2")
    read.until(kube, "step 1", "step 2")
    end_pod(kube, kubelet, f"ftj-{bot}-0-aaaaa", None, 0)
    be_operator(kube, bot, complete())
    assert process.wait(60) == 0
    assert read.lines == ["step 1", "step 2"]
    assert len([line for line in told.lines if trouble in line]) == 1


def test_pods_of_an_earlier_job_of_the_same_name_are_not_its_own(shell: Shell, kube: Kube, kubelet: LogKubelet) -> None:
    run_pod(kube, kubelet, "bot", 0, "early").write("of the earlier job")
    end_pod(kube, kubelet, "ftj-bot-0-early", None, 11)
    born = kube.get("Pod", "ftj-bot-0-early")["metadata"]["creationTimestamp"]
    kube.wait(lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ") > born, "a second has passed")
    kube.create(manifest(name="bot"))
    be_operator(kube, "bot", running(attempts=()))
    assert shell("logs", "bot", "--first-error") == (0, "bot: nothing has failed\n", "")
    assert shell("logs", "bot", "--no-follow")[0] == 1
    run_pod(kube, kubelet, "bot", 0, "late").write("of this job")
    assert shell("logs", "bot", "--no-follow") == (0, "of this job\n", "")


def following_a_pod_that_is_lost(
    shell: Shell, kube: Kube, bot: str, kubelet: LogKubelet
) -> tuple[Log, subprocess.Popen[str], Reading, Reading]:
    """``finetune logs`` has read a line, then the pod's kubelet no longer answers; nobody ends the container."""
    be_operator(kube, bot, running())
    lost = run_pod(kube, kubelet, bot, 0, "aaaaa")
    lost.write("step 1")
    process = shell.start("logs", bot)
    read, told = Reading(process.stdout), Reading(process.stderr)
    read.until(kube, "step 1")
    lost.refused = lost.broken = True
    return lost, process, read, told


def test_logs_leave_a_pod_whose_node_is_lost_once_it_is_replaced(
    shell: Shell, kube: Kube, bot: str, kubelet: LogKubelet
) -> None:
    _, process, read, _ = following_a_pod_that_is_lost(shell, kube, bot, kubelet)
    run_pod(kube, kubelet, bot, 0, "bbbbb").write("again from step 0")
    read.until(kube, "again from step 0")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert read.lines == ["step 1", "again from step 0"]


def test_logs_that_cannot_be_read_say_so_and_end_with_the_job(
    shell: Shell, kube: Kube, bot: str, kubelet: LogKubelet
) -> None:
    lost, process, read, told = following_a_pod_that_is_lost(shell, kube, bot, kubelet)
    cannot = "the output of pod ftj-bot-0-aaaaa cannot be read: "
    kube.wait(lambda: [line for line in told.lines if line.startswith(cannot)], "it is told", seconds=60)
    assert told.lines[-1].endswith("; trying again")
    lost.refused = lost.broken = False
    lost.write("step 2")
    read.until(kube, "step 2")
    be_operator(kube, bot, failed())  # before it breaks: nobody looks while the log can be read
    lost.refused = lost.broken = True
    assert process.wait(60) == 1
    told.until(kube, "the FineTuneJob 'bot' is Failed: train.jsonl:7 is not a conversation")
    kube.wait(lambda: told.lines[-1].startswith(cannot), "the last sentence", seconds=60)
    assert not told.lines[-1].endswith("trying again")
    assert len([line for line in told.lines if line.endswith("trying again")]) == 1
    assert read.lines == ["step 1", "step 2"]


def test_logs_leave_a_pod_that_could_not_be_read_for_too_long(
    shell: Shell, kube: Kube, bot: str, kubelet: LogKubelet
) -> None:
    be_operator(kube, bot, running())
    run_pod(kube, kubelet, bot, 0, "aaaaa").refused = True
    said, complaint = shell.start_hasty(bot, OUTAGE_SECONDS=15).communicate(timeout=120)
    title, trying, last = complaint.splitlines()
    assert (said, title) == ("", f"--- pod ftj-bot-0-aaaaa on node {kubelet.node} ---")
    cannot = trying.removesuffix("; trying again")
    assert cannot.startswith("the output of pod ftj-bot-0-aaaaa cannot be read: ")
    assert last == f"{cannot}; this has lasted 15 s and the job is Running"


def test_logs_wait_in_silence_for_a_quiet_pod(shell: Shell, kube: Kube, bot: str, kubelet: LogKubelet) -> None:
    be_operator(kube, bot, running())
    log = run_pod(kube, kubelet, bot, 0, "aaaaa")
    log.lines.append((datetime.now(UTC) - timedelta(hours=2), "step 1"))
    process = shell.start_hasty(bot, _SILENCE_SECONDS=2, OUTAGE_SECONDS=60)
    read, told = Reading(process.stdout), Reading(process.stderr)
    kube.wait(lambda: len(log.requests) >= 5, "the stream was opened again and again", seconds=60)
    log.write("step 2")
    read.until(kube, "step 1", "step 2")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert [line for line in told.lines if "cannot be read" in line] == []


def test_logs_end_when_their_reader_goes_away(shell: Shell, kube: Kube, bot: str, kubelet: LogKubelet) -> None:
    run_pod(kube, kubelet, bot, 0, "aaaaa").write(*(f"step {number}" for number in range(20_000)))
    process = shell.start("logs", bot)
    assert process.stdout is not None
    assert process.stdout.readline() == "step 0\n"
    process.stdout.close()
    assert process.wait(60) == 141


def test_logs_of_a_rank_on_another_node_come_from_its_pod(
    shell: Shell, kube: Kube, bot: str, kubelet: LogKubelet
) -> None:
    run_pod(kube, kubelet, bot, 0, "aaaaa").write("of node 0")
    run_pod(kube, kubelet, bot, 1, "bbbbb").write("of node 1")
    end_pod(kube, kubelet, f"ftj-{bot}-1-bbbbb", None, 31)
    assert shell("logs", bot, "--rank", "3", "--no-follow") == (
        0,
        "of node 1\n",
        "rank 3's own file is gone with its pod; this is the output of the launcher there\n",
    )
    assert shell("logs", bot, "--no-follow", "--tail", "1") == (0, "of node 0\n", "")
    assert shell("logs", bot, "--rank", "4") == (
        1,
        "",
        "the FineTuneJob 'bot' has no rank 4; its ranks are 0 to 3\n",
    )


def test_the_own_output_of_another_rank_needs_exec_and_says_so(
    shell: Shell, kube: Kube, bot: str, kubelet: LogKubelet, tmp_path: Path
) -> None:
    run_pod(kube, kubelet, bot, 1, "bbbbb")
    rules = [
        {"apiGroups": ["finetune.dev"], "resources": ["finetunejobs"], "verbs": ["get", "list", "watch"]},
        {"apiGroups": [""], "resources": ["pods", "pods/log"], "verbs": ["get", "list"]},
    ]
    rbac = "rbac.authorization.k8s.io"
    kube.create({"apiVersion": f"{rbac}/v1", "kind": "Role", "metadata": {"name": "reader"}, "rules": rules})
    kube.create(
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "RoleBinding",
            "metadata": {"name": "reader"},
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": "reader"},
            "subjects": [{"kind": "ServiceAccount", "name": "default", "namespace": kube.namespace}],
        }
    )
    token = kube.account_token("default")
    reader = kube.server.write_kubeconfig(tmp_path / "reader", token=token, namespace=kube.namespace)
    someone = Kube(kube.server, token=token, namespace=kube.namespace)
    pods = f"/api/v1/namespaces/{kube.namespace}/pods"
    kube.wait(lambda: someone.call("GET", pods).code == 200, "the authorizer has heard of it")
    code, said, complaint = shell("logs", bot, "--rank", "2", "--kubeconfig", reader)
    assert (code, said) == (1, "")
    assert complaint.splitlines()[-1] == (
        f"this user may not create pods/exec in the namespace '{kube.namespace}';"
        " ask the administrator of the cluster for that permission"
    )


def test_logs_of_a_job_without_pods_say_why(shell: Shell, kube: Kube, bot: str) -> None:
    be_operator(kube, bot, FineTuneJobStatus(state="Pending", message="waiting for 2 nodes"))
    assert shell("logs", bot, "--no-follow") == (
        1,
        "",
        "the FineTuneJob 'bot' has no output; it is Pending; waiting for 2 nodes\n",
    )


def test_the_first_error_is_that_of_the_guilty_rank(shell: Shell, kube: Kube, bot: str, kubelet: LogKubelet) -> None:
    assert shell("logs", bot, "--first-error") == (0, "bot: nothing has failed\n", "")
    run_pod(kube, kubelet, bot, 0, "aaaaa").write("a collective failed")
    run_pod(kube, kubelet, bot, 1, "bbbbb").write("loading", "no memory")
    echo = Termination(exit_class="CommunicationFailed", exit_code=33, message="peer lost", guilty_rank=0)
    cause = Termination(
        exit_class="OutOfMemory", exit_code=15, message="rank 3 had no memory", hint="take less", guilty_rank=3, step=7
    )
    end_pod(kube, kubelet, f"ftj-{bot}-0-aaaaa", echo, 33)
    end_pod(kube, kubelet, f"ftj-{bot}-1-bbbbb", cause, 15)
    assert shell("logs", bot, "--first-error") == (
        0,
        f"bot: failed at step 7 on rank 3 in pod ftj-bot-1-bbbbb on node {kubelet.node}\n"
        "OutOfMemory: rank 3 had no memory; take less\n"
        "  rank 3 | loading\n"
        "  rank 3 | no memory\n",
        "",
    )


def test_the_output_of_a_launcher_that_was_killed_amid_a_letter_is_shown(
    shell: Shell, kube: Kube, bot: str, kubelet: LogKubelet
) -> None:
    killed = b"Gr\xfc\xdfe, \xe2\x82".decode(errors="surrogateescape")
    run_pod(kube, kubelet, bot, 0, "aaaaa").write(*(f"line {number}" for number in range(30)), killed)
    end_pod(kube, kubelet, f"ftj-{bot}-0-aaaaa", None, 137)
    code, said, complaint = shell("logs", bot, "--first-error")
    assert (code, complaint) == (0, "")
    assert [line.strip() for line in said.splitlines()[1:]] == [
        *(f"| line {number}" for number in range(11, 30)),
        "| Gr\ufffd\ufffde, \ufffd",
    ]


def test_of_an_invalid_job_the_first_error_is_every_problem_of_its_spec(shell: Shell, kube: Kube, bot: str) -> None:
    told = condition("Accepted", "False", "InvalidSpec", "spec.a: is wrong; mend it\nspec.b: is wrong; mend it")
    first = "spec.a: is wrong; mend it (and 1 more: see condition Accepted)"
    be_operator(kube, bot, FineTuneJobStatus(state="Invalid", message=first, conditions=(told,)))
    assert shell("logs", bot, "--first-error") == (
        0,
        "bot: the spec is invalid and nothing has run\n  spec.a: is wrong; mend it\n  spec.b: is wrong; mend it\n",
        "",
    )
    be_operator(kube, bot, failed("DeadlineExceeded", "runPolicy.activeDeadlineSeconds (60) is over"))
    assert shell("logs", bot, "--first-error")[1] == "bot: failed: runPolicy.activeDeadlineSeconds (60) is over\n"


def test_artifacts_of_a_status_are_those_of_the_api(kube: Kube, bot: str) -> None:
    be_operator(kube, bot, complete())
    artifacts = kube.get("FineTuneJob", bot)["status"]["artifacts"]
    assert StatusArtifacts.model_validate(artifacts) == complete().artifacts
