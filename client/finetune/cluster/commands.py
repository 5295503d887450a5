"""The commands that talk to a cluster. Each takes the parsed options and returns the exit code."""

from __future__ import annotations

import json
import shlex
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finetune.cluster.api import Cluster, event_time, open_cluster
from finetune.cluster.errors import ClusterError
from finetune.cluster.job import COMPLETE, Job, read_job_object
from finetune.messages import complain
from finetune.program import program
from finetune_api.errors import SpecError
from finetune_api.exits import ExitClass


def submit(options: Namespace) -> int:
    """Every manifest is judged before the first one is created."""
    from finetune.cluster.submit import read_submission, settle_namespace
    from finetune.cluster.submit import submit as create

    submissions, code = [], 0
    for path in options.manifest:
        try:
            submissions.append(read_submission(path))
        except SpecError as error:
            if options.debug:
                raise
            complain(error, path)
            code = error.exit_class.code
    if code:
        print("nothing was submitted", file=sys.stderr)
        return code
    cluster = _cluster(options)
    places = [settle_namespace(submission, cluster, options.namespace) for submission in submissions]
    made: list[Mapping[str, Any]] = []
    try:
        for submission, namespace in zip(submissions, places, strict=True):
            cluster.namespace = namespace
            submitted = create(cluster, submission)
            made.append(submitted.job.raw)
            if options.output == "text":
                _say_submitted(submitted, options)
    finally:  # also what was made before the cluster refused one
        if options.output != "text" and made:
            _dump(made[0] if len(submissions) == 1 else _list_of(made), options.output)
    return 0


def _say_submitted(submitted: Any, options: Namespace) -> None:
    job = submitted.job
    if submitted.created:
        print(f"FineTuneJob '{job.name}' created in the namespace '{job.namespace}'")
        print(f"see how it goes: {again(options, 'status', job)}")
        return
    print(f"FineTuneJob '{job.name}' exists in the namespace '{job.namespace}' with the same result ({job.state})")
    if submitted.differing:
        changed = ", ".join(submitted.differing)
        print(f"{changed} differ from the manifest and stay as they are; to change them: kubectl apply -f MANIFEST")


def list_jobs(options: Namespace) -> int:
    """A table, or the objects."""
    from finetune.cluster.list_view import list_screen

    cluster = _cluster(options)
    found = cluster.jobs(options.all_namespaces, options.selector)
    if options.output != "text":
        _dump(_list_of(found), options.output)
        return 0
    if not found:
        place = "any namespace" if options.all_namespaces else f"the namespace '{cluster.namespace}'"
        print(f"there is no FineTuneJob in {place}", file=sys.stderr)
        return 0
    print(list_screen([read_job_object(item) for item in found], _now(), options.all_namespaces))
    return 0


def status(options: Namespace) -> int:
    """One screen, or the object."""
    from finetune.cluster.status_view import EventLine, status_screen

    cluster = _cluster(options)
    job = cluster.job(options.job)
    if options.output != "text":
        _dump(job.raw, options.output)
        return 0
    try:
        events = [
            EventLine(event_time(event), event.type or "", event.reason or "", event.message or "", event.count or 1)
            for event in cluster.events(job)
        ]
    except ClusterError as error:  # may read jobs but not events
        complain(error)
        events = []
    print(status_screen(job, events, _now()))
    return 0


def logs(options: Namespace) -> int:
    """The output of a rank, or the cause of the newest failure."""
    from finetune.cluster.first_error import find_first_error, first_error_screen, nothing_ran_screen
    from finetune.cluster.logs import Reader, print_logs

    cluster = _cluster(options)
    if options.first_error:
        job = cluster.job(options.job)
        error = find_first_error(cluster, job)
        print(first_error_screen(job.name, error) if error else nothing_ran_screen(job))
        return 0
    reader = Reader(
        write=lambda line: print(line, flush=True),
        say=lambda sentence: print(sentence, file=sys.stderr, flush=True),
        follow=not options.no_follow,
        tail=options.tail,
    )
    print_logs(cluster, options.job, options.rank, reader)
    return 0


