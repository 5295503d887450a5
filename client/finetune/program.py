"""What the user called us: ``finetune``, or ``kubectl finetune`` where kubectl found us as its plugin."""

from __future__ import annotations

import sys
from pathlib import Path


def program() -> str:
    """The words that start a command line, for help and for sentences that name a next command."""
    called = Path(sys.argv[0]).name if sys.argv else ""
    return "kubectl finetune" if called.startswith("kubectl-finetune") else "finetune"
