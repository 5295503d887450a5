"""``python -m finetune_trainer --config trainer.json [--node-rank N]``: the launcher of one node."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path

from finetune_api.errors import FineTuneError
from finetune_trainer import termination
from finetune_trainer.launcher import Launcher, become_reaper, read_config
from finetune_trainer.stopping import StopRequest

_NODE_RANK_VARIABLES = ("JOB_COMPLETION_INDEX", "NODE_RANK")  # Kubernetes Indexed Job; everybody else
_TERMINATION_VARIABLE = "FINETUNE_TERMINATION_PATH"  # used only while no configuration could be read


def main(arguments: list[str] | None = None) -> int:
    """Run the launcher; the exit code (docs/cli.md)."""
    parser = argparse.ArgumentParser(prog="python -m finetune_trainer", description="Launcher of one node of a job.")
    parser.add_argument("--config", type=Path, required=True, help="TrainerConfig as JSON")
    parser.add_argument(
        "--node-rank", type=int, default=None, help="default: $JOB_COMPLETION_INDEX, else $NODE_RANK, else 0"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s launcher %(levelname)s %(message)s", force=True
    )
    stop = StopRequest()
    stop.install()
    become_reaper()
    try:
        node_rank = options.node_rank if options.node_rank is not None else _node_rank()
        config = read_config(options.config)
    except FineTuneError as error:
        return _refuse(error)
    return Launcher(config, node_rank, stop).run()


class NodeRankError(FineTuneError, ValueError):
    """The node rank is not a number."""


def _node_rank() -> int:
    for name in _NODE_RANK_VARIABLES:
        text = os.environ.get(name, "")
        if not text:
            continue
        if not text.isdecimal():
            raise NodeRankError(f"the environment variable {name} is not a node rank: {text!r}", "set it to 0, 1, ...")
        return int(text)
    return 0


def _refuse(error: FineTuneError) -> int:
    ended = termination.refused(error)
    print(f"{ended.exit_class.value}: {ended.message}", file=sys.stderr)
    if path := os.environ.get(_TERMINATION_VARIABLE):
        termination.write(Path(path), ended)
    return ended.exit_code


if __name__ == "__main__":
    sys.exit(main())
