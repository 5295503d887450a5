"""What the container allows and what the kernel did to it (control groups, version 2 and 1)."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def out_of_memory_kills(root: Path = _ROOT, membership: Path = _MEMBERSHIP) -> int | None:
    """The counter since the container started, or ``None`` where the system does not tell."""
    for path in _candidates(root, membership):
        try:
            text = path.read_text(encoding="utf-8")
        except OSError:
            continue
        for line in text.splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    return None


def _candidates(root: Path, membership: Path) -> list[Path]:
    """``memory.events`` (version 2) and ``memory.oom_control`` (version 1) of our own group, then of the root."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    own: list[Path] = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            own.append(root / group.lstrip("/") / "memory.events")
        elif "memory" in controllers.split(","):
            own.append(root / "memory" / group.lstrip("/") / "memory.oom_control")
    return [*own, root / "memory.events", root / "memory" / "memory.oom_control"]


def processors(root: Path = _ROOT) -> float | None:
    """The container's CPU quota in processors, or ``None`` without one."""
    try:
        quota, period = (root / "cpu.max").read_text(encoding="utf-8").split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)
