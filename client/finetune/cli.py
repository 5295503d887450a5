"""``finetune COMMAND``: reads the command line, runs one command, turns its end into an exit code."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from finetune.messages import complain
from finetune.parser import build_parser
from finetune_api.errors import FineTuneError
from finetune_api.exits import ExitClass

_CLUSTER_LIBRARY = "kubernetes"
_INSTALL = 'pip install "finetune-operator[client]"'


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code (docs/cli.md)."""
    options = build_parser().parse_args(arguments)
    try:
        return _command(options)(options)
    except FineTuneError as error:
        if options.debug:
            raise
        complain(error)
        return exit_code(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except Exception as error:
        if options.debug:
            raise
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            where = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else error.filename
            print(f"{where}: {error.strerror}; see whether it exists and whether you may use it", file=sys.stderr)
            return ExitClass.INVALID_SPEC.code
        if isinstance(error, ModuleNotFoundError) and error.name == _CLUSTER_LIBRARY:
            print(f"finetune {options.name} needs the Python package kubernetes; install: {_INSTALL}", file=sys.stderr)
            return ExitClass.INVALID_SPEC.code
        print(
            f"finetune {options.name} failed by a defect of its own: {type(error).__name__}: {error};"
            " run it again with --debug and report the traceback",
            file=sys.stderr,
        )
        return ExitClass.INTERNAL_ERROR.code


def _command(options: argparse.Namespace) -> Callable[[argparse.Namespace], int]:
    """The function that the parser names; its module is loaded only now."""
    module, _, function = options.command.partition(":")
    command: Callable[[argparse.Namespace], int] = getattr(importlib.import_module(module), function)
    return command


def exit_code(error: FineTuneError) -> int:
    """An error of the cluster has a code of its own, every other the code of its exit class."""
    own = getattr(error, "exit_code", None)
    return own if isinstance(own, int) else error.exit_class.code


if __name__ == "__main__":
    sys.exit(main())
