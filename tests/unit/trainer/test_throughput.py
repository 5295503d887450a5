"""Peak rates by the names that the driver gives devices."""

from __future__ import annotations

import pytest

from finetune_trainer.throughput import peak_flops_of


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA B200", 2250e12),
        ("Tesla T4", None),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_a_device_has_the_dense_16_bit_peak_of_its_data_sheet(name: str, peak: float | None) -> None:
    assert peak_flops_of(name) == peak
