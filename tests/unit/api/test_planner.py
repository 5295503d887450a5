"""The planner: exact arithmetic, decisions with reasons, refusals with the nearest that works."""

from __future__ import annotations

import json
from fractions import Fraction
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from finetune_api.batch import divisors, nearest_multiples
from finetune_api.errors import DataError, SpecError
from finetune_api.plan import CheckpointingMode, DatasetFacts, Facts, Plan
from finetune_api.planner import complete_plan, make_plan
from finetune_api.spec import FineTuneJobSpec, OutputFormat, Sharding, StrategyType, Training

from .specs import JOB, gpus, llama_8b, spec

GOLDEN = Path(__file__).parent / "golden_plan.json"


def plan_of(**blocks: Any) -> Plan:
    return make_plan(spec(**blocks), Facts(), JOB)


def refusals(job: FineTuneJobSpec, facts: Facts | None = None) -> list[str]:
    with pytest.raises(SpecError) as caught:
        make_plan(job, facts or Facts(), JOB)
    return [str(problem) for problem in caught.value.problems]


def reason(plan: Plan, field: str) -> str:
    return next(decision.reason for decision in plan.decisions if decision.field == field)


SIZES = st.integers(1, 4096)


@given(
    nodes=st.integers(1, 16), processes=st.integers(1, 16), accumulation=st.integers(1, 64), micro=st.integers(1, 64)
)
@settings(deadline=None, max_examples=60)
def test_a_batch_that_divides_is_planned_exactly(nodes: int, processes: int, accumulation: int, micro: int) -> None:
    size = nodes * processes * accumulation * micro
    plan = plan_of(
        training={"globalBatchSize": size, "microBatchSize": micro},
        distributed={"nodes": nodes, "processesPerNode": processes},
    )
    assert plan.world_size == nodes * processes
    assert (plan.micro_batch_size, plan.gradient_accumulation_steps) == (micro, accumulation)


@given(size=SIZES, nodes=st.integers(1, 8), length=st.sampled_from([8, 512, 2048, 65536]))
@settings(deadline=None, max_examples=60)
def test_a_chosen_micro_batch_always_divides_and_keeps_to_the_token_limit(size: int, nodes: int, length: int) -> None:
    assume(size % nodes == 0)
    plan = plan_of(
        dataset={"train": [{"uri": "s3://d/t.jsonl"}], "maxSequenceLength": length},
        training={"globalBatchSize": size},
        distributed={"nodes": nodes},
    )
    assert plan.micro_batch_size * plan.gradient_accumulation_steps * plan.world_size == size
    assert plan.micro_batch_size == 1 or plan.micro_batch_size * length <= 4096


@given(size=SIZES, nodes=st.integers(2, 64), micro=st.none() | st.integers(1, 64))
@settings(deadline=None, max_examples=100)
def test_a_refused_batch_names_sizes_that_are_accepted(size: int, nodes: int, micro: int | None) -> None:
    valid = spec()
    training = Training(global_batch_size=size, micro_batch_size=micro)
    distributed = valid.distributed.model_copy(update={"nodes": nodes})
    job = valid.model_copy(update={"training": training, "distributed": distributed})
    unit = nodes * (micro or 1)
    if size % unit == 0:
        assert make_plan(job, Facts(), JOB).world_size == nodes
        return
    for offered in nearest_multiples(size, unit):
        changed = training.model_copy(update={"global_batch_size": offered})
        assert make_plan(job.model_copy(update={"training": changed}), Facts(), JOB).global_batch_size == offered
    assert str(nearest_multiples(size, unit)[-1]) in refusals(job)[0]


@given(st.integers(1, 100_000))
def test_divisors_divide_and_none_is_missing(number: int) -> None:
    found = divisors(number)
    assert found == sorted(set(found))
    assert all(number % divisor == 0 for divisor in found)
    assert (found[0], found[-1]) == (1, number)
    if number <= 2000:
        assert found == [d for d in range(1, number + 1) if number % d == 0]


@given(samples=st.integers(1, 10**7), size=SIZES, hundredths=st.integers(1, 1000))
@settings(deadline=None, max_examples=100)
def test_steps_are_epochs_of_samples_rounded_up_once(samples: int, size: int, hundredths: int) -> None:
    job = spec(training={"globalBatchSize": size, "epochs": hundredths / 100})
    plan = make_plan(job, Facts(), JOB)
    done = complete_plan(plan, job, DatasetFacts(train_samples=samples, exact=True))
    assert done.total_steps == max(1, ceil(Fraction(hundredths, 100) * samples / size))
    assert done.steps_per_epoch == ceil(Fraction(samples, size))
    assert done.warmup_steps == ceil(Fraction(3, 100) * done.total_steps)
    assert complete_plan(done, job, DatasetFacts(train_samples=samples, exact=True)) == done


