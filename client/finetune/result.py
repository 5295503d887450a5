"""What a local run ends with: the one JSON object of ``finetune run --output json``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path

from finetune_api.exits import Cause, ExitClass
from finetune_api.fields import SchemaModel
from finetune_api.plan import Plan
from finetune_api.report import JobResult, Termination


class RunState(StrEnum):
    COMPLETED = "Completed"
    FAILED = "Failed"
    INTERRUPTED = "Interrupted"


class Artifacts(SchemaModel):
    """Where the published files are."""

    uri: str
    manifest_sha256: str
    files: int
    bytes: int


class RunResult(SchemaModel):
    """How a run ended."""

    state: RunState
    exit_class: ExitClass
    message: str
    hint: str = ""
    step: int | None = None
    artifacts: Artifacts | None = None
    metrics: dict[str, float] = {}
    report_path: str | None = None
    run_directory: str | None = None  # of a local run
    job: str | None = None  # namespace/name, of a run in a cluster
    fetched_to: str | None = None
    last_lines: tuple[str, ...] = ()
    plan: Plan | None = None

    @property
    def exit_code(self) -> int:
        return self.exit_class.code


def read_termination(work: Path, return_code: int) -> Termination:
    """What the launcher in ``work`` said last; made up from its exit code if it could not say anything."""
    path = work / "termination.json"
    if path.exists():
        return Termination.model_validate_json(path.read_bytes())
    exit_class = ExitClass.from_code(return_code)
    how = f"was killed by signal {-return_code}" if return_code < 0 else f"exited with code {return_code}"
    return Termination(
        exit_class=exit_class,
        exit_code=exit_class.code,
        message=f"the launcher of {work.name} {how} without a word",
        hint=f"see {work / 'launcher.log'}",
    )


def decisive(terminations: list[Termination]) -> Termination:
    """The termination that tells the story: the artifact if there is one, else the cause rather than its echoes."""

    def rank(ended: Termination) -> int:
        if ended.exit_class is ExitClass.COMPLETED:
            return 0 if ended.artifact_uri else 5
        if ended.exit_class in {ExitClass.COMMUNICATION_FAILED, ExitClass.RENDEZVOUS_FAILED}:
            return 4
        return 3 if ended.exit_class is ExitClass.INTERRUPTED else 2

    failed = [ended for ended in terminations if ended.exit_class is not ExitClass.COMPLETED]
    return min(failed or terminations, key=rank)


def result_of(ended: Termination, run_directory: Path, result: JobResult | None, plan: Plan) -> RunResult:
    """The run's result from the decisive termination and rank 0's last word."""
    state = RunState.FAILED
    if ended.exit_class is ExitClass.COMPLETED:
        state = RunState.COMPLETED
    elif ended.exit_class.cause is Cause.INTERRUPTION:
        state = RunState.INTERRUPTED
    artifacts = None
    if result is not None and state is RunState.COMPLETED:
        artifacts = Artifacts(
            uri=result.artifact_uri,
            manifest_sha256=result.artifact_manifest_sha256,
            files=result.artifact_files,
            bytes=result.artifact_bytes,
        )
    return RunResult(
        state=state,
        exit_class=ended.exit_class,
        message=ended.message,
        hint=ended.hint,
        step=ended.step,
        artifacts=artifacts,
        metrics=result.metrics if result else ended.metrics,
        report_path=str(Path(result.report_directory) / "report.html") if result else None,
        run_directory=str(run_directory),
        last_lines=ended.last_lines,
        plan=ended.plan or plan,
    )
