"""The API server of these tests is real, shared and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.apiserver.kube import Kube, Refused, wait
from tests.apiserver.server import REPOSITORY, RunningServer, _alive, shared_server


def test_the_kind_is_served_and_the_default_columns_are_printed(kube: Kube) -> None:
    resources = kube.call("GET", "/apis/finetune.dev/v1alpha1").body["resources"]
    assert [(r["name"], r["kind"], r.get("shortNames")) for r in resources] == [
        ("finetunejobs", "FineTuneJob", ["ftj"]),
        ("finetunejobs/status", "FineTuneJob", None),
    ]


def test_pod_security_refuses_a_privileged_pod(kube: Kube) -> None:
    container = {"name": "a", "image": "a", "securityContext": {"privileged": True}}
    with pytest.raises(Refused, match='violates PodSecurity "restricted:latest": privileged'):
        kube.create({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": [container]}})


def test_an_account_without_a_role_may_do_nothing_and_the_audit_log_says_so(kube: Kube) -> None:
    token = kube.account_token("default")
    with Kube(kube.server, token=token, namespace=kube.namespace) as account, pytest.raises(Refused) as caught:
        account.list("FineTuneJob")
    user = f"system:serviceaccount:{kube.namespace}:default"
    assert caught.value.message == (
        f'finetunejobs.finetune.dev is forbidden: User "{user}" cannot list resource "finetunejobs" '
        f'in API group "finetune.dev" in the namespace "{kube.namespace}"'
    )
    entries = kube.wait(
        lambda: list(kube.server.audit(user)),
        "the audit log has an entry of the account",
    )
    assert [(e["verb"], e["objectRef"]["resource"], e["responseStatus"]["code"]) for e in entries] == [
        ("list", "finetunejobs", 403)
    ]


def test_kubectl_reads_the_kubeconfig(kube: Kube, kubeconfig: Path) -> None:
    from tests.apiserver.server import binary

    done = subprocess.run([binary("kubectl"), "--kubeconfig", kubeconfig, "get", "ftj"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, f"No resources found in {kube.namespace} namespace.\n")


def test_a_job_makes_pods_that_nobody_runs(job_kube: Kube) -> None:
    job_kube.create(_job("work"))
    pods = job_kube.wait(lambda: job_kube.list("Pod"), "the Job controller has made a pod")
    assert [pod["status"]["phase"] for pod in pods] == ["Pending"]


def test_what_is_owned_goes_with_its_owner(job_kube: Kube) -> None:
    job_kube.create(_job("work"))
    job_kube.wait(lambda: job_kube.list("Pod"), "the Job controller has made a pod")
    job_kube.delete("Job", "work")
    job_kube.wait(lambda: not job_kube.list("Pod"), "the garbage collector has removed the pod")


def test_two_users_share_one_server_and_the_last_one_stops_it(tmp_path: Path) -> None:
    started = time.monotonic()
    with shared_server(tmp_path, os.getpid()) as first:
        seconds = time.monotonic() - started
        with shared_server(tmp_path, os.getpid()) as second:
            assert second == first
            assert len(_processes(first)) == 2
        assert len(_processes(first)) == 2
    assert _processes(first) == []
    print(f"start: {seconds:.1f} s")


def test_a_killed_run_leaves_no_process(tmp_path: Path) -> None:
    program = (
        "import os, sys, time, pathlib\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from tests.apiserver.server import shared_server\n"
        f"with shared_server(pathlib.Path({str(tmp_path)!r}), os.getpid()) as server:\n"
        "    print(server.directory, server.url, server.token, flush=True)\n"
        "    time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    directory, url, token = owner.stdout.readline().split()
    server = RunningServer(Path(directory), url, token)
    assert len(_processes(server)) == 2
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    wait(lambda: not _processes(server), "etcd and kube-apiserver are gone")


def test_an_operator_outlives_the_thread_that_started_it_and_dies_with_a_killed_run(
    kube: Kube, kubeconfig: Path, tmp_path: Path
) -> None:
    program = (
        "import pathlib, sys, threading, time\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from tests.apiserver.operator_process import OperatorProcess, settings\n"
        f"folder, kubeconfig = pathlib.Path({str(tmp_path)!r}), pathlib.Path({str(kubeconfig)!r})\n"
        f"operator = OperatorProcess(folder, kubeconfig, settings({kube.namespace!r}))\n"
        "thread = threading.Thread(target=operator.start)\n"
        "thread.start()\n"
        "thread.join()\n"
        "print(operator.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    try:
        operator = int(owner.stdout.readline())
        log = tmp_path / "operator.log"
        wait(lambda: "Starting the watch-stream for finetunejobs" in log.read_text(), "the operator watches", 60)
        assert _alive(operator)
    finally:
        owner.kill()
        owner.wait()
    wait(lambda: not _alive(operator), "the operator is gone")


def _job(name: str) -> dict[str, object]:
    context = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    pod = {"restartPolicy": "Never", "containers": [{"name": "a", "image": "a", "securityContext": context}]}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": {"template": {"spec": pod}}}


def _processes(server: RunningServer) -> list[int]:
    """etcd and kube-apiserver of this server, by the folder in their command lines."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            program = line.split(b"\0")[0]
            if program.endswith((b"/etcd", b"/kube-apiserver")) and str(server.directory).encode() in line:
                found.append(int(entry.name))
    return found
