"""Which device is chosen, and which GPUs torch can use: no GPU is needed to know."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster.commands import evaluate as cluster_evaluate
from cluster.commands import pretrain as cluster_pretrain
from datapipe.core.errors import ConfigError
from training.commands.entry_points import evaluate, pretrain
from training.core.devices import choose_device, refuse_without_kernels, runs_on, slow_precision, unused_gpus

CUDA_13 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
GPU = torch.device("cuda", 0)


@pytest.mark.parametrize(("capability", "built_for", "runs"), [
    ((7, 0), CUDA_13, False),  # V100
    ((7, 5), CUDA_13, True),  # T4
    ((8, 9), CUDA_13, True),  # L4: machine code of 8.6
    ((9, 0), CUDA_13, True),
    ((10, 1), CUDA_13, False),
    ((11, 0), CUDA_13, False),
    ((12, 1), CUDA_13, True),
    ((8, 0), ["sm_86"], False),  # later minor version
    ((9, 0), ["sm_90a"], True),
    ((9, 1), ["sm_90a"], False),
    ((7, 0), ["sm_60", "compute_60"], True),  # compiled when it is loaded
    ((7, 0), ["sm_70"], True),
    ((9, 4), ["gfx942"], True),  # ROCm: not for us to judge
])  # fmt: skip
def test_kernels__for_which_gpus(capability: tuple[int, int], built_for: list[str], runs: bool) -> None:
    assert runs_on(capability, built_for) == runs


def _gpu(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    for name, value in {"is_available": True, "device_count": 1, "get_device_capability": capability,
                        "get_device_name": "Tesla", "get_arch_list": CUDA_13}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


def test_choose__a_gpu_without_kernels_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu(monkeypatch, (7, 0))
    for name in ("auto", "cuda"):
        with pytest.raises(ConfigError, match=r"no kernels for Tesla \(compute capability 7.0, sm_70\).*sm_75"):
            choose_device(name)  # type: ignore[arg-type]
    assert choose_device("cpu") == torch.device("cpu")
    _gpu(monkeypatch, (7, 5))
    assert choose_device("auto") == GPU
    refuse_without_kernels(GPU)
    with pytest.raises(ConfigError, match="no GPU 3: this process sees 1"):
        choose_device("cuda", 3)


@pytest.mark.parametrize(("capability", "precision", "slow"), [
    ((7, 5), "bf16", True), ((8, 0), "bf16", False), ((7, 5), "fp16", False), ((7, 5), "fp32", False)])  # fmt: skip
def test_precision__bf16_by_a_detour_is_said(monkeypatch: pytest.MonkeyPatch, capability: Any, precision: str,
                                             slow: bool) -> None:  # fmt: skip
    _gpu(monkeypatch, capability)
    said = slow_precision(precision, GPU)
    assert bool(said) == slow and (not slow or "--optimisation.precision fp16" in said)
    assert slow_precision(precision, torch.device("cpu")) == ""


def test_unused__gpus_that_nobody_asked_to_leave_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu(monkeypatch, (9, 0))
    cpu = torch.device("cpu")
    assert "1 GPUs" in unused_gpus(cpu, "auto")
    assert unused_gpus(cpu, "cpu") == unused_gpus(GPU, "auto") == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
@pytest.mark.parametrize("command", [pretrain, evaluate, cluster_pretrain, cluster_evaluate])
@pytest.mark.parametrize("flag", ["--device", "--engine.device"])
def test_cuda__without_a_gpu_is_one_clear_error_before_anything_is_read(
    tmp_path: Path, command: Callable[[list[str]], int], flag: str
) -> None:
    absent, out = str(tmp_path / "absent"), str(tmp_path / "run")
    if command.__name__ == "pretrain":
        words = ["pass_vits", "--stream.manifest", absent, "--out", out, "--engine.device", "cuda"]
    else:
        words = [absent, "--data", absent, flag, "cuda"]
    with pytest.raises(ConfigError, match="a GPU is asked for.*no driver, or no GPU") as found:
        command(words)
    assert "--engine.device cpu" in found.value.hint and not (tmp_path / "run").exists()