def wait(options: Namespace) -> int:
    """0 once it holds; the job's own exit code if it never will; 124 after the timeout."""
    from finetune.cluster.wait import parse_target, wait_for

    target = parse_target(options.target)
    job = wait_for(_cluster(options), options.job, target, options.timeout)
    said = f": {job.message}" if job is not None and job.message else ""
    print(f"FineTuneJob '{options.job}' is {target}{said}")
    return 0


def suspend(options: Namespace) -> int:
    """Ask the operator to checkpoint and free the pods."""
    return _set_suspend(options, suspend=True)


def resume(options: Namespace) -> int:
    """Take the suspension back."""
    return _set_suspend(options, suspend=False)


def _set_suspend(options: Namespace, suspend: bool) -> int:
    cluster = _cluster(options)
    job = cluster.job(options.job)
    if job.ended is not None:
        raise ClusterError(
            f"the FineTuneJob '{job.name}' is {job.ended} and can no longer be {'suspended' if suspend else 'resumed'}"
        )
    if job.suspended == suspend:
        print(f"FineTuneJob '{job.name}' {'is already' if suspend else 'is not'} suspended ({job.state})")
        return 0
    job = cluster.set_suspend(job.name, suspend)
    if suspend:
        print(f"FineTuneJob '{job.name}' writes a checkpoint, frees its pods and waits")
        print(f"to go on: {again(options, 'resume', job)}")
    else:
        print(f"FineTuneJob '{job.name}' goes on from its newest checkpoint")
        print(f"see how it goes: {again(options, 'status', job)}")
    return 0


def cancel(options: Namespace) -> int:
    """Delete the job after a yes; what it has written stays."""
    cluster = _cluster(options)
    job = cluster.job(options.job)
    if not options.yes and not _confirmed(job):
        print("nothing was deleted", file=sys.stderr)
        return 1
    cluster.delete(job)
    running = "" if job.ended else "; its pods write a checkpoint and stop"
    print(f"FineTuneJob '{job.name}' deleted from the namespace '{job.namespace}'{running}")
    output = (job.spec.get("output") or {}).get("uri", "")
    place = job.status.artifacts.uri if job.status.artifacts else f"{output.rstrip('/')}/{job.namespace}/{job.name}/"
    print(f"artifacts and checkpoints stay where they are: {place}")
    return 0


def _confirmed(job: Job) -> bool:
    if not sys.stdin.isatty():
        raise ClusterError(f"nobody can be asked here whether to delete the FineTuneJob '{job.name}'", "add --yes")
    question = f"delete the {job.state} FineTuneJob '{job.name}' in the namespace '{job.namespace}'? [y/N] "
    try:
        return input(question).strip().lower() in {"y", "yes"}
    except EOFError:  # Ctrl-D
        print()
        return False


def fetch(options: Namespace) -> int:
    """The artifact in a folder."""
    from finetune.cluster.fetch import fetch as download
    from finetune_api.quantities import format_bytes

    job = _cluster(options).job(options.job)
    fetched = download(job, options.directory or Path(job.name), options.endpoint)
    _say_confirmed(fetched)
    files = f"{fetched.files} file" + ("s" if fetched.files != 1 else "")
    print(f"{fetched.directory}: {files}, {format_bytes(fetched.bytes)}, every digest verified ({fetched.format})")
    return 0


def _say_confirmed(fetched: Any) -> None:
    """Nothing, unless the digest of the manifest is known from the object storage alone."""
    if not fetched.confirmed:
        print(
            f"the training pod's last word was lost: it did not confirm that the artifact is {fetched.uri}"
            f" (manifest sha256 {fetched.manifest_sha256}), which the object storage names as the newest",
            file=sys.stderr,
        )


