"""The bench of a GPU, on one that is not there: all its checks, from nothing but the packages that it says it needs."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.gpu.__main__ import NEEDED
from tests.bench.gpu.checks import FIRST, LATER, Check, _compared
from tests.bench.gpu.datasheet import beside_datasheet
from tests.bench.gpu.result import CHECKS
from tests.bench.gpu.run import Session
from tests.bench.gpu.settings import settled
from tests.null_gpu.build import environment, missing
from tests.support.golden import ROOT
from training.preflight.memory import census

RECIPES = ("personmae_vits", "supervised", "pass_vits")
ALONE = ("-m", "tests.support.only_packages", ",".join(NEEDED))


def run(words: tuple[str, ...], where: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=where, env={**variables, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=600)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=f"null GPU absent: {missing()}")
def test_bench__passes_on_a_gpu_that_computes_as_the_cpu_does(tmp_path: Path) -> None:
    flags = ("--tiny", "--threads", "1", "--out", "found.json", "--recipes", *RECIPES)
    done = run((*ALONE, "tests.null_gpu.inside", "tests.bench.gpu", *flags), tmp_path, environment())
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["about"]["gpu"] == "Null H100" and not found["failed"] and not found["left_out"]
    assert sorted(found["recipes"]) == sorted(RECIPES)
    for name, checks in found["recipes"].items():
        assert tuple(checks) == CHECKS and name in done.stdout
        figures = {kind: check["figures"] for kind, check in checks.items()}
        on_gpu, on_cpu = figures["fp32"]["gpu"], figures["fp32"]["cpu"]
        assert on_gpu == pytest.approx(on_cpu, rel=5e-7) and len(set(on_gpu)) == 3  # fused kernels sum in another order
        assert figures["resume"]["identical"]
        assert all(math.isfinite(figures[precision]["loss"]) for precision in ("bf16", "fp16"))
        assert figures["speed"]["peak"] > 0 and figures["speed"]["images_per_s"] > 0


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=f"null GPU absent: {missing()}")
def test_bench__fails_on_a_gpu_whose_kernels_do_nothing(tmp_path: Path) -> None:
    flags = ("--tiny", "--threads", "1", "--recipes", "demo")
    done = run(("-m", "tests.null_gpu.inside", "--idle", "tests.bench.gpu", *flags), tmp_path, environment())
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED demo: fp32: step 1: " in done.stdout
    found = json.loads((tmp_path / "bench_gpu.json").read_text())
    assert any(line.startswith("demo: fp32") for line in found["failed"])


def test_datasheet__figures_of_a_known_gpu_and_of_a_strange_one() -> None:
    config = settled("pass_vits")
    config = replace(config, optimisation=replace(config.optimisation, batch=64, micro_batch=64))
    sizes = census(config)
    found = beside_datasheet(config, sizes, 1_000.0, "NVIDIA A100-SXM4-80GB")
    assert found["tflops"] == pytest.approx(91.6, rel=1e-3)
    assert found["mfu"] == pytest.approx(1_000 * 91.6e9 / 312e12, rel=1e-3)
    assert found["calculated_ms"] == pytest.approx(sum(found["calculated_ms_of"].values()))
    assert 40 < found["calculated_ms"] < 160
    strange = beside_datasheet(config, sizes, 1_000.0, "Null H100")
    assert strange["mfu"] is None and strange["calculated_ms"] is None and strange["tflops"] == found["tflops"]


@pytest.mark.parametrize(("off", "passes"), [(0.9, True), (1.1, False)])
@pytest.mark.parametrize("step", [0, 2])
def test_compared__each_step_has_its_bound(step: int, off: float, passes: bool) -> None:
    losses, expected = [3.0, 2.0, 1.0], [3.0, 2.0, 1.0]
    losses[step] *= 1 + off * (FIRST if step == 0 else LATER)
    check = _compared(losses, expected)
    assert check.passed is passes and ("off" in check.why) is not passes


@pytest.mark.slow
def test_bench__says_in_one_error_that_there_is_no_gpu(tmp_path: Path) -> None:
    done = run((*ALONE, "tests.bench.gpu"), tmp_path, {**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 2 and not done.stdout and not list(tmp_path.iterdir())
    first, second = done.stderr.splitlines()
    assert first.startswith("error: PyTorch") and first.endswith("sees no GPU") and "try:" in second


@pytest.mark.parametrize(("given", "python"), [(("PYTHON=some_python",), "some_python"), ((), "python3")])
def test_make__sets_nothing_up(given: tuple[str, ...], python: str, tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    variables = {name: value for name, value in os.environ.items() if name != "PYTHON"}
    words = ["make", "--dry-run", "--no-print-directory", "bench-gpu", "FLAGS=--minutes 2", *given]
    done = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == f"{python} -m tests.bench.gpu --minutes 2\n"


@pytest.mark.slow
def test_session__fails_what_raises_and_leaves_out_what_it_has_no_time_for(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session(minutes=1)

    def broken() -> Check:
        raise RuntimeError("no such kernel\nand more")

    assert session.ask("fp32", 1.0, broken) == Check(False, "RuntimeError: no such kernel")
    assert "Traceback" in capsys.readouterr().err
    assert session.ask("speed", 1.0, lambda: Check(True)).passed
    session._rates["speed"] = 61.0
    assert session.ask("speed", 1.0, lambda: Check(True)) == Check(None, "no time left for it")
    assert session.ask("speed", 0.5, lambda: Check(True)).passed
