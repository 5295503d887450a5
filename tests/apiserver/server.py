"""A real kube-apiserver on a real etcd, on free loopback ports, without controllers: 3 to 5 s to start.

One server serves a whole pytest run: the workers of pytest-xdist share it through a lock file and a count. The
processes belong to a keeper (this file run as a script) that stops them when it is told to, or when pytest is gone.
"""

from __future__ import annotations

import base64
import ctypes
import dataclasses
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from filelock import FileLock

REPOSITORY = Path(__file__).parents[2]
START_SECONDS = 90  # a machine with all cores busy; 3 to 5 s otherwise

# Only what the operator's children need. Every other controller would be noise in the audit log.
CONTROLLERS = "job-controller,garbage-collector-controller,namespace-controller,ttl-after-finished-controller"


class ServerUnavailable(Exception):
    """A program is missing or did not start; the sentence says which and why."""


@dataclasses.dataclass(frozen=True)
class RunningServer:
    """Where a server is. ``directory`` holds kubeconfig, ca.crt, audit.log and the logs of the processes."""

    directory: Path
    url: str
    token: str

    @property
    def kubeconfig(self) -> Path:
        return self.directory / "kubeconfig"

    @property
    def ca_file(self) -> Path:
        return self.directory / "ca.crt"

    @property
    def audit_log(self) -> Path:
        return self.directory / "audit.log"

    def write_kubeconfig(self, path: Path, *, token: str = "", url: str = "", namespace: str = "default") -> Path:
        """A kubeconfig for another identity or for a proxy in front (``url``; plain http needs no CA)."""
        url = url or self.url
        cluster: dict[str, Any] = {"server": url}
        if url.startswith("https"):
            cluster["certificate-authority-data"] = base64.b64encode(self.ca_file.read_bytes()).decode()
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": {"token": token or self.token}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": namespace}}],
            "current-context": "test",
        }
        path.write_text(yaml.safe_dump(document))
        path.chmod(0o600)
        return path

    def audit(self, user: str) -> Iterator[dict[str, Any]]:
        """Every finished request of ``user`` so far, oldest first (audit.k8s.io/v1 Event, level Metadata)."""
        with self.audit_log.open() as lines:
            for line in lines:  # of all users: parsing them all takes minutes at the end of a run
                if f'"{user}"' in line and line.endswith("\n"):
                    event = json.loads(line)
                    if event["user"].get("username") == user:
                        yield event


def binary(name: str) -> Path:
    """The program ``name``: from $KUBEBUILDER_ASSETS, else a tool of the local cluster, built now if need be."""
    assets = os.environ.get("KUBEBUILDER_ASSETS")
    if assets and (Path(assets) / name).is_file():
        return Path(assets) / name
    from deploy.local.cluster.layout import ClusterError
    from deploy.local.cluster.tools import program

    try:
        return program(name)
    except ClusterError as error:
        raise ServerUnavailable(str(error)) from None


# ---- one server for all workers of a run -----------------------------------------------------------------------------


@contextmanager
def shared_server(root: Path, owner: int, *, controllers: bool = False) -> Iterator[RunningServer]:
    """The one server of a run whose workers all know ``root``; ends with the last user or with process ``owner``."""
    root.mkdir(parents=True, exist_ok=True)
    ledger = root / "users.json"
    with FileLock(root / "lock"):
        state = json.loads(ledger.read_text()) if ledger.exists() else {"users": 0, "starts": 0}
        if state["users"] == 0:
            state["starts"] += 1
            state["keeper"] = _start_keeper(root / f"server-{state['starts']}", owner, controllers)
        state["users"] += 1
        ledger.write_text(json.dumps(state))
        directory = root / f"server-{state['starts']}"
        running = _read_ready(directory)
    try:
        yield running
    finally:
        with FileLock(root / "lock"):
            state = json.loads(ledger.read_text())
            state["users"] -= 1
            ledger.write_text(json.dumps(state))
            if state["users"] == 0:
                _stop_keeper(state["keeper"], directory)


