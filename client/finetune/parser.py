"""Every command and option. Commands are named as ``module:function`` and imported when they run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from finetune.program import program

_LOCAL = "finetune.commands"
_CLUSTER = "finetune.cluster.commands"
_MANIFEST = "manifest file, or - for standard input"


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog=program(), description="One FineTuneJob manifest becomes one adapter, on this machine or in a cluster."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = _Commands(parser)
    _add_manifest_commands(commands)
    _add_run(commands)
    _add_reading_commands(commands)
    _add_changing_commands(commands)
    _add_fetch(commands)
    commands.add("schema", "Print the JSON Schema of a manifest, for editors.", _LOCAL)
    commands.add("crd", "Print the CustomResourceDefinition.", _LOCAL)
    return parser


class _Commands:
    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
        self._common = argparse.ArgumentParser(add_help=False)
        self._common.add_argument("--debug", action="store_true", help="show the traceback of an error")

    def add(self, name: str, text: str, module: str, function: str = "") -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = self._commands.add_parser(
            name, help=text, description=text, parents=[self._common]
        )
        command.set_defaults(command=f"{module}:{function or name}")
        return command

    def add_for_cluster(self, name: str, text: str, function: str = "") -> argparse.ArgumentParser:
        command = self.add(name, text, _CLUSTER, function)
        _add_place(command)
        return command


def _add_place(command: argparse.ArgumentParser) -> None:
    place = command.add_argument_group("which cluster (as kubectl)")
    place.add_argument("-n", "--namespace", help="default: the one of the context")
    place.add_argument("--context", help="of the kubeconfig; default: its current one")
    place.add_argument(
        "--kubeconfig", help="default: the files in KUBECONFIG, else ~/.kube/config, else the pod we are in"
    )


def _add_job(command: argparse.ArgumentParser) -> None:
    command.add_argument("job", metavar="NAME", help="name of the FineTuneJob")


def _add_output(command: argparse.ArgumentParser, *forms: str) -> None:
    command.add_argument("-o", "--output", choices=("text", *forms), default="text")


def _add_manifest_commands(commands: _Commands) -> None:
    validate = commands.add("validate", "Judge a manifest: every problem at once.", _LOCAL)
    validate.add_argument("manifest", nargs="+", help=_MANIFEST)
    validate.add_argument(
        "--cluster", action="store_true", help="judge for a cluster (file:// is refused) instead of this machine"
    )
    plan = commands.add("plan", "Show what would run, with every default and its reason.", _LOCAL)
    plan.add_argument("manifest", help=_MANIFEST)
    plan.add_argument("--no-facts", action="store_true", help="do not look at the model and the data (works offline)")
    _add_output(plan, "json", "yaml")
    report = commands.add("report", "Summarise the report of a finished job.", _LOCAL)
    report.add_argument("place", help="run directory, or URI of the artifact")
    _add_output(report, "json")


def _add_run(commands: _Commands) -> None:
    text = "Run the job and wait for its artifact, on this machine or in a cluster; run again to resume."
    run = commands.add("run", text, _LOCAL)
    run.add_argument("manifest", help=_MANIFEST)
    run.add_argument("--on", choices=("local", "kubernetes"), default="local", help="where (default: local)")
    run.add_argument("--state-dir", type=Path, help="local: where its state is kept (default: .finetune)")
    run.add_argument(
        "-o", "--output", choices=("text", "json"), default="text", help="json: one object on standard output"
    )
    run.add_argument("--no-fetch", action="store_true", help="kubernetes: leave the artifact in object storage")
    run.add_argument("--directory", type=Path, help="kubernetes: where the artifact is fetched to (default: ./NAME)")
    run.add_argument("--endpoint", help="kubernetes: address of the object storage as seen from this machine")
    _add_place(run)


def _add_reading_commands(commands: _Commands) -> None:
    listing = commands.add_for_cluster("list", "List the jobs of a namespace.", "list_jobs")
    listing.add_argument("-A", "--all-namespaces", action="store_true")
    listing.add_argument("-l", "--selector", default="", help="only jobs with these labels, for instance team=nlp")
    _add_output(listing, "json", "yaml")
    status = commands.add_for_cluster(
        "status", "One job on one screen: progress, plan, attempts, conditions, what it waits for."
    )
    _add_job(status)
    _add_output(status, "json", "yaml")
    logs = commands.add_for_cluster("logs", "Follow the output of a rank, across restarts and replaced pods.")
    _add_job(logs)
    which = logs.add_mutually_exclusive_group()
    which.add_argument("--rank", type=int, default=0, help="of the whole job (default: 0, with its launcher)")
    which.add_argument("--first-error", action="store_true", help="which rank failed first, why, and its last lines")
    logs.add_argument("--no-follow", action="store_true", help="print what there is and stop")
    logs.add_argument("--tail", type=_count, metavar="N", help="begin with the last N lines of a pod's output")
    wait = commands.add_for_cluster("wait", "Wait for a condition; the exit code says how the job ended.")
    _add_job(wait)
    wait.add_argument(
        "--for",
        dest="target",
        default="Complete",
        metavar="CONDITION",
        help="Complete (default), Failed, Running, PodsReady, Suspended, Accepted, ArtifactsPublished or Deleted",
    )
    wait.add_argument("--timeout", type=_duration, metavar="TIME", help="for instance 90s, 10m, 2h; default: no limit")


def _add_changing_commands(commands: _Commands) -> None:
    submit = commands.add_for_cluster("submit", "Judge manifests and create their jobs in a cluster.")
    submit.add_argument("manifest", nargs="+", metavar="MANIFEST", help=_MANIFEST)
    _add_output(submit, "json", "yaml")
    _add_job(commands.add_for_cluster("suspend", "Checkpoint a job and free its pods."))
    _add_job(commands.add_for_cluster("resume", "Let a suspended job go on from its checkpoint."))
    cancel = commands.add_for_cluster("cancel", "Delete a job; artifacts and checkpoints stay.")
    _add_job(cancel)
    cancel.add_argument("-y", "--yes", action="store_true", help="do not ask")


def _add_fetch(commands: _Commands) -> None:
    fetch = commands.add_for_cluster("fetch", "Download the artifact of a job and verify every digest.")
    _add_job(fetch)
    fetch.add_argument("-o", "--directory", type=Path, metavar="DIR", help="absent or empty folder (default: ./NAME)")
    fetch.add_argument("--endpoint", help="address of the object storage as seen from this machine")


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"'{text}' is no number of lines; write for instance 100")
    return int(text)


def _duration(text: str) -> float:
    from finetune.durations import parse_duration

    try:
        return parse_duration(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no duration; write for instance 90s, 10m or 2h") from None


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"finetune {version('finetune-operator')}")
        parser.exit()
