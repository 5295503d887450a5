"""One cgroup per node, so that no kubelet sees (and deletes) the pods of another. cgroup v1, hybrid, and v2.

v2 is written after the kernel's documentation and has not been run: the machines at hand mount v1 hierarchies.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from deploy.local.cluster.layout import CGROUP, ClusterError
from deploy.local.cluster.processes import end, wait_until

_ROOT = Path("/sys/fs/cgroup")


def unified() -> bool:
    """Whether this machine has cgroup v2 alone."""
    return (_ROOT / "cgroup.controllers").is_file()


def hierarchies() -> list[Path]:
    """Mount points: one for v2; for v1 one per controller set (names that are links are aliases)."""
    if unified():
        return [_ROOT]
    return [path for path in sorted(_ROOT.iterdir()) if not path.is_symlink() and (path / "cgroup.procs").is_file()]


def make(node: str) -> None:
    """The node's group in every hierarchy.

    Raises:
        ClusterError: this machine has no cgroups.
    """
    if not hierarchies():
        raise ClusterError(f"The local cluster needs cgroups and nothing is mounted under {_ROOT}.")
    for hierarchy in hierarchies():
        group = hierarchy / CGROUP / node
        group.mkdir(parents=True, exist_ok=True)
        for child in (group.parent, group):
            _inherit_cpuset(child) if not unified() else _delegate(child.parent)


def groups(node: str) -> list[Path]:
    """Directories of the node's groups."""
    return [hierarchy / CGROUP / node for hierarchy in hierarchies()]


def members(node: str | None = None) -> list[int]:
    """Pids in the node's groups (or all nodes'), pods included."""
    pids: set[int] = set()
    for top in _tops(node):
        for path in top.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):  # removed meanwhile
                pids.update(int(line) for line in path.read_text().split())
    return sorted(pids)


def remove(node: str | None = None) -> None:
    """Kill what is left in the groups and remove them; left-overs of pods delay a booting node by seconds each.

    Raises:
        ClusterError: a group stays busy.
    """
    end(members(node))
    wait_until(lambda: _removed(node), 60, f"cgroups {', '.join(map(str, _tops(node)))} stay busy")


def remains() -> list[str]:
    return [f"cgroup {top}" for top in _tops(None)]


def _tops(node: str | None) -> list[Path]:
    name = f"{CGROUP}/{node}" if node else CGROUP
    return [top for hierarchy in hierarchies() if (top := hierarchy / name).is_dir()]


def _removed(node: str | None) -> bool:
    for top in _tops(node):
        for directory, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(OSError):  # busy for a moment after the last process
                os.rmdir(directory)
    return not _tops(node)


def _inherit_cpuset(group: Path) -> None:
    for name in ("cpuset.cpus", "cpuset.mems"):  # empty in a new v1 group, and no process may enter then
        if (group / name).is_file():
            (group / name).write_text((group.parent / name).read_text())


def _delegate(parent: Path) -> None:
    controllers = (parent / "cgroup.controllers").read_text().split()
    (parent / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in controllers))
