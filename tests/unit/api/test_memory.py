"""Memory by part: figures worked out by hand, and orders that must hold."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.memory import Layout, estimate_memory, quantized_bytes
from finetune_api.parameters import count_parameters
from finetune_api.plan import CheckpointingMode, Facts, MemoryEstimate
from finetune_api.quantities import format_bytes, parse_quantity
from finetune_api.spec import DeepSpeedOptions, Offload, QuantizationOptions, Sharding
from finetune_api.strategy import DDP, deepspeed, fsdp

from .specs import llama_8b, spec

FACTS = Facts(model=llama_8b())
TOTAL = 8_030_261_248  # of the base model
EMBEDDING = 128_256 * 4096
QUANTIZED = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)


def estimate(
    strategy: Any, ranks: int = 8, per_node: int = 8, mode: str = "Full", micro: int = 1, **blocks: Any
) -> MemoryEstimate:
    job = spec(**{"method": {"type": "Full"}, **blocks})
    assert FACTS.model is not None
    counts = count_parameters(job, FACTS.model)
    layout = Layout(strategy, ranks, per_node, micro, CheckpointingMode(mode))
    found = estimate_memory(job, FACTS, counts, layout)
    assert found is not None
    return found


def zero(stage: int, optimizer: Offload = Offload.NONE, parameters: Offload = Offload.NONE) -> Any:
    return deepspeed(DeepSpeedOptions(zero_stage=stage, offload_optimizer=optimizer, offload_parameters=parameters))


def test_full_training_of_a_replica_is_18_bytes_per_parameter() -> None:
    found = estimate(DDP, ranks=1, per_node=1)
    assert (found.weights, found.gradients, found.optimizer) == (6 * TOTAL, 4 * TOTAL, 8 * TOTAL)


def test_in_fp32_there_are_no_copies_for_compute() -> None:
    assert estimate(DDP, training={"precision": "FP32", "learningRate": 1e-5}).weights == 4 * TOTAL


def test_full_sharding_divides_what_is_kept() -> None:
    found = estimate(fsdp(Sharding.FULL))
    unit = EMBEDDING  # larger than a decoder layer
    assert found.weights == pytest.approx(4 * TOTAL / 8 + 2 * 2 * unit, rel=1e-6)
    assert found.gradients == pytest.approx(4 * TOTAL / 8 + 4 * unit, rel=1e-6)
    assert found.optimizer == TOTAL


def test_hybrid_sharding_divides_by_the_ranks_of_a_node() -> None:
    assert estimate(fsdp(Sharding.HYBRID), ranks=32, per_node=8).optimizer == TOTAL
    assert estimate(fsdp(Sharding.FULL), ranks=32, per_node=8).optimizer == TOTAL // 4


def test_gradient_and_optimizer_sharding_keeps_whole_weights_for_compute() -> None:
    found = estimate(fsdp(Sharding.GRADIENT_AND_OPTIMIZER))
    assert found.weights == 4 * TOTAL // 8 + 2 * TOTAL


def test_offloading_moves_the_shards_to_the_host() -> None:
    found = estimate(fsdp(Sharding.FULL, cpu_offload=True))
    assert found.optimizer == 0
    assert found.host == pytest.approx(16 * TOTAL / 8, rel=1e-6)


def test_zero_stages_shard_one_part_more_each() -> None:
    one, two, three = (estimate(zero(stage)) for stage in (1, 2, 3))
    bucket = 2 * 500_000_000
    assert (one.weights, one.gradients, one.optimizer) == (2 * TOTAL, 4 * TOTAL + bucket, 12 * TOTAL // 8)
    assert (two.weights, two.gradients, two.optimizer) == (2 * TOTAL, 4 * TOTAL // 8 + bucket, 12 * TOTAL // 8)
    assert three.weights == pytest.approx(2 * TOTAL / 8 + 2 * 2 * EMBEDDING, rel=1e-6)


def test_zero_offload_moves_optimizer_and_parameters_to_the_host() -> None:
    found = estimate(zero(3, Offload.CPU, Offload.CPU))
    assert (found.optimizer, found.host) == (0, 12 * TOTAL // 8 + 2 * TOTAL // 8)
    assert estimate(zero(3, Offload.NVME, Offload.NVME)).host == 0


def test_packed_weights_are_half_a_byte_and_their_scales() -> None:
    double, single = QuantizationOptions(), QuantizationOptions(double_quantization=False)
    assert quantized_bytes(64 * 256, double) == 8192 + 256 + 4
    assert quantized_bytes(64 * 256, single) == 8192 + 4 * 256


def test_qlora_keeps_embeddings_and_head_in_16_bit() -> None:
    found = estimate(DDP, method={"type": "QLoRA"})
    trainable = 41_943_040
    frozen = 2 * (TOTAL - QUANTIZED) + quantized_bytes(QUANTIZED, QuantizationOptions())
    assert found.weights == frozen + 6 * trainable
    assert (found.gradients, found.optimizer) == (4 * trainable, 8 * trainable)


def test_qlora_shards_the_packed_base() -> None:
    whole, sharded = estimate(DDP, method={"type": "QLoRA"}), estimate(fsdp(Sharding.FULL), method={"type": "QLoRA"})
    assert sharded.weights < whole.weights / 4


@pytest.mark.parametrize(
    ("optimizer", "bytes_per_parameter"),
    [({"type": "SGD"}, 0), ({"type": "SGD", "momentum": 0.9}, 4), ({"type": "AdamW8bit"}, 2), ({"type": "AdamW"}, 8)],
)
def test_optimizers_keep_this_much(optimizer: dict[str, Any], bytes_per_parameter: int) -> None:
    training = {"optimizer": optimizer, "learningRate": 1e-5}
    resources = {"accelerator": {"count": 1}}
    assert estimate(DDP, training=training, resources=resources).optimizer == bytes_per_parameter * TOTAL


def test_adafactor_keeps_rows_and_columns() -> None:
    training = {"optimizer": {"type": "Adafactor"}, "learningRate": 1e-5}
    assert estimate(DDP, training=training).optimizer < TOTAL / 500


def test_a_paged_optimizer_lives_on_the_host() -> None:
    training = {"optimizer": {"type": "PagedAdamW8bit"}, "learningRate": 1e-5}
    found = estimate(DDP, training=training, resources={"accelerator": {"count": 1}})
    assert (found.optimizer, found.host) == (0, 2 * TOTAL)


def test_logits_exist_for_one_chunk_only() -> None:
    assert estimate(DDP, micro=1).logits == estimate(DDP, micro=16).logits == 2 * 4 * 1024 * 128_256


def test_checkpointing_trades_activations() -> None:
    none, selective, full = (estimate(DDP, mode=mode).activations for mode in ("None", "Selective", "Full"))
    assert none > selective > full
    assert none > 10 * full


def test_activations_grow_with_the_micro_batch() -> None:
    assert estimate(DDP, micro=4, mode="None").activations == 4 * estimate(DDP, micro=1, mode="None").activations


def test_on_cpu_the_host_is_the_device() -> None:
    offloaded = fsdp(Sharding.FULL, cpu_offload=True)
    on_cpu, on_gpu = estimate(offloaded), estimate(offloaded, resources={"accelerator": {"count": 8}})
    assert on_cpu.total == on_gpu.total + on_gpu.host


def test_the_total_is_the_sum_of_the_parts() -> None:
    found = estimate(fsdp(Sharding.FULL))
    assert found.total == found.weights + found.gradients + found.optimizer + found.activations + found.logits


@pytest.mark.parametrize(
    ("text", "expected"),
    [("16Gi", 16 * 2**30), ("1.5Gi", 3 * 2**29), ("500M", 500_000_000), ("2", 2), ("1500m", 1), ("1Ki", 1024)],
)
def test_quantities_are_read(text: str, expected: int) -> None:
    assert parse_quantity(text) == expected


def test_what_is_no_quantity_is_refused() -> None:
    with pytest.raises(ValueError, match="'16 GB' is not a quantity such as 16Gi, 500M or 2"):
        parse_quantity("16 GB")


def test_bytes_are_told_in_binary_units() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 2**30, 5 * 2**40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "1.0 GiB",
        "5.0 TiB",
    ]
