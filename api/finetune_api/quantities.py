"""Kubernetes quantities: text to bytes and back."""

from __future__ import annotations

import re
from fractions import Fraction

_UNITS: dict[str, Fraction] = {
    "": Fraction(1),
    "m": Fraction(1, 1000),
    "k": Fraction(10**3),
    "M": Fraction(10**6),
    "G": Fraction(10**9),
    "T": Fraction(10**12),
    "P": Fraction(10**15),
    "Ki": Fraction(2**10),
    "Mi": Fraction(2**20),
    "Gi": Fraction(2**30),
    "Ti": Fraction(2**40),
    "Pi": Fraction(2**50),
}
_QUANTITY = re.compile(r"^([0-9]+(?:\.[0-9]+)?)(m|k|M|G|T|P|Ki|Mi|Gi|Ti|Pi)?$")


def parse_quantity(text: str) -> int:
    """``"16Gi"`` -> 17179869184, rounded down. Raises ValueError for anything that is not a quantity."""
    return int(quantity_value(text))


def quantity_value(text: str) -> Fraction:
    """The exact number behind a quantity: ``"500m"`` is one half."""
    match = _QUANTITY.match(text)
    if match is None:
        raise ValueError(f"{text!r} is not a quantity such as 16Gi, 500M or 2")
    number, unit = match.groups()
    return Fraction(number) * _UNITS[unit or ""]


def format_bytes(count: int) -> str:
    """Bytes for people, in binary units: ``7.5 GiB``."""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
