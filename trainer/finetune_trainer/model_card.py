"""README.md of a published artifact: Hugging Face front matter, what was trained on what, and how to load it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML

from finetune_api.spec import FineTuneJobSpec, MethodType, OutputFormat
from finetune_api.trainer_config import TrainerConfig
from finetune_trainer.publish import ArtifactDescription

_VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
_METRIC_NAMES = {
    "baseValidationLoss": "Validation loss of the base model",
    "validationLoss": "Validation loss after training",
    "trainLoss": "Training loss",
    "tokensPerSecond": "Tokens per second",
}


def model_card(config: TrainerConfig, description: ArtifactDescription) -> str:
    """Markdown with YAML front matter. Everything in it comes from the arguments, so equal jobs give equal cards."""
    spec = config.spec
    sections = [
        _front_matter(spec, description),
        f"# {config.job.name}\n",
        _summary(spec, description),
        _section("Results", _table(("Metric", "Value"), _metrics(description.metrics))),
        _section("Training", _table(("Setting", "Value"), _settings(config))),
        _section("Data", _table(("Fact", "Value"), _flat(description.dataset))),
        _section("How to load it", _loading(config, description)),
        _section("Made with", _table(("Package", "Version"), sorted(description.versions.items()))),
        f"\nJob `{config.job.namespace}/{config.job.name}`, uid `{config.job.uid}`"
        + (f", configuration digest `{digest}`" if (digest := description.job.get("configDigest")) else "")
        + ". `manifest.json` lists every file with its sha256; `report.html` shows the whole run.\n",
    ]
    return "\n".join(section for section in sections if section)


def hub_name(uri: str) -> str:
    """``org/name`` of an ``hf://`` URI; any other URI as it is."""
    return uri.removeprefix("hf://").partition("@")[0] if uri.startswith("hf://") else uri


def _front_matter(spec: FineTuneJobSpec, description: ArtifactDescription) -> str:
    adapter = description.format == OutputFormat.ADAPTER
    content: dict[str, Any] = {
        "base_model": hub_name(spec.model.uri),
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["finetune-operator", spec.method.type.value.lower(), *(["adapter"] if adapter else [])],
    }
    if licence := description.base_model.get("licence"):
        content["license"] = str(licence)
    writer, stream = YAML(), io.StringIO()
    writer.default_flow_style = False
    writer.dump(content, stream)
    return f"---\n{stream.getvalue()}---\n"


def _summary(spec: FineTuneJobSpec, description: ArtifactDescription) -> str:
    base = description.base_model
    revision = f" at revision `{base['revision']}`" if base.get("revision") else ""
    kind = {
        OutputFormat.ADAPTER: f"A {spec.method.type.value} adapter for",
        OutputFormat.MERGED_MODEL: f"A model with its {spec.method.type.value} adapter merged, from",
        OutputFormat.FULL_MODEL: "A model trained in full, from",
    }[OutputFormat(description.format)]
    return f"{kind} `{hub_name(spec.model.uri)}`{revision}.\n"


def _metrics(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    order = [*_METRIC_NAMES, *sorted(set(metrics) - set(_METRIC_NAMES))]
    return [(_METRIC_NAMES.get(name, name), f"{metrics[name]:.6g}") for name in order if name in metrics]


def _settings(config: TrainerConfig) -> list[tuple[str, str]]:
    spec, plan = config.spec, config.plan
    training = spec.training
    rows = [
        ("Method", spec.method.type.value),
        ("Steps", str(plan.total_steps) if plan.total_steps is not None else "unknown"),
        ("Global batch size", str(plan.global_batch_size)),
        (
            "Longest sequence",
            f"{spec.dataset.max_sequence_length} tokens" + (", packed" if spec.dataset.packing else ""),
        ),
        ("Loss on", spec.dataset.loss_on.value),
        ("Learning rate", f"{training.learning_rate:g}, {training.schedule.type.value}"),
        ("Optimizer", training.optimizer.type.value),
        ("Precision", plan.precision.value),
        ("Strategy", f"{plan.strategy.label}, {plan.world_size} ranks"),
        ("Seed", str(training.seed)),
    ]
    if spec.method.type is not MethodType.FULL and (lora := spec.method.lora):
        rows.insert(1, ("LoRA", f"rank {lora.rank}, alpha {lora.alpha:g}, on {', '.join(lora.target_modules)}"))
    return rows


def _loading(config: TrainerConfig, description: ArtifactDescription) -> str:
    base, name = hub_name(config.spec.model.uri), config.job.name
    if description.format != OutputFormat.ADAPTER:
        code = (
            'from transformers import AutoModelForCausalLM\n\nmodel = AutoModelForCausalLM.from_pretrained("DIRECTORY")'
        )
        return f"```python\n{code}\n```\n\n```sh\nvllm serve DIRECTORY\n```\n\nDIRECTORY is a local copy of this one.\n"
    code = (
        "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\nmodel = PeftModel.from_pretrained(base, "DIRECTORY")'
    )
    text = f"```python\n{code}\n```\n\n{_vllm(config, base, name)}\nDIRECTORY is a local copy of this one"
    return text + ("" if "://" not in base else ", and the base model's URI stands for a local copy of it") + ".\n"


def _vllm(config: TrainerConfig, base: str, name: str) -> str:
    lora = config.spec.method.lora
    rank = lora.rank if lora else 16
    if lora and (lora.use_dora or lora.modules_to_save):
        return "vLLM loads no DoRA weights and no fully trained modules beside LoRA: merge the adapter first.\n"
    allowed = next((known for known in _VLLM_RANKS if known >= rank), None)
    if allowed is None:
        return f"vLLM serves no adapter of rank {rank}: merge the adapter first.\n"
    return f"```sh\nvllm serve {base} --enable-lora --max-lora-rank {allowed} --lora-modules {name}=DIRECTORY\n```\n"


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in content.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{key}.")
        elif value is not None:
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append((prefix + key, shown))
    return rows


def _section(title: str, body: str) -> str:
    return f"\n## {title}\n\n{body}" if body else ""


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    if not rows:
        return ""
    lines = [f"| {header[0]} | {header[1]} |", "| --- | --- |"]
    return "\n".join(lines + [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows]) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
