"""What a launcher does once per node before any rank starts: model files, data, the completed plan."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from finetune_api.errors import ModelError
from finetune_api.model_facts import model_facts_from_config
from finetune_api.plan import ModelFacts
from finetune_api.planner import complete_plan
from finetune_api.report import Phase
from finetune_api.trainer_config import TrainerConfig
from finetune_trainer.status import LauncherStatus
from finetune_trainer.worker_config import WorkerConfig

# (what, done, total): ``done`` of ``total`` in the unit that ``what`` names; both may be unknown
ReportProgress = Callable[[str, float | None, float | None], None]


def prepare_node(config: TrainerConfig, status: LauncherStatus) -> WorkerConfig:
    """Fetch the model's files, prepare the data, complete the plan with what both revealed."""
    from finetune_trainer.data import prepare
    from finetune_trainer.model_files import fetch_model

    status.enter(Phase.FETCHING_MODEL, "fetching model files")
    model_directory = Path(fetch_model(config, _reporter(status, Phase.FETCHING_MODEL)))
    status.enter(Phase.PREPARING_DATA, "preparing data")
    data = prepare(config, model_directory, _reporter(status, Phase.PREPARING_DATA))
    plan = complete_plan(config.plan, config.spec, data.facts, read_model_facts(model_directory))
    return WorkerConfig(
        trainer=config.model_copy(update={"plan": plan}),
        model_directory=str(model_directory),
        data_directory=str(data.directory),
        log_directory=str(Path(config.work_directory) / "logs"),
    )


def read_model_facts(model_directory: Path) -> ModelFacts:
    """Facts from the files at hand: ``config.json`` and, where there is one, the safetensors index."""
    config = _read_json(model_directory / "config.json")
    if config is None:
        raise ModelError(
            f"the model directory {model_directory} has no config.json",
            "point spec.model.uri at a directory that transformers can load",
        )
    return model_facts_from_config(config, _read_json(model_directory / "model.safetensors.index.json"))


def _read_json(path: Path) -> dict[str, object] | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON ({error})", "fetch the model again") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object", "fetch the model again")
    return content


def _reporter(status: LauncherStatus, phase: Phase) -> ReportProgress:
    def report(message: str, done: float | None = None, total: float | None = None) -> None:
        status.enter(phase, message, done, total)

    return report
