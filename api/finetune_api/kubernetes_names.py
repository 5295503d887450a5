"""What Kubernetes takes for a name: jobs of users, claims and the administrator's settings are asked the same. Pure.

Source: apimachinery/pkg/util/validation (DNS-1123 subdomain, qualified name, label value).
"""

from __future__ import annotations

import re

_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = re.compile(rf"{_LABEL}(\.{_LABEL})*")
_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


def is_subdomain(name: str) -> bool:
    """Whether an object of most kinds can be called so: at most 253 characters."""
    return len(name) <= 253 and _SUBDOMAIN.fullmatch(name) is not None


def is_label_key(key: str) -> bool:
    """NAME or PREFIX/NAME, such as ``example.com/rack``."""
    prefix, slash, name = key.rpartition("/")
    return _NAME.fullmatch(name) is not None and (not slash or is_subdomain(prefix))


def is_label_value(value: str) -> bool:
    """At most 63 letters, digits, '-', '_' and '.'; may be empty."""
    return not value or _NAME.fullmatch(value) is not None
