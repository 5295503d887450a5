"""The loss scale of FP16: when a step may be skipped, and what a checkpoint carries of it."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

from finetune_api.spec import Precision
from finetune_trainer.engines.base import Engine, LossScaler
from finetune_trainer.engines.ddp import DdpEngine
from finetune_trainer.engines.deepspeed import DeepSpeedEngine


def torch_engine(precision: Precision = Precision.FP16) -> Any:
    engine = object.__new__(DdpEngine)
    engine.plan = SimpleNamespace(precision=precision)  # type: ignore[assignment]
    engine.scaler = LossScaler(precision is Precision.FP16)
    return engine


def deepspeed_engine(precision: Precision = Precision.FP16) -> Any:
    """With DeepSpeed's own scaler and defaults; a whole engine computes in FP16 on CUDA only."""
    engine = object.__new__(DeepSpeedEngine)
    engine.plan = SimpleNamespace(precision=precision)  # type: ignore[assignment]
    scaler = DynamicLossScaler(2.0**16, 10, 1, 2, False)
    engine.zero = SimpleNamespace(loss_scaler=scaler)
    engine.forgive_smallest_scale()
    return engine


def update(engine: Any, *finite: bool) -> None:
    for step in finite:
        if isinstance(engine, DdpEngine):
            engine.scaler.update(step)
        else:
            engine.zero.loss_scaler.update_scale(not step)


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepspeed.runtime.fp16.loss_scaler.dist.get_rank", lambda: 1)


@pytest.mark.parametrize(("make", "forgiven"), [(torch_engine, 16), (deepspeed_engine, 17)])
def test_a_step_is_skipped_only_while_the_scale_can_shrink(make: Any, forgiven: int) -> None:
    engine = make()
    skipped = 0
    while engine.may_skip():
        update(engine, False)
        skipped += 1
    assert (skipped, engine.scaler_state()["scale"]) == (forgiven, 1.0)
    update(engine, False)  # the loop stops; the scaler itself does not raise
    assert engine.scaler_state()["scale"] == 1.0


@pytest.mark.parametrize("make", [torch_engine, deepspeed_engine])
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.FP32])
def test_without_a_loss_scale_no_step_is_skipped(make: Any, precision: Precision) -> None:
    engine: Engine = make(precision)
    assert not engine.may_skip()
    assert engine.scaler_state() == {}


@pytest.mark.parametrize("make", [torch_engine, deepspeed_engine])
def test_a_resumed_scale_goes_on_as_if_it_had_never_stopped(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LossScaler, "growth_interval", 10)
    before, after = [True] * 4 + [False] * 3 + [True] * 7, [True] * 5 + [False] + [True] * 30
    whole, resumed = make(), make()
    update(whole, *before)
    resumed.load_scaler_state(json.loads(json.dumps(whole.scaler_state())))
    for finite in after:
        update(whole, finite)
        update(resumed, finite)
        assert resumed.scaler_state() == whole.scaler_state()


@pytest.mark.parametrize(("one", "other"), [(torch_engine, deepspeed_engine), (deepspeed_engine, torch_engine)])
def test_a_scale_moves_to_another_kind_of_engine(one: Any, other: Any) -> None:
    engine, next_engine = one(), other()
    update(engine, False, False, True, True, True)
    next_engine.load_scaler_state(engine.scaler_state())
    for key in ("scale", "goodSteps"):
        assert next_engine.scaler_state()[key] == engine.scaler_state()[key]


def test_a_checkpoint_of_an_earlier_version_is_read() -> None:
    engine = deepspeed_engine()
    engine.load_scaler_state({"scale": 512.0})
    assert engine.scaler_state()["scale"] == 512.0
    update(engine, True, False, False)
    assert engine.scaler_state()["scale"] == 256.0