def _start_keeper(directory: Path, owner: int, controllers: bool) -> int:
    for name in ("etcd", "kube-apiserver", *(("kube-controller-manager",) if controllers else ())):
        binary(name)  # building takes minutes and is no part of the start
    directory.mkdir(parents=True)
    with (directory / "keeper.log").open("wb") as log:
        keeper = subprocess.Popen(
            [sys.executable, __file__, str(directory), str(owner), "controllers" if controllers else "bare"],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + START_SECONDS
    while not (directory / "ready.json").exists():
        if keeper.poll() is not None:
            raise ServerUnavailable((directory / "keeper.log").read_text().strip().splitlines()[-1])
        if time.monotonic() > deadline:
            keeper.terminate()
            raise ServerUnavailable(f"The API server was not ready within {START_SECONDS} s; logs: {directory}.")
        time.sleep(0.02)
    return keeper.pid


def _read_ready(directory: Path) -> RunningServer:
    ready = json.loads((directory / "ready.json").read_text())
    return RunningServer(directory, ready["url"], ready["token"])


def _stop_keeper(pid: int, directory: Path) -> None:
    os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + 20
    while not (directory / "stopped").exists():
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)  # its children die with it
            return
        time.sleep(0.02)
    shutil.rmtree(directory / "etcd", ignore_errors=True)


# ---- the keeper ------------------------------------------------------------------------------------------------------


