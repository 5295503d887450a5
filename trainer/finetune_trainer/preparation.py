"""What a launcher does once per node before any rank starts: model files, data, the completed plan."""

from __future__ import annotations

from pathlib import Path

from finetune_api.model_facts import model_facts_from_config
from finetune_api.plan import ModelFacts
from finetune_api.planner import complete_plan
from finetune_api.report import Phase
from finetune_api.trainer_config import TrainerConfig
from finetune_trainer.status import LauncherStatus
from finetune_trainer.worker_config import WorkerConfig


def prepare_node(config: TrainerConfig, status: LauncherStatus) -> WorkerConfig:
    """Fix and fetch the model, prepare the data, complete the plan with what both revealed."""
    from finetune_trainer.base_model import fix_revision
    from finetune_trainer.data import prepare
    from finetune_trainer.model_files import fetch_model

    def fetched(what: str, done: float | None = None, total: float | None = None) -> None:
        status.enter(Phase.FETCHING_MODEL, what, done, total)

    def prepared(what: str) -> None:
        status.enter(Phase.PREPARING_DATA, what)

    fetched("deciding which commit of the model is used")
    config = fix_revision(config)
    fetched("fetching model files")
    model_directory = fetch_model(config, fetched)
    prepared("preparing data")
    data = prepare(config, model_directory, prepared)
    facts = read_model_facts(model_directory, config.spec.model.uri)
    plan = complete_plan(config.plan, config.spec, data.facts, facts)
    return WorkerConfig(
        trainer=config.model_copy(update={"plan": plan}),
        model_directory=str(model_directory),
        data_directory=str(data.directory),
        log_directory=str(Path(config.work_directory) / "logs"),
    )


def read_model_facts(directory: Path, uri: str) -> ModelFacts:
    """Facts from the files at hand: ``config.json`` and, where there is one, the safetensors index."""
    from finetune_trainer.model_files import read_json

    index = directory / "model.safetensors.index.json"
    return model_facts_from_config(
        read_json(directory / "config.json", uri), read_json(index, uri) if index.is_file() else None
    )
