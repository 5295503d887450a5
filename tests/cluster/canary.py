"""Where secret words turned up: plain, base64 at any offset, URL-encoded, hexadecimal; and what Helm has packed."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping
from urllib.parse import quote, quote_plus


def spellings(word: str) -> dict[str, bytes]:
    """Ways to write ``word`` that can be read back."""
    raw = word.encode()
    found = {
        "plain": raw,
        "JSON": json.dumps(word)[1:-1].encode(),
        "URL-encoded": quote(word, safe="").encode(),
        "form-encoded": quote_plus(word).encode(),
        "hexadecimal": raw.hex().encode(),
    }
    for offset in range(3):  # inside a longer text; what touches its neighbours is cut off
        padded = b"\0" * offset + raw
        padded = padded[: len(padded) // 3 * 3]
        found[f"base64 at offset {offset}"] = base64.b64encode(padded)[4 if offset else 0 :]
        found[f"URL-safe base64 at offset {offset}"] = base64.urlsafe_b64encode(padded)[4 if offset else 0 :]
    return found


def leaks(words: Mapping[str, str], places: Mapping[str, bytes]) -> set[tuple[str, str]]:
    """(name of the word, place) for every place that holds one of ``words`` in any spelling."""
    needles = {name: set(spellings(word).values()) for name, word in words.items()}
    return {
        (name, place)
        for place, content in places.items()
        for name, forms in needles.items()
        if any(form in content for form in forms)
    }


def unpacked_release(data: str) -> bytes:
    """Chart, values and manifests in a Secret of Helm (``.data.release``)."""
    return gzip.decompress(base64.b64decode(base64.b64decode(data)))
