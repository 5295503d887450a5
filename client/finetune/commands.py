"""The commands that need no cluster. Each takes the parsed options and returns the exit code."""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from finetune.messages import complain
from finetune.program import program
from finetune_api.errors import FineTuneError, SpecError
from finetune_api.exits import Cause

if TYPE_CHECKING:
    from finetune.manifests import Job
    from finetune.result import RunResult
    from finetune_api.plan import Facts
    from finetune_api.spec import DataSource, Model, Output

_CREDENTIALS = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS",),
    "az": ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_SAS_TOKEN"),
    "hf": ("HF_TOKEN",),
}
_STATE = Path(".finetune")
_OPTIONS_OF = {
    "local": ("state_dir",),
    "kubernetes": ("no_fetch", "directory", "endpoint", "namespace", "context", "kubeconfig"),
}


def validate(options: Namespace) -> int:
    """Every problem of every manifest."""
    from finetune.manifests import read_job
    from finetune_api.manifest import Place
    from finetune_api.plan import Facts
    from finetune_api.planner import make_plan

    code = 0
    for path in options.manifest:
        try:
            job = read_job(path, Place.CLUSTER if options.cluster else Place.LOCAL)
            make_plan(job.spec, Facts(), job.identity)
        except SpecError as error:
            if options.debug:
                raise
            complain(error, path)
            count = len(error.problems)
            print(f"{path}: {count} problem{'s' if count > 1 else ''}", file=sys.stderr)
            code = error.exit_class.code
        else:
            print(f"{path}: valid")
    return code


def _facts(job: Job) -> Facts:
    from finetune_storage.facts import read_facts

    return read_facts(job.spec)


def plan(options: Namespace) -> int:
    """As a screen, JSON or YAML."""
    from finetune.manifests import read_job
    from finetune.plan_view import plan_screen
    from finetune_api.plan import Facts
    from finetune_api.planner import make_plan

    job = read_job(options.manifest)
    plan = make_plan(job.spec, Facts() if options.no_facts else _facts(job), job.identity)
    if options.output == "text":
        print(plan_screen(f"{job.identity.namespace}/{job.identity.name}", plan))
        return 0
    content = plan.model_dump(mode="json", by_alias=True, exclude_none=True)
    if options.output == "json":
        print(json.dumps(content, indent=2))
        return 0
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.dump(content, sys.stdout)
    return 0


class UsageError(FineTuneError):
    """Options that do not go together."""

    exit_code = 2


def _check_place(options: Namespace) -> None:
    """Refuse options of the other place rather than ignore them."""
    for place, names in _OPTIONS_OF.items():
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name)]
        if given and place != options.on:
            verb = "belongs" if len(given) == 1 else "belong"
            raise UsageError(
                f"{', '.join(given)} {verb} to --on {place}, and this run is --on {options.on}",
                f"drop {'it' if len(given) == 1 else 'them'}, or add --on {place}",
            )


def run(options: Namespace) -> int:
    """On this machine, or with ``--on kubernetes`` in a cluster."""
    _check_place(options)
    if options.on == "kubernetes":
        from finetune.cluster.commands import run as run_in_cluster

        return run_in_cluster(options)
    from finetune.local import LocalRun, check_trainer, finished_before, locked, run_directory
    from finetune.manifests import read_job
    from finetune.progress_view import make_view
    from finetune.result import RunState
    from finetune_api.planner import make_plan

    job, state = read_job(options.manifest), options.state_dir or _STATE
    check_trainer()
    for sentence in credential_notes(job):
        print(sentence, file=sys.stderr)
    with locked(run_directory(state, job)):
        before = finished_before(run_directory(state, job), job)
        if before is not None:
            print("already complete: this manifest was trained before; nothing was done", file=sys.stderr)
            return _tell(before, options)
        run = LocalRun(job, make_plan(job.spec, _facts(job), job.identity), state)
        with make_view() as view:
            result = run.run(view)
    _tell(result, options)
    interrupted = result.state is RunState.INTERRUPTED and run.interruption.count
    return run.interruption.exit_code if interrupted else result.exit_code


def _tell(result: RunResult, options: Namespace) -> int:
    """The last word of a run: JSON on standard output, or sentences."""
    if options.output == "json":
        print(result.model_dump_json(by_alias=True))
    stream = sys.stderr if options.output == "json" else sys.stdout
    for line in result.last_lines:
        print(f"  | {line}", file=sys.stderr)
    hint = f"; {result.hint}" if result.hint else ""
    print(f"{result.state.value}: {result.message.rstrip('.') if hint else result.message}{hint}", file=stream)
    if result.artifacts is not None:
        print(f"artifact: {result.artifacts.uri} (manifest sha256 {result.artifacts.manifest_sha256})", file=stream)
    for name, value in sorted(result.metrics.items()):
        print(f"  {name} {value:.6g}", file=stream)
    if result.report_path is not None:
        print(f"report: {result.report_path}", file=stream)
    if result.exit_code:
        print(f"logs: {result.run_directory}", file=stream)
    if result.exit_code and result.exit_class.cause is not Cause.USER:
        print(f"to go on from the newest checkpoint: {_again(options)}", file=stream)
    return result.exit_code


def _again(options: Namespace) -> str:
    state = f" --state-dir {options.state_dir}" if options.state_dir else ""
    return f"{program()} run {options.manifest}{state}"


def credential_notes(job: Job) -> list[str]:
    """Where Secrets are named: locally the environment is used instead, so say which variables and whether set."""
    spec = job.spec
    places: list[tuple[str, Model | Output | DataSource]] = [("spec.model", spec.model), ("spec.output", spec.output)]
    places += [(f"spec.dataset.train[{index}]", source) for index, source in enumerate(spec.dataset.train)]
    notes = []
    for place, location in places:
        if location.credentials is None:
            continue
        names = _CREDENTIALS.get(location.uri.partition("://")[0], ())
        if not names:
            continue
        found = ", ".join(f"{name} ({'set' if os.environ.get(name) else 'not set'})" for name in names)
        secret = location.credentials.secret_name
        notes.append(f"{place}.credentials: the Secret '{secret}' is not read locally; from the environment: {found}")
    return notes


def report(options: Namespace) -> int:
    """Of a finished local run or an artifact."""
    from finetune.reports import read_report, report_screen

    report, html = read_report(options.place)
    if options.output == "json":
        print(report.model_dump_json(by_alias=True, indent=2))
    else:
        print(report_screen(report, html))
    return 0


def schema(_options: Namespace) -> int:
    """For editors."""
    from finetune_api.generate import schema_json

    print(schema_json(), end="")
    return 0


def crd(_options: Namespace) -> int:
    """For ``kubectl apply``."""
    from finetune_api.generate import crd_yaml

    print(crd_yaml(), end="")
    return 0
