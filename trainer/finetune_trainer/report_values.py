"""How the report words values: numbers with units, camelCase keys as words, ranks side by side. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

_BINARY_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


def number(value: float) -> str:
    """Four significant digits, scientific where plain digits would mislead."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        digits = f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        return digits.replace("-", "−")
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")


def figure(value: float) -> str:
    """A loss or another figure that is compared down a column: four significant digits, zeros kept."""
    text = f"{value:#.4g}"
    return number(value) if "e" in text else text.rstrip(".").replace("-", "−")


def count(value: int) -> str:
    """Digits in groups of three: 1,234,567."""
    return f"{value:,}"


def size(value: float) -> str:
    """Bytes in binary units."""
    for unit in _BINARY_UNITS[:-1]:
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 100 else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} {_BINARY_UNITS[-1]}"


def duration(seconds: float) -> str:
    """``48 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def instant(text: str) -> str:
    """An ISO 8601 instant to the second with its zone; anything else as it came."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    zone = "UTC" if moment.tzinfo is not None and not moment.utcoffset() else moment.strftime("%z")
    return f"{moment:%Y-%m-%d %H:%M:%S} {zone}".rstrip()


def words(key: str) -> str:
    """``maskedTokenShare`` and ``masked_token_share`` as "masked token share"; names of one word stay as they are."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", key).replace("_", " ")
    return " ".join(word if word.isupper() else word.lower() for word in spaced.split(" ")) if spaced != key else key


def show(value: Any, key: str = "") -> str:
    """Any JSON value in words; ``key`` tells the unit (``…Bytes``, ``…Seconds``, ``…Share``)."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return _measure(value, key.lower())
    if isinstance(value, Mapping):
        return ", ".join(f"{words(str(name))} {show(item, str(name))}" for name, item in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(show(item) for item in value) or "none"
    return str(value)


def flatten(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(words, value) rows; one level of nesting becomes ``outer: inner``."""
    rows = []
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            rows += [(f"{words(key)}: {words(str(inner))}", show(item, str(inner))) for inner, item in value.items()]
        else:
            rows.append((words(key), show(value, key)))
    return rows


def compare_ranks(checks: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Per checked property the distinct values with the ranks that reported them, in the order of first appearance.

    A property on which all ranks agree has one value labelled ``all ranks``.
    """
    names = list(dict.fromkeys(key for check in checks for key in check if key != "rank"))
    rows = []
    for name in names:
        ranks_by_value: dict[str, list[int]] = {}
        for index, check in enumerate(checks):
            if name in check:
                ranks_by_value.setdefault(show(check[name], name), []).append(int(check.get("rank", index)))
        agreed = len(ranks_by_value) == 1 and len(next(iter(ranks_by_value.values()))) == len(checks)
        rows.append(
            (
                words(name),
                [("all ranks" if agreed else _ranks(ranks), value) for value, ranks in ranks_by_value.items()],
            )
        )
    return rows


def listing(files: Any) -> list[tuple[str, str, str]]:
    """(path, size, sha256) of a manifest's file entries; empty when ``files`` is no such list (a count, absent)."""
    if not isinstance(files, Sequence) or isinstance(files, str):
        return []
    entries = [entry for entry in files if isinstance(entry, Mapping) and "path" in entry]
    return [(str(e["path"]), size(int(e.get("bytes", 0))), str(e.get("sha256", ""))) for e in entries]


def outline(value: Any, indent: int = 0) -> list[str]:
    """A JSON value as indented lines in the manner of YAML, for reading (not for parsing)."""
    pad = "  " * indent
    if isinstance(value, Mapping):
        lines = []
        for key, item in value.items():
            if (isinstance(item, Mapping) and item) or (
                isinstance(item, list | tuple) and any(_nested(i) for i in item)
            ):
                lines += [f"{pad}{key}:", *outline(item, indent + 1)]
            else:
                lines.append(f"{pad}{key}: {_scalar(item)}")
        return lines
    if isinstance(value, list | tuple):
        return [line for item in value for line in _item(outline(item, indent + 1), pad)]
    return [f"{pad}{_scalar(value)}"]


def _measure(value: float, key: str) -> str:
    if key.endswith("bytes"):
        return size(value)
    if key.endswith("seconds"):
        return duration(value)
    if key.endswith(("share", "fraction", "accuracy", "utilization")) and 0 <= value <= 1:
        return f"{value:.1%}"
    return count(value) if isinstance(value, int) else number(value)


def _ranks(ranks: Iterable[int]) -> str:
    """``rank 3``, ``ranks 0–3, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in runs)
    return f"rank {text}" if len(runs) == 1 and runs[0][0] == runs[0][1] else f"ranks {text}"


def _nested(value: Any) -> bool:
    return isinstance(value, Mapping | list | tuple) and bool(value)


def _scalar(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "null"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_scalar(item) for item in value) + "]"
    return "{}" if isinstance(value, Mapping) else str(value)


def _item(lines: list[str], pad: str) -> list[str]:
    """Lines of one list element with its dash in front."""
    return [f"{pad}- {lines[0].lstrip()}", *lines[1:]] if lines else []
