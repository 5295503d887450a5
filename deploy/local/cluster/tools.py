"""The programs of the cluster, built once from Go modules into the tools cache.

A program on PATH or in $KUBEBUILDER_ASSETS is taken instead if it reports the same version. What is built is fixed by
the go.mod and go.sum under ``tools/``; a module that installs by itself needs none.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploy.local.cluster.layout import ClusterError, tools_cache

_SOURCES = Path(__file__).parent / "tools"
_KUBERNETES = "v1.36.3"
_COMPONENT_VERSION = "k8s.io/component-base/version"
_CONTAINERD = "github.com/containerd/containerd/v2"


@dataclass(frozen=True)
class Tool:
    """One Go module and the programs that are taken from it. Our own modules are named after their program."""

    name: str
    version: str
    packages: dict[str, str]  # program -> Go package (versioned by go.mod, or by `version` where there is no go.mod)
    minutes: float  # on two cores with nothing cached
    tags: str = ""
    link: str = ""  # linker flags
    version_command: tuple[str, ...] = ("--version",)  # none: what is on PATH under this name is something else

    @property
    def directory(self) -> Path:
        return tools_cache() / f"{self.name}-{self.version}"

    @property
    def sources(self) -> Path:
        return _SOURCES / self.name


TOOLS: dict[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool(
            "kubernetes",
            _KUBERNETES,
            {
                name: f"k8s.io/kubernetes/cmd/{name}"
                for name in (
                    "kube-apiserver",
                    "kube-controller-manager",
                    "kube-scheduler",
                    "kubelet",
                    "kube-proxy",
                    "kubectl",
                )
            },
            minutes=4.2,
            tags="selinux,notest",
            # Helm and clients read the version; without it a server says v0.0.0.
            link=f"-X {_COMPONENT_VERSION}.gitVersion={_KUBERNETES} -X {_COMPONENT_VERSION}.gitMajor=1 "
            f"-X {_COMPONENT_VERSION}.gitMinor=36 -X {_COMPONENT_VERSION}.gitTreeState=clean",
        ),
        Tool("etcd", "v3.6.16", {"etcd": "go.etcd.io/etcd/server/v3"}, minutes=0.5),
        Tool(
            "containerd",
            "v2.4.2",
            {name: f"{_CONTAINERD}/cmd/{name}" for name in ("containerd", "containerd-shim-runc-v2", "ctr")},
            minutes=0.7,
            tags="no_btrfs,no_zfs,no_aufs,no_devmapper",
            link=f"-X {_CONTAINERD}/version.Version=v2.4.2",
            version_command=("-v",),
        ),
        Tool("coredns", "v1.15.0", {"coredns": "."}, minutes=1.3, version_command=("-version",)),
        Tool(
            "helm",
            "v4.3.1",
            {"helm": "helm.sh/helm/v4/cmd/helm"},
            minutes=1.7,
            link="-X helm.sh/helm/v4/internal/version.version=v4.3.1",
            version_command=("version", "--template={{.Version}}"),
        ),
        Tool(
            "prometheus",
            "v0.315.0",
            {name: f"github.com/prometheus/prometheus/cmd/{name}" for name in ("prometheus", "promtool")},
            minutes=2.5,
            tags="netgo,remove_all_sd,enable_kubernetes_sd",
            link="-X github.com/prometheus/common/version.Version=0.315.0",
        ),
        Tool("kwok", "v0.8.0", {"kwok": "sigs.k8s.io/kwok/cmd/kwok"}, minutes=0.9),
        Tool(
            "registry",
            "v3.1.2",
            {"registry": "github.com/distribution/distribution/v3/cmd/registry"},
            minutes=0.8,
        ),
    )
}
CLUSTER_TOOLS = ("kubernetes", "etcd", "containerd", "coredns", "prometheus")
"""What `up` needs; `setup` also builds helm, the others are built when somebody asks for them."""


def program(name: str) -> Path:
    """The path of one program (``kubectl``, ``helm``, ...), built now if need be.

    Raises:
        ClusterError: no tool has such a program, or it cannot be built.
    """
    for tool in TOOLS.values():
        if name in tool.packages:
            return ensure(tool)[name]
    raise ClusterError(f"No tool of the local cluster has a program {name!r}.")


def ensure(tool: Tool) -> dict[str, Path]:
    """All programs of ``tool``: from the cache, from this machine if the version is the same, or built now.

    Raises:
        ClusterError: Go is missing or the build failed; the text says which.
    """
    cached = {name: tool.directory / name for name in tool.packages}
    if all(path.is_file() for path in cached.values()):
        return cached
    if tool.version_command and (installed := _installed(tool)):
        return installed
    if not shutil.which("go"):
        raise ClusterError(
            f"{tool.name} {tool.version} must be built and 'go' is not on PATH; install Go >= 1.26 "
            f"or put {', '.join(tool.packages)} {tool.version} on PATH or into $KUBEBUILDER_ASSETS."
        )
    with _building(tool):
        if not all(path.is_file() for path in cached.values()):
            _build(tool)
    return cached


def build_program(name: str, version: str) -> Path:
    """A program of our own (``tools/<name>``, no dependencies), built once for each version.

    Raises:
        ClusterError: Go is missing or the build failed.
    """
    return ensure(Tool(name, version, {name: "."}, minutes=0.1, version_command=()))[name]


def _installed(tool: Tool) -> dict[str, Path] | None:
    places = os.pathsep.join(filter(None, [os.environ.get("KUBEBUILDER_ASSETS"), os.environ.get("PATH")]))
    found = {name: Path(path) for name in tool.packages if (path := shutil.which(name, path=places))}
    if len(found) != len(tool.packages):
        return None
    return found if all(_reports_version(path, tool) for path in found.values()) else None


def _reports_version(path: Path, tool: Tool) -> bool:
    command = [str(path), *tool.version_command]
    if path.name == "kubectl":
        command = [str(path), "version", "--client"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    words = (done.stdout + done.stderr).replace(",", " ").replace("-", " ").split()
    return tool.version in words or tool.version.removeprefix("v") in words


@contextlib.contextmanager
def _building(tool: Tool) -> Iterator[None]:
    """One build at a time on a machine: each takes all cores."""
    tools_cache().mkdir(parents=True, exist_ok=True)
    with (tools_cache() / "build.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process that builds tools, before {tool.name} {tool.version}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _build(tool: Tool) -> None:
    _say(f"building {tool.name} {tool.version} (once; about {tool.minutes:.1f} min on two cores with empty caches)")
    started = time.monotonic()
    staging = tool.directory / "building"
    shutil.rmtree(staging, ignore_errors=True)
    work = staging / "source"
    output = staging / "bin"
    output.mkdir(parents=True)
    environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOBIN": str(output)}
    flags = ["-trimpath", "-tags", tool.tags, "-ldflags", f"-s -w {tool.link}"]
    if tool.sources.is_dir():
        shutil.copytree(tool.sources, work)
        # The module has no packages of its own, so the dependencies' checksums come from go.sum alone.
        environment["GOFLAGS"] = f"{os.environ.get('GOFLAGS', '')} -mod=mod".strip()
        command = ["go", "build", *flags, "-o", f"{output}/", *tool.packages.values()]
    else:
        work.mkdir()
        command = ["go", "install", *flags, *(f"{package}@{tool.version}" for package in tool.packages.values())]
    done = subprocess.run(command, cwd=work, env=environment, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if not line.startswith("go: downloading")]
        raise ClusterError(f"Building {tool.name} {tool.version} failed.\n" + "\n".join(errors[-20:]))
    _take(tool, output)
    shutil.rmtree(staging)
    _say(f"built {tool.name} {tool.version} in {time.monotonic() - started:.0f} s")


def _take(tool: Tool, output: Path) -> None:
    for name, package in tool.packages.items():
        built = output / name
        if not built.exists():  # a module path that ends in /v3 names its program after the element before it
            built = output / package.rsplit("/", 2)[-2]
        built.replace(tool.directory / name)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
