"""The ten most likely mistakes, word for word as `kubectl apply` shows them."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.apiserver.manifests import manifest
from tests.apiserver.server import binary

from finetune_api.fields import MODEL_URI_PATTERN

_INVALID = 'The FineTuneJob "support-bot" is invalid: '
# The API server's own words; it judges CEL only where the structure is sound.
_REST = (
    "\n* <nil>: Invalid value: null: some validation rules were not checked because the object was invalid; "
    "correct the existing errors to complete validation"
)

MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a misspelt field": (
        manifest(training={"epoch": 3}),
        'Error from server (BadRequest): error when creating "job.json": FineTuneJob in version "v1alpha1" cannot be '
        'handled as a FineTuneJob: strict decoding error: unknown field "spec.training.epoch"',
    ),
    "a word that is none of the choices": (
        manifest(method={"type": "lora"}),
        f'{_INVALID}\n* spec.method.type: Unsupported value: "lora": supported values: "Full", "LoRA", "QLoRA"{_REST}',
    ),
    "no output": (manifest(output=None), f"{_INVALID}\n* spec.output: Required value{_REST}"),
    "a number in quotes": (
        manifest(training={"learningRate": "2e-4"}),
        f'{_INVALID}\n* spec.training.learningRate: Invalid value: "string": spec.training.learningRate in body must '
        f'be of type number: "string"{_REST}',
    ),
    "a model without a scheme": (
        manifest(model={"uri": "meta/llama"}),
        f'{_INVALID}spec.model.uri: Invalid value: "meta/llama": spec.model.uri in body should match '
        f"'{MODEL_URI_PATTERN}'",
    ),
    "a file of this machine": (
        manifest(dataset={"train": [{"uri": "file:///data/train.jsonl"}]}),
        f"{_INVALID}spec.dataset.train[0]: Invalid value: spec.dataset.train: file:// names nothing that all pods of "
        "a cluster share; use object storage or pvc://",
    ),
    "a batch that cannot be dealt to the ranks": (
        manifest(training={"globalBatchSize": 30}, distributed={"nodes": 4}),
        f"{_INVALID}spec: Invalid value: spec.training.globalBatchSize must be a multiple of the ranks "
        "(nodes x processesPerNode); change either",
    ),
    "epochs and steps": (
        manifest(training={"epochs": 3, "maxSteps": 10}),
        f"{_INVALID}spec.training: Invalid value: spec.training has both epochs and maxSteps; keep one of the two",
    ),
    "options of another method": (
        manifest(method={"type": "Full", "lora": {"rank": 8}}),
        f"{_INVALID}spec.method: Invalid value: spec.method.lora belongs to method LoRA or QLoRA only; remove it, or "
        "set type: LoRA or QLoRA",
    ),
    "an 8-bit optimizer without a GPU": (
        manifest(training={"optimizer": {"type": "AdamW8bit"}}),
        f"{_INVALID}spec: Invalid value: spec.training.optimizer.type: 8-bit optimizers need a CUDA device; use "
        "AdamW, or ask for resources.accelerator",
    ),
}


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_kubectl_shows_what_is_wrong(kubeconfig: Path, tmp_path: Path, mistake: str) -> None:
    data, message = MISTAKES[mistake]
    (tmp_path / "job.json").write_text(json.dumps(data))
    assert _apply(kubeconfig, tmp_path) == (1, message)


def test_kubectl_shows_why_a_change_is_refused(kubeconfig: Path, tmp_path: Path) -> None:
    for data, expected in (
        (manifest(), (0, "")),
        (
            manifest(method={"type": "QLoRA"}),
            (
                1,
                'The FineTuneJob "support-bot" is invalid: spec.method: Invalid value: spec.method is immutable '
                "because it defines the result; create a new job with another name",
            ),
        ),
    ):
        (tmp_path / "job.json").write_text(json.dumps(data))
        assert _apply(kubeconfig, tmp_path) == expected


def _apply(kubeconfig: Path, folder: Path) -> tuple[int, str]:
    command = [binary("kubectl"), "--kubeconfig", kubeconfig, "apply", "-f", "job.json"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stderr.removesuffix("\n")