def run(options: Namespace) -> int:
    """Submit, follow, fetch. Ctrl-C leaves the job alone."""
    from finetune.cluster.fetch import check_directory, claim_elsewhere
    from finetune.cluster.follow import follow
    from finetune.cluster.submit import read_submission, settle_namespace
    from finetune.cluster.submit import submit as create
    from finetune.progress_view import make_view

    submission = read_submission(options.manifest)
    cluster = _cluster(options)
    cluster.namespace = settle_namespace(submission, cluster, options.namespace)
    if not options.no_fetch and not claim_elsewhere(submission.spec.output.uri):
        check_directory(cluster, submission.name, options.directory or Path(submission.name))
    submitted = create(cluster, submission)
    found = "created" if submitted.created else f"found ({submitted.job.state})"
    print(f"FineTuneJob '{submission.name}' {found} in the namespace '{cluster.namespace}'", file=sys.stderr)
    try:
        with make_view() as view:
            job = follow(cluster, submission.name, view)
    except KeyboardInterrupt:
        print("detached; the job goes on in the cluster", file=sys.stderr)
        print(f"to come back: {_run_again(options)}", file=sys.stderr)
        print(f"to stop it: {again(options, 'cancel', submitted.job)}", file=sys.stderr)
        return 130
    return _finish(job, options)


def _finish(job: Job, options: Namespace) -> int:
    from finetune.cluster.fetch import claim_elsewhere
    from finetune.cluster.fetch import fetch as download
    from finetune.cluster.follow import result_of

    result = result_of(job)
    wanted = job.ended == COMPLETE and not options.no_fetch
    claim = claim_elsewhere(str(job.spec["output"]["uri"])) if wanted else ""
    directory = options.directory or Path(job.name)
    stream = sys.stderr if options.output == "json" else sys.stdout
    print(f"{result.state.value}: {result.message}", file=stream)
    if result.artifacts is not None:
        print(f"artifact: {result.artifacts.uri} (manifest sha256 {result.artifacts.manifest_sha256})", file=stream)
    for name, value in sorted(result.metrics.items()):
        print(f"  {name} {value:.6g}", file=stream)
    try:
        if claim:
            print(f"not fetched: the PersistentVolumeClaim '{claim}' is not mounted on this machine", file=stream)
        elif wanted:
            fetched = download(job, directory, options.endpoint)
            _say_confirmed(fetched)
            known = result.artifacts or fetched.artifacts
            result = result.model_copy(update={"fetched_to": str(directory), "artifacts": known})
            print(f"fetched to {directory}, every digest verified", file=stream)
    except Exception:
        print(f"the job is complete; to fetch it later: {_fetch_again(job, options)}", file=sys.stderr)
        raise
    finally:
        if options.output == "json":
            print(result.model_dump_json(by_alias=True, exclude_none=True))
    if job.ended != COMPLETE and job.exit_class is not ExitClass.INVALID_SPEC:
        print(f"the first error: {again(options, 'logs', job)} --first-error", file=sys.stderr)
    return result.exit_code


def again(options: Namespace, command: str, job: Job) -> str:
    """A command line about this job, with the same cluster options."""
    return _line(command, job.name, *_given(options, "kubeconfig", "context"), "--namespace", job.namespace)


def _fetch_again(job: Job, options: Namespace) -> str:
    return " ".join([again(options, "fetch", job), *map(shlex.quote, _given(options, "directory", "endpoint"))])


def _run_again(options: Namespace) -> str:
    words = _given(options, "kubeconfig", "context", "namespace", "directory", "endpoint")
    words += ["--no-fetch"] if options.no_fetch else []
    words += ["--output", options.output] if options.output != "text" else []
    return _line("run", "--on", "kubernetes", options.manifest, *words)


def _given(options: Namespace, *names: str) -> list[str]:
    """Those of these options that were given, as words of a command line."""
    return [word for name in names if (value := getattr(options, name)) for word in (f"--{name}", str(value))]


def _line(*words: str) -> str:
    return f"{program()} {shlex.join(words)}"


def _cluster(options: Namespace) -> Cluster:
    return open_cluster(options.kubeconfig, options.context, options.namespace)


def _list_of(items: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    return {"apiVersion": "v1", "kind": "List", "items": items}


def _now() -> datetime:
    return datetime.now(UTC)


def _dump(content: Mapping[str, Any] | Sequence[Any], form: str) -> None:
    if form == "json":
        print(json.dumps(content, indent=2))
        return
    from ruamel.yaml import YAML

    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.explicit_start = True
    yaml.dump(content, sys.stdout)
