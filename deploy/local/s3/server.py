#!/usr/bin/env python3
"""A real S3 server on this machine, for tests and the demo: Versity S3 Gateway over a directory.

    server.py run --dir DIR [--bucket NAME] -- COMMAND...   start, run COMMAND with AWS_* set, stop
    server.py start --dir DIR [--bucket NAME]               start in the background, print `export AWS_...` lines
    server.py stop --dir DIR                                stop what `start` left running
    server.py build                                         print the path of the server's binary

The binary is taken from PATH or built once with Go into ${FINETUNE_TOOLS_CACHE:-~/.cache/finetune-tools}.
It listens on 127.0.0.1 only (deploy/local/cluster gives another address). Needs nothing but the standard library.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

VERSION = "v1.8.0"
PACKAGE = "github.com/versity/versitygw/cmd/versitygw"
REGION = "us-east-1"
START_SECONDS = 60.0
# Linux ends such a process with the *thread* that forked it: this one lives as long as its process.
_FORKS = ThreadPoolExecutor(1)
_END_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG; stays through exec
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""


class ServerUnavailable(RuntimeError):
    """No S3 server can be started here; the text says what is missing."""


def tools_cache() -> Path:
    """Where built tools are kept, outside the repository."""
    return Path(os.environ.get("FINETUNE_TOOLS_CACHE") or Path.home() / ".cache" / "finetune-tools")


def binary() -> Path:
    """The server's executable: from PATH, from the cache, or built now (a minute or two, once).

    Raises:
        ServerUnavailable: there is none and it cannot be built.
    """
    if found := shutil.which("versitygw"):
        return Path(found)
    directory = tools_cache() / f"versitygw-{VERSION}"
    built = directory / "versitygw"
    if built.is_file():
        return built
    if not shutil.which("go"):
        raise ServerUnavailable(
            "No S3 server: neither 'versitygw' nor 'go' is on PATH; install Go >= 1.25 "
            f"or put versitygw {VERSION} on PATH."
        )
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test workers ask at once; one builds
        if not built.is_file():
            _build(directory)
    return built


def _build(directory: Path) -> None:
    print(f"building the S3 server {PACKAGE}@{VERSION} (once, about two minutes) ...", file=sys.stderr, flush=True)
    staging = directory / "building"
    environment = {**os.environ, "GOBIN": str(staging), "CGO_ENABLED": "0", "GOTOOLCHAIN": "local"}
    command = ["go", "install", "-trimpath", "-ldflags", "-s -w", f"{PACKAGE}@{VERSION}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ServerUnavailable(f"No S3 server: building it failed.\n{done.stderr[-2000:]}")
    (staging / "versitygw").replace(directory / "versitygw")
    shutil.rmtree(staging, ignore_errors=True)


@dataclass
class S3Server:
    """A server over ``directory``. ``stop`` and ``start`` again keep the port, the credentials and the objects.

    It outlives the process that started it, unless ``ends_with_its_starter``: then it ends however that one does.
    """

    ends_with_its_starter: ClassVar[bool] = False
    directory: Path
    access_key: str = field(default_factory=lambda: "AK" + secrets.token_hex(9).upper())
    secret_key: str = field(default_factory=lambda: secrets.token_urlsafe(30), repr=False)
    port: int = 0
    address: str = "127.0.0.1"
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    launched: Callable[[int], None] | None = field(default=None, repr=False)  # is told the process id before all else

    @property
    def endpoint(self) -> str:
        return f"http://{self.address}:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs, under the standard names."""
        return {
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    def create_bucket(self, name: str) -> None:
        """A directory below the server's root is a bucket."""
        (self.directory / "buckets" / name).mkdir(parents=True, exist_ok=True)

    def object_file(self, bucket: str, path: str) -> Path:
        """Where the server keeps an object's bytes (so that a test can damage them)."""
        return self.directory / "buckets" / bucket / path

    def start(self) -> S3Server:
        """Start and wait until it answers.

        Raises:
            ServerUnavailable: it ended at once or did not answer within a minute.
        """
        executable = binary()
        for attempt in range(3):
            port = self.port or _free_port()
            self._launch(executable, port)
            if self._answers(port):
                self.port = port
                return self
            self.stop()
            if self.port and attempt:
                break
        raise ServerUnavailable(f"The S3 server did not start; its log is {self.directory / 'server.log'}.")

    def _launch(self, executable: Path, port: int) -> None:
        for name in ("buckets", "metadata"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        # Credentials travel in the environment: arguments are visible to every process of the machine.
        environment = {
            **os.environ,
            "ROOT_ACCESS_KEY_ID": self.access_key,
            "ROOT_SECRET_ACCESS_KEY": self.secret_key,
            "VGW_REGION": REGION,
            "GOMEMLIMIT": "512MiB",
        }
        address = f"{self.address}:{port}"
        command = [str(executable), "--quiet", "--port", address, "--health", "/healthz", "--keep-alive", "posix"]
        command += ["--sidecar", str(self.directory / "metadata"), str(self.directory / "buckets")]
        if self.ends_with_its_starter:
            command = [sys.executable, "-I", "-S", "-c", _END_WITH_PARENT, str(os.getpid()), *command]
        with (self.directory / "server.log").open("ab") as log:
            start = partial(
                subprocess.Popen, command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
            launched = _FORKS.submit(start, start_new_session=True)
            self.process = launched.result()
        if self.launched:
            self.launched(self.process.pid)

    def _answers(self, port: int) -> bool:
        deadline = time.monotonic() + START_SECONDS
        assert self.process is not None
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"http://{self.address}:{port}/healthz", timeout=1.0):
                    return self.process.poll() is None
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        return False

    def stop(self) -> None:
        """End the server; objects stay."""
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process = None

    def __enter__(self) -> S3Server:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run(directory: Path, bucket: str, command: list[str]) -> int:
    """Run ``command`` beside a server; returns its exit status."""
    with S3Server(directory) as server:
        server.create_bucket(bucket)
        print(f"S3 server at {server.endpoint}, bucket s3://{bucket}", file=sys.stderr, flush=True)
        child = subprocess.Popen(command, env={**os.environ, **server.environment})
        try:
            signal.signal(signal.SIGTERM, lambda *_: child.terminate())
            while True:
                try:
                    return child.wait()
                except KeyboardInterrupt:  # the child got Ctrl-C as well and may be writing a checkpoint
                    continue
        finally:
            if child.poll() is None:
                child.kill()


def start(directory: Path, bucket: str) -> int:
    """Start in the background; the state file lets ``stop`` find it."""
    stop(directory)
    server = S3Server(directory).start()
    server.create_bucket(bucket)
    assert server.process is not None
    state = directory / "server.json"
    state.touch(mode=0o600)
    state.write_text(json.dumps({"pid": server.process.pid, "environment": server.environment}), encoding="utf-8")
    for name, value in server.environment.items():
        print(f"export {name}={value}")
    return 0


def stop(directory: Path) -> int:
    """Stop what ``start`` left running; nothing running is no error."""
    state = directory / "server.json"
    if not state.is_file():
        return 0
    pid = int(json.loads(state.read_text(encoding="utf-8"))["pid"])
    command_line = Path(f"/proc/{pid}/cmdline")
    if command_line.is_file() and b"versitygw" in command_line.read_bytes():
        os.kill(pid, signal.SIGTERM)
    state.unlink()
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["run", "start", "stop", "build"])
    parser.add_argument("--dir", type=Path, help="where the server keeps objects, metadata and its log")
    parser.add_argument("--bucket", default="finetune")
    given = sys.argv[1:] if arguments is None else arguments
    cut = given.index("--") if "--" in given else len(given)
    options, command = parser.parse_args(given[:cut]), given[cut + 1 :]
    try:
        if options.action == "build":
            print(binary())
            return 0
        if options.dir is None:
            parser.error(f"{options.action} needs --dir")
        if options.action == "run":
            if not command:
                parser.error("run needs a command after --")
            return run(options.dir.absolute(), options.bucket, command)
        if options.action == "start":
            return start(options.dir.absolute(), options.bucket)
        return stop(options.dir)
    except ServerUnavailable as error:
        print(error, file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
