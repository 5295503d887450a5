"""``finetune validate|plan|run|report|schema|crd``. Heavy imports stay inside the commands that need them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_api.errors import FineTuneError, SpecError
from finetune_api.exits import Cause, ExitClass

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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit code (docs/cli.md)."""
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    try:
        return command(options)
    except FineTuneError as error:
        if options.debug:
            raise
        _complain(error)
        return error.exit_class.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    except Exception as error:
        if options.debug:
            raise
        print(
            f"finetune {options.name} failed by a defect of its own: {type(error).__name__}: {error};"
            " run it again with --debug and report the traceback",
            file=sys.stderr,
        )
        return ExitClass.INTERNAL_ERROR.code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="finetune", description="One FineTuneJob manifest becomes one adapter.")
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")

    def add(name: str, text: str, function: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, parents=[common])
        command.set_defaults(command=function)
        return command

    validate = add("validate", "Judge a manifest: every problem at once.", _validate)
    validate.add_argument("manifest", nargs="+", help="manifest file, or - for standard input")
    validate.add_argument(
        "--cluster", action="store_true", help="judge for a cluster (file:// is refused) instead of this machine"
    )
    plan = add("plan", "Show what would run, with every default and its reason.", _plan)
    plan.add_argument("manifest", help="manifest file, or - for standard input")
    plan.add_argument("--no-facts", action="store_true", help="do not look at the model and the data (works offline)")
    plan.add_argument("--output", choices=("text", "json", "yaml"), default="text")
    run = add("run", "Run the job on this machine; run again to resume.", _run)
    run.add_argument("manifest", help="manifest file, or - for standard input")
    run.add_argument("--state-dir", type=Path, default=Path(".finetune"), help="local state (default: .finetune)")
    run.add_argument("--output", choices=("text", "json"), default="text", help="json: one object on standard output")
    report = add("report", "Summarise the report of a finished job.", _report)
    report.add_argument("place", help="run directory, or URI of the artifact")
    report.add_argument("--output", choices=("text", "json"), default="text")
    add("schema", "Print the JSON Schema of a manifest, for editors.", _schema)
    add("crd", "Print the CustomResourceDefinition.", _crd)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version

        print(f"finetune {version('finetune-operator')}")
        parser.exit()


def _complain(error: FineTuneError, source: str = "") -> None:
    """One sentence per problem on standard error."""
    if isinstance(error, SpecError):
        for problem in error.problems:
            place = f"{source}: " if source and problem.path != source else ""
            print(f"{place}{problem}", file=sys.stderr)
        return
    hint = f"; {error.hint}" if error.hint else ""
    print(f"{str(error).rstrip('.') if hint else error}{hint}", file=sys.stderr)


def _validate(options: argparse.Namespace) -> int:
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
            _complain(error, path)
            count = len(error.problems)
            print(f"{path}: {count} problem{'s' if count > 1 else ''}", file=sys.stderr)
            code = error.exit_class.code
        else:
            print(f"{path}: valid")
    return code


def _facts(job: Job) -> Facts:
    from finetune_storage.facts import read_facts

    return read_facts(job.spec)


def _plan(options: argparse.Namespace) -> int:
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


def _run(options: argparse.Namespace) -> int:
    from finetune.local import LocalRun, check_trainer, finished_before, locked, run_directory
    from finetune.manifests import read_job
    from finetune.progress_view import make_view
    from finetune.result import RunState
    from finetune_api.planner import make_plan

    job = read_job(options.manifest)
    check_trainer()
    for sentence in credential_notes(job):
        print(sentence, file=sys.stderr)
    with locked(run_directory(options.state_dir, job)):
        before = finished_before(run_directory(options.state_dir, job), job)
        if before is not None:
            print("already complete: this manifest was trained before; nothing was done", file=sys.stderr)
            return _tell(before, options)
        run = LocalRun(job, make_plan(job.spec, _facts(job), job.identity), options.state_dir)
        with make_view() as view:
            result = run.run(view)
    _tell(result, options)
    interrupted = result.state is RunState.INTERRUPTED and run.interruption.count
    return run.interruption.exit_code if interrupted else result.exit_code


def _tell(result: RunResult, options: argparse.Namespace) -> int:
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


def _again(options: argparse.Namespace) -> str:
    state = "" if options.state_dir == Path(".finetune") else f" --state-dir {options.state_dir}"
    return f"finetune run {options.manifest}{state}"


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


def _report(options: argparse.Namespace) -> int:
    from finetune.reports import read_report, report_screen

    report, html = read_report(options.place)
    if options.output == "json":
        print(report.model_dump_json(by_alias=True, indent=2))
    else:
        print(report_screen(report, html))
    return 0


def _schema(_options: argparse.Namespace) -> int:
    from finetune_api.generate import schema_json

    print(schema_json(), end="")
    return 0


def _crd(_options: argparse.Namespace) -> int:
    from finetune_api.generate import crd_yaml

    print(crd_yaml(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