def test_a_tenth_of_an_epoch_is_a_tenth() -> None:
    job = spec(training={"globalBatchSize": 1, "epochs": 0.1})
    done = complete_plan(make_plan(job, Facts(), JOB), job, DatasetFacts(train_samples=30, exact=True))
    assert done.total_steps == 3


def test_max_steps_are_known_before_the_data_is() -> None:
    plan = plan_of(training={"maxSteps": 200, "schedule": {"warmupFraction": 0.1}})
    assert (plan.total_steps, plan.steps_per_epoch, plan.warmup_steps) == (200, None, 20)


def test_a_schedule_that_rises_itself_has_no_warmup() -> None:
    assert plan_of(training={"maxSteps": 200, "schedule": {"type": "OneCycle", "peakFraction": 0.3}}).warmup_steps == 0


def test_no_sample_left_is_said() -> None:
    job = spec()
    with pytest.raises(DataError, match="no training sample is left after preparation"):
        complete_plan(make_plan(job, Facts(), JOB), job, DatasetFacts(train_samples=0, exact=True))


def test_warmup_longer_than_training_is_refused_once_the_steps_are_known() -> None:
    job = spec(training={"schedule": {"warmupSteps": 50}})
    with pytest.raises(SpecError) as caught:
        complete_plan(make_plan(job, Facts(), JOB), job, DatasetFacts(train_samples=64, exact=True))
    assert str(caught.value) == (
        "spec.training.schedule.warmupSteps: must be at most the 2 steps of the job, not 50; "
        "use at most 2, or warmupFraction"
    )


def test_fewer_samples_than_a_batch_is_a_warning() -> None:
    job = spec(training={"globalBatchSize": 32})
    done = complete_plan(make_plan(job, Facts(), JOB), job, DatasetFacts(train_samples=10, exact=True))
    assert done.warnings == (
        "spec.training.globalBatchSize: one step of 32 samples sees the 10 training samples more than once",
    )


def test_one_rank_needs_no_sharding() -> None:
    plan = plan_of()
    assert plan.strategy.type is StrategyType.DDP
    assert reason(plan, "spec.distributed.strategy.type") == "one rank: there is nothing to shard"


def test_many_ranks_of_an_unknown_model_are_sharded() -> None:
    plan = plan_of(distributed={"nodes": 2})
    assert (plan.strategy.type, plan.strategy.sharding) == (StrategyType.FSDP, Sharding.FULL)
    assert reason(plan, "spec.distributed.strategy.type").startswith("the size of the model is not known yet")


def test_what_fits_is_replicated_and_what_does_not_is_sharded() -> None:
    facts = Facts(model=llama_8b())
    small = make_plan(spec(resources=gpus(8), method={"type": "QLoRA"}), facts, JOB)
    large = make_plan(spec(resources=gpus(8), method={"type": "Full"}, training={"learningRate": 1e-5}), facts, JOB)
    assert small.strategy.type is StrategyType.DDP
    assert (large.strategy.type, large.strategy.sharding) == (StrategyType.FSDP, Sharding.FULL)
    assert reason(large, "spec.distributed.strategy.type") == (
        "a replica needs 136.6 GiB, more than the 72.0 GiB usable per device"
    )


def test_large_nodes_are_sharded_within_and_replicated_between() -> None:
    facts = Facts(model=llama_8b())
    plan = make_plan(spec(resources=gpus(8), method={"type": "Full"}, distributed={"nodes": 4}), facts, JOB)
    assert (plan.strategy.type, plan.strategy.sharding) == (StrategyType.FSDP, Sharding.HYBRID)


@pytest.mark.parametrize("optimizer", ["AdamW8bit", "PagedAdamW8bit", "Adafactor"])
def test_auto_never_shards_an_optimizer_that_cannot_be(optimizer: str) -> None:
    plan = make_plan(
        spec(resources=gpus(8), method={"type": "Full"}, training={"optimizer": {"type": optimizer}}),
        Facts(model=llama_8b()),
        JOB,
    )
    assert plan.strategy.type is StrategyType.DDP
    assert "suits adapters" in plan.warnings[0]