class Keeper:
    """Starts the processes in ``directory`` and stops them; children die with it, whatever happens."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.processes: list[tuple[str, subprocess.Popen[bytes]]] = []
        self.token = secrets.token_hex(16)

    def start(self, controllers: bool) -> str:
        """Again with other ports if it fails: between choosing and binding one somebody else may take it."""
        for _ in range(2):
            try:
                return self._start(controllers)
            except ServerUnavailable as error:
                print(f"{error} Starting once more.", flush=True)
                self.stop()
                self.processes.clear()
                shutil.rmtree(self.directory / "etcd", ignore_errors=True)
        return self._start(controllers)

    def _start(self, controllers: bool) -> str:
        etcd_port, peer_port, port = _free_ports(3)
        url = f"https://127.0.0.1:{port}"
        _write_certificates(self.directory)
        (self.directory / "tokens.csv").write_text(f'{self.token},admin,admin,"system:masters"\n')
        (self.directory / "audit.yaml").write_text(yaml.safe_dump(_AUDIT_POLICY))
        self._run("etcd", _etcd_arguments(self.directory / "etcd", etcd_port, peer_port))
        self._run("kube-apiserver", _apiserver_arguments(self.directory, etcd_port, port))
        running = RunningServer(self.directory, url, self.token)
        running.write_kubeconfig(running.kubeconfig)
        self._wait_ready(running)
        install_crd(running)
        if controllers:
            self._run("kube-controller-manager", _manager_arguments(self.directory))
        return url

    def stop(self) -> None:
        for _, process in reversed(self.processes):
            process.kill()  # nothing is worth keeping, and a graceful API server takes its time
        for _, process in self.processes:
            process.wait()

    def dead(self) -> str:
        """The name of a process that has ended, or an empty string."""
        return next((name for name, process in self.processes if process.poll() is not None), "")

    def _run(self, name: str, arguments: Sequence[str]) -> None:
        with (self.directory / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [str(binary(name)), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,
            )
        self.processes.append((name, process))

    def _wait_ready(self, running: RunningServer) -> None:
        from tests.apiserver.kube import Kube, Unreachable

        deadline = time.monotonic() + START_SECONDS
        with Kube(running) as kube:
            while True:
                if name := self.dead():
                    tail = (self.directory / f"{name}.log").read_text().strip().splitlines()[-1:]
                    raise ServerUnavailable(f"{name} ended during its start: {''.join(tail)}")
                try:
                    if kube.call("GET", "/readyz").code == 200:
                        return
                except Unreachable:
                    pass
                if time.monotonic() > deadline:
                    raise ServerUnavailable(f"kube-apiserver was not ready in {START_SECONDS} s: {self.directory}.")
                time.sleep(0.05)


def install_crd(running: RunningServer) -> None:
    """Applies crds/ and waits until the API server serves the new kind."""
    from tests.apiserver.kube import Kube

    with Kube(running) as kube:
        for path in sorted((REPOSITORY / "crds").glob("*.yaml")):
            crd = yaml.safe_load(path.read_text())
            kube.apply(crd)
            group, plural = crd["spec"]["group"], crd["spec"]["names"]["plural"]
            version = crd["spec"]["versions"][0]["name"]
            kube.wait(
                lambda g=group, v=version, p=plural: kube.call("GET", f"/apis/{g}/{v}/{p}").code == 200,
                f"the API server serves {plural}.{group}",
            )


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _openssl(*arguments: str, directory: Path) -> None:
    program = shutil.which("openssl")
    if program is None:
        raise ServerUnavailable("openssl is not installed; install it: apt-get install openssl.")
    done = subprocess.run([program, *arguments], cwd=directory, capture_output=True, text=True)
    if done.returncode:
        raise ServerUnavailable(f"openssl {arguments[0]} failed: {done.stderr.strip()}")


def _write_certificates(directory: Path) -> None:
    """ca.crt (which is also the server's certificate: one self-signed EC key) and the key that signs account tokens."""
    for name in ("server", "accounts"):
        _openssl("ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", f"{name}.key", directory=directory)
    names = "subjectAltName=DNS:localhost,DNS:kubernetes.default.svc,IP:127.0.0.1"
    _openssl(
        *("req", "-x509", "-new", "-key", "server.key", "-days", "2", "-subj", "/CN=kube-apiserver"),
        *("-addext", names, "-addext", "basicConstraints=critical,CA:TRUE", "-out", "ca.crt"),
        directory=directory,
    )
    _openssl("ec", "-in", "accounts.key", "-pubout", "-out", "accounts.pub", directory=directory)


def _etcd_arguments(data: Path, port: int, peer_port: int) -> list[str]:
    return [
        f"--data-dir={data}",
        f"--listen-client-urls=http://127.0.0.1:{port}",
        f"--advertise-client-urls=http://127.0.0.1:{port}",
        f"--listen-peer-urls=http://127.0.0.1:{peer_port}",
        f"--initial-advertise-peer-urls=http://127.0.0.1:{peer_port}",
        f"--initial-cluster=default=http://127.0.0.1:{peer_port}",
        "--unsafe-no-fsync",
        "--log-level=error",
    ]


def _apiserver_arguments(directory: Path, etcd_port: int, port: int) -> list[str]:
    return [
        f"--etcd-servers=http://127.0.0.1:{etcd_port}",
        "--bind-address=127.0.0.1",
        "--advertise-address=192.0.2.1",  # documentation address: nobody connects to it, and loopback is refused
        "--endpoint-reconciler-type=none",
        f"--secure-port={port}",
        f"--tls-cert-file={directory / 'ca.crt'}",
        f"--tls-private-key-file={directory / 'server.key'}",
        f"--token-auth-file={directory / 'tokens.csv'}",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={directory / 'accounts.pub'}",
        f"--service-account-signing-key-file={directory / 'accounts.key'}",
        "--service-cluster-ip-range=10.96.0.0/16",
        "--authorization-mode=RBAC",
        f"--audit-policy-file={directory / 'audit.yaml'}",
        f"--audit-log-path={directory / 'audit.log'}",
        "--audit-log-maxsize=0",  # one file, however long
        "--allow-privileged=true",  # so that Pod Security is what refuses
        "--profiling=false",
        "--v=0",
    ]


def _manager_arguments(directory: Path) -> list[str]:
    kubeconfig = directory / "kubeconfig"
    return [
        *(f"--{prefix}kubeconfig={kubeconfig}" for prefix in ("", "authentication-", "authorization-")),
        f"--controllers={CONTROLLERS}",
        "--leader-elect=false",
        "--secure-port=0",
        "--kube-api-qps=500",
        "--kube-api-burst=1000",
        "--v=0",
    ]


_AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}


def _die_with_parent() -> None:
    """Between fork and exec: SIGKILL when the keeper ends, however it ends (Linux only, as the whole local cluster)."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def main(directory: Path, owner: int, controllers: bool) -> int:
    """Keeps a server until SIGTERM, the end of process ``owner``, or the end of one of its processes."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    keeper = Keeper(directory)
    try:
        url = keeper.start(controllers)
        pending = directory / "ready.json.new"
        pending.write_text(json.dumps({"url": url, "token": keeper.token}))
        pending.rename(directory / "ready.json")
        while _alive(owner):
            if name := keeper.dead():
                print(f"{name} has ended; its log is in {directory}.", flush=True)
                return 1
            time.sleep(0.2)
    except ServerUnavailable as error:
        print(error, flush=True)
        return 1
    finally:
        keeper.stop()
        (directory / "stopped").touch()
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "controllers"))
