"""Datasheet figures by the names that drivers give, and what has none."""

import pytest

from training.preflight.calculated import gpus
from training.preflight.calculated.gpus import GPUS, TERA, known, named


@pytest.mark.parametrize(("device", "name", "bf16"), [
    ("NVIDIA H100 80GB HBM3", "H100 SXM", 989.5), ("NVIDIA H100 PCIe", "H100 PCIe", 756),
    ("NVIDIA H100 NVL", "H100 NVL", 835.5), ("NVIDIA H200", "H200", 989.5), ("NVIDIA B200", "B200", 2_250),
    ("NVIDIA A100-SXM4-40GB", "A100 SXM 40 GB", 312), ("NVIDIA A100 80GB PCIe", "A100 PCIe 80 GB", 312),
    ("A100-SXM4-80GB", "A100 SXM 80 GB", 312), ("NVIDIA L4", "L4", 121), ("NVIDIA L40S", "L40S", 362),
    ("NVIDIA A10G", "A10G", 70), ("NVIDIA A10", "A10", 125), ("NVIDIA GeForce RTX 4090", "GeForce RTX 4090", 165.2),
    ("NVIDIA RTX A6000", "RTX A6000", 154.8), ("Tesla T4", "T4", 0),
    ("AMD Instinct MI300X", "Instinct MI300X", 1_307.4),
])  # fmt: skip
def test_known__by_the_drivers_name(device: str, name: str, bf16: float) -> None:
    gpu = known(device)
    assert gpu is not None and gpu.name == name and gpu.peak("bf16") == bf16 * TERA


@pytest.mark.parametrize("device", [
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU", "GRID A100-10C", "NVIDIA A40-48Q",
    "NVIDIA GeForce GTX 1080 Ti", "Null H100", "", "cpu",
])  # fmt: skip
def test_known__has_no_figure_for_parts_laptops_and_strangers(device: str) -> None:
    assert known(device) is None


@pytest.mark.parametrize(("name", "meant"), [
    ("h100", "H100 SXM"), ("H100-PCIe", "H100 PCIe"), ("h100 sxm", "H100 SXM"), ("a100", "A100 SXM 80 GB"),
    ("NVIDIA A100-SXM4-40GB", "A100 SXM 40 GB"), ("rtx 4090", "GeForce RTX 4090"), ("3090", "GeForce RTX 3090 Ti"),
    ("geforce rtx 3090", "GeForce RTX 3090"), ("l4", "L4"), ("v100", "V100 SXM2"), ("mi300x", "Instinct MI300X"),
    ("a10", "A10"), ("b200", "B200"), ("H200", "H200"),
])  # fmt: skip
def test_named__as_a_person_writes_it(name: str, meant: str) -> None:
    gpu = named(name)
    assert gpu is not None and gpu.name == meant


@pytest.mark.parametrize("name", ["", " - ", "gtx 1080", "cpu", "nvidia"])
def test_named__nothing_else(name: str) -> None:
    assert named(name) is None


def test_table__names_and_patterns_are_distinct() -> None:
    names = [gpu.name for gpu in GPUS]
    assert len(set(names)) == len(names) and all(named(name).name == name for name in names)  # type: ignore[union-attr]


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_table__figures_fit_together(gpu: gpus.Gpu) -> None:
    """Matrix units in tf32 are at most half as fast as in bf16 and at least as fast as float32; rates are dense."""
    assert gpu.fp32 > 0 and gpu.fp16 >= gpu.bf16 and gpu.memory > gpu.host and gpu.memory_gb > 0 and gpu.source
    assert gpu.fp16 / gpu.fp32 < 35  # twice that with sparsity
    if gpu.tf32:
        assert gpu.fp32 <= gpu.tf32 <= 0.51 * gpu.bf16