def test_a_plan_that_cannot_fit_says_what_would() -> None:
    job = spec(
        resources=gpus(1, "24Gi"),
        method={"type": "Full"},
        training={"learningRate": 1e-5, "optimizer": {"type": "SGD"}},
    )
    warnings = make_plan(job, Facts(model=llama_8b()), JOB).warnings
    assert len(warnings) == 1
    assert warnings[0].startswith("spec.resources.accelerator.memory: the plan needs about ")
    assert "21.6 GiB are usable; strategy FSDP with cpuOffload would need" in warnings[0]


def test_experts_cannot_be_quantised() -> None:
    model = llama_8b().model_copy(update={"experts": 8, "architecture": "MixtralForCausalLM", "model_type": "mixtral"})
    assert refusals(spec(method={"type": "QLoRA"}), Facts(model=model)) == [
        "spec.method.type: MixtralForCausalLM has 8 fused experts per layer, which 4-bit storage does not reach "
        "('QLoRA'); use LoRA with FSDP, which shards them"
    ]


def test_targets_that_fit_no_module_are_refused_with_the_nearest() -> None:
    job = spec(method={"type": "LoRA", "lora": {"targetModules": ["q_poj", "v_proj"], "modulesToSave": ["score"]}})
    assert refusals(job, Facts(model=llama_8b())) == [
        "spec.method.lora.targetModules: fits no module of LlamaForCausalLM ('q_poj'); did you mean q_proj?",
        "spec.method.lora.modulesToSave: fits no module of LlamaForCausalLM ('score'); use all-linear or some of "
        "down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj",
    ]


def test_checkpointing_follows_memory() -> None:
    facts = Facts(model=llama_8b())
    roomy = make_plan(spec(resources=gpus(1), training={"microBatchSize": 1, "globalBatchSize": 1}), facts, JOB)
    tight = make_plan(spec(resources=gpus(1), training={"microBatchSize": 32, "globalBatchSize": 32}), facts, JOB)
    assert roomy.gradient_checkpointing is CheckpointingMode.NONE
    assert tight.gradient_checkpointing is CheckpointingMode.FULL


def test_the_output_format_follows_the_method() -> None:
    assert plan_of().output_format is OutputFormat.ADAPTER
    assert plan_of(method={"type": "Full"}).output_format is OutputFormat.FULL_MODEL


def test_completing_a_plan_changes_nothing_that_ranks_agree_on() -> None:
    job = spec(distributed={"nodes": 2})
    plan = make_plan(job, Facts(), JOB)
    done = complete_plan(plan, job, DatasetFacts(train_samples=320, exact=True), llama_8b())
    for name in (
        "strategy",
        "micro_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "artifact_prefix",
    ):
        assert getattr(done, name) == getattr(plan, name)
    assert done.parameters is not None
    assert (done.parameters.total, done.parameters.exact) == (8_030_261_248 + 41_943_040, True)


def test_every_decision_has_a_field_that_exists_and_a_reason() -> None:
    from finetune_api.descriptions import DESCRIPTIONS

    plan = make_plan(spec(method={"type": "QLoRA"}, resources=gpus(8)), Facts(model=llama_8b()), JOB)
    assert not [decision for decision in plan.decisions if not decision.reason]
    assert not [decision.field for decision in plan.decisions if decision.field not in DESCRIPTIONS]
    assert len({decision.field for decision in plan.decisions}) == len(plan.decisions)


def test_what_the_user_wrote_is_no_decision() -> None:
    plan = plan_of(training={"learningRate": 2e-4, "seed": 42, "microBatchSize": 1, "gradientCheckpointing": "None"})
    fields = {decision.field for decision in plan.decisions}
    assert not fields & {
        "spec.training.learningRate",
        "spec.training.seed",
        "spec.training.microBatchSize",
        "spec.training.gradientCheckpointing",
    }


def test_the_plan_of_a_whole_job_is_the_golden_one() -> None:
    job = spec(
        model={"uri": f"hf://org/base@{'a' * 40}"},
        method={"type": "QLoRA", "lora": {"rank": 32, "useDora": True}},
        training={"globalBatchSize": 64, "epochs": 2.5, "schedule": {"warmupFraction": 0.1}},
        distributed={"nodes": 2},
        resources=gpus(8, "24Gi"),
    )
    plan = make_plan(job, Facts(model=llama_8b()), JOB)
    plan = complete_plan(plan, job, DatasetFacts(train_samples=10_001, exact=True), llama_8b())
    expected = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert plan.model_dump(mode="json", by_alias=True, exclude_none=True) == expected
