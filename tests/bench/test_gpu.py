"""The bench of a GPU, on one that is not there: all its checks, from nothing but the packages that it says it needs."""

import json
import math
import os
import shlex
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from tests.bench.gpu.__main__ import NEEDED
from tests.bench.gpu.checks import FIRST, LATER, Check, Subject, _compared
from tests.bench.gpu.counts import OperationsByPart, covered
from tests.bench.gpu.crops import NO_CROPS
from tests.bench.gpu.datasheet import GPUS, beside_datasheet
from tests.bench.gpu.parts import ABSENT, OUTER, PARTS, Timeline
from tests.bench.gpu.plan import KINDS, Machine, planned
from tests.bench.gpu.result import CHECKED, VERSION
from tests.bench.gpu.run import Session
from tests.bench.gpu.settings import full, recipes, settled, smallest_first
from tests.null_gpu.build import environment, missing
from tests.support.golden import ROOT
from tests.support.operations import Operations
from training.preflight.calculated.memory import census
from training.recipes import SHIPPED

RECIPES = ("personmae_vits", "supervised", "pass_vits")
ALONE = ("-m", "tests.support.only_packages", ",".join(NEEDED))


FULL_SIZE = ("demo", "supervised")
TOGETHER = [(name,) for name in recipes()] if os.environ.get("NULL_GPU_CASES") == "all" else [FULL_SIZE]
"""Recipes that one process measures: all of them would leave too little of the host's memory."""
CLOSE = 0.05
"""How far the peak of the allocator may be from the calculated one."""
UNKNOWN = {"mfu", "calculated_ms", f"reduce_ms_of_{GPUS}", "busy_ms", "data_wait"}
"""What cannot be had on this GPU, or without data."""
NO_REDUCTION = {"parts_ms: reduce", "operations: reduce"}
"""What cannot be had of one process."""


def run(
    words: tuple[str, ...], where: Path, variables: dict[str, str], *, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=where, env={**variables, "PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=timeout)  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=f"null GPU absent: {missing()}")
def test_bench__passes_on_a_gpu_that_computes_as_the_cpu_does(tmp_path: Path) -> None:
    flags = ("--tiny", "--threads", "1", "--out", "found.json", "--kinds", "speed", "transcription", "checks",
             "--recipes", *RECIPES)  # fmt: skip
    done = run((*ALONE, "tests.null_gpu.inside", "tests.bench.gpu", *flags), tmp_path, environment())
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["version"] == VERSION and found["about"]["gpu"] == "Null H100" and not found["failed"]
    untranscribed = "supervised: transcription: the published step of supervised is not transcribed"
    assert found["left_out"] == [f"crops: {NO_CROPS}", untranscribed] and found["crops"]["passed"] is None
    assert sorted(found["recipes"]) == sorted(RECIPES)
    assert {slot["kind"] for slot in found["plan"]} == {"speed", "transcription", "checks"}
    for name, checks in found["recipes"].items():
        assert tuple(checks) == ("speed", "transcription", *CHECKED[:3], "resume") and name in done.stdout
        figures = {kind: check["figures"] for kind, check in checks.items()}
        on_gpu, on_cpu = figures["fp32"]["gpu"], figures["fp32"]["cpu"]
        assert on_gpu == pytest.approx(on_cpu, rel=5e-7) and len(set(on_gpu)) == 3  # fused kernels sum in another order
        assert figures["resume"]["identical"]
        assert all(math.isfinite(figures[precision]["loss"]) for precision in ("bf16", "fp16"))
        assert figures["speed"]["peak"] > 0 and figures["speed"]["images_per_s"] > 0
        lacks = checks["speed"]["lacks"]
        assert figures["speed"]["parts_ms"]["reduce"] is None is figures["speed"]["operations"]["reduce"]
        assert set(lacks) == UNKNOWN | NO_REDUCTION and {lacks[key] for key in NO_REDUCTION} == {ABSENT["reduce"]}
        assert "noise" in lacks["data_wait"] and figures["speed"]["data_wait"] is None
        if name != "supervised":
            assert figures["transcription"]["loss_off"] < 1e-3 and figures["transcription"]["ratio"] > 0


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=f"null GPU absent: {missing()}")
@pytest.mark.parametrize("chosen", TOGETHER, ids=" ".join)
def test_bench__counts_launches_waits_and_memory_of_steps_in_full_size(chosen: tuple[str, ...], tmp_path: Path) -> None:
    """On a GPU whose kernels do nothing, which takes no time: allocator, dispatcher and waits are the real ones."""
    flags = ("--threads", "1", "--kinds", "speed", "--minutes", "30", "--recipes", *chosen)
    done = run(("-m", "tests.null_gpu.inside", "--idle", "tests.bench.gpu", *flags), tmp_path, environment(),
               timeout=3_600)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "bench_gpu.json").read_text())
    assert sorted(found["recipes"]) == sorted(chosen)
    assert found["left_out"] == [f"crops: {NO_CROPS}"]
    for name, checks in found["recipes"].items():
        figures, lacks = checks["speed"]["figures"], checks["speed"]["lacks"]
        assert {key for key, value in figures.items() if value is None} == UNKNOWN
        assert set(lacks) == UNKNOWN | NO_REDUCTION
        assert figures["peak"] == pytest.approx(figures["calculated"], rel=CLOSE), name
        assert tuple(figures["parts_ms"]) == tuple(figures["operations"]) == PARTS
        assert sum(filter(None, figures["parts_ms"].values())) > 0
        idle = {part for part, count in figures["operations"].items() if not count}
        assert idle == {"reduce", "idle"} | (set() if has_teacher(name) else {"teacher"})
        assert figures["kernels"] > 0.5 * sum(filter(None, figures["operations"].values()))
        waits = Counter[str]()
        for line, count in figures["waits"].items():
            waits[line.partition(":")[0]] += count
        assert waits.pop("training/engine/stepper.py") == 1, figures["waits"]
        assert set(waits) <= {"training/core/device_copy.py"}, figures["waits"]  # for copies alone, long done


def has_teacher(recipe: str) -> bool:
    return bool(census(settled(recipe)).teacher)


@pytest.mark.slow
@pytest.mark.skipif(bool(missing()), reason=f"null GPU absent: {missing()}")
def test_bench__fails_on_a_gpu_whose_kernels_do_nothing(tmp_path: Path) -> None:
    flags = ("--tiny", "--threads", "1", "--kinds", "checks", "--recipes", "demo")
    done = run(("-m", "tests.null_gpu.inside", "--idle", "tests.bench.gpu", *flags), tmp_path, environment())
    assert done.returncode == 1, done.stdout + done.stderr
    assert "FAILED demo: fp32: step 1: " in done.stdout
    found = json.loads((tmp_path / "bench_gpu.json").read_text())
    assert any(line.startswith("demo: fp32") for line in found["failed"])


class Tick(NamedTuple):
    """An event of a clock that is read by hand."""

    at: float

    def elapsed_time(self, other: "Tick") -> float:
        return other.at - self.at


def test_timeline__parts_add_up_to_a_step() -> None:
    times = iter(range(1_000))
    timeline = Timeline(lambda: Tick(next(times) ** 2))
    inside = {"forward": ("teacher", "student", "student")}
    for _ in range(3):
        for part in OUTER:
            timeline.enter(part)
            for one in inside.get(part, ()):
                timeline.enter(one)
                timeline.leave()
            timeline.leave()
    found = timeline.milliseconds()
    assert tuple(found) == PARTS and found.pop("reduce") is None
    assert sum(filter(None, found.values())) == pytest.approx(28**2 / 2)  # 14 events a step, the last step left out
    assert found["copy"] == pytest.approx((1 + 15**2 - 14**2) / 2)
    assert found["idle"] and found["idle"] > 0 and found["heads, loss"] and found["heads, loss"] > 0


def test_operations_by_part__inner_parts_are_not_counted_twice() -> None:
    with Operations() as operations:
        by_part = OperationsByPart(operations)
        value = torch.ones(3)
        by_part.enter("forward")
        value = value + 1
        by_part.enter("teacher")
        value = value * value * value
        by_part.leave()
        value = value + 1
        by_part.leave()
    assert dict(by_part.of) == {"idle": 1, "forward": 2, "teacher": 2}


def test_covered__spans_that_overlap_count_once() -> None:
    assert covered([(0, 2), (1, 3), (5, 6), (5.2, 5.8)]) == 4


def test_planned__gives_time_to_speed_of_all_recipes_then_to_one_of_each_method() -> None:
    names = ("supervised", "demo", "pass_vits", "pass_vitl")
    subjects = [Subject(*given) for given in smallest_first(names, tiny=False)]
    slow, fast = Machine(1e14, 80 << 30, 8), Machine(1e15, 80 << 30, 8)
    slots = planned(subjects, KINDS, fast, seconds=1e6)
    assert [slot.recipe for slot in slots[:4]] == [one.name for one in subjects]
    assert [slot.kind for slot in slots] == ["speed"] * 4 + 2 * [kind for kind in KINDS[1:] for _ in range(2)]
    assert {slot.recipe for slot in slots[4:10]} == {"supervised", "pass_vits"}
    assert {slot.recipe for slot in slots if not slot.planned} == {"supervised", "demo"}  # nothing to be beside
    longer = planned(subjects, ("speed",), slow, seconds=1e6)
    assert all(one.seconds > other.seconds for one, other in zip(longer, slots, strict=False))
    enough = sum(slot.seconds for slot in slots if slot.kind == "speed")
    few = planned(subjects, KINDS, fast, seconds=1.01 * enough)
    assert [slot.planned for slot in few] == [slot.kind == "speed" for slot in few]


def test_full__takes_all_images_of_a_worker_where_the_recipe_has_no_micro_batch() -> None:
    config = settled("demo")
    assert config.optimisation.micro_batch == 0
    made = full("demo", config, census(config), 80 << 30).optimisation
    assert made.batch == made.micro_batch == 32


def test_settled__reads_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text((SHIPPED / "pass_vits.toml").read_text().replace("drop_path = 0.1", "drop_path = 0.2"))
    assert settled(str(path)).backbone.drop_path == 0.2 and settled("pass_vits").backbone.drop_path == 0.1


def test_datasheet__figures_of_a_known_gpu_and_of_a_strange_one() -> None:
    config = settled("pass_vits")
    config = replace(config, optimisation=replace(config.optimisation, batch=64, micro_batch=64))
    sizes = census(config)
    found = beside_datasheet(config, sizes, 1_000.0, "NVIDIA A100-SXM4-80GB")
    assert found["tflops"] == pytest.approx(91.6, rel=1e-3)
    assert found["mfu"] == pytest.approx(1_000 * 91.6e9 / 312e12, rel=1e-3)
    assert found["calculated_ms"] == pytest.approx(sum(found["calculated_ms_of"].values()))
    assert 40 < found["calculated_ms"] < 160
    assert found["calculated_ms_of"]["reduce"] == 0 < found[f"reduce_ms_of_{GPUS}"] < found["calculated_ms"]
    strange = beside_datasheet(config, sizes, 1_000.0, "Null H100")
    assert (
        strange["mfu"] is None
        and strange["calculated_ms"] is None is strange[f"reduce_ms_of_{GPUS}"]
        and strange["tflops"] == found["tflops"]
    )


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
    assert done.stdout.split() == [python, *["-m", "tests.bench.gpu", "--minutes", "2"]]
    words += ["RECIPE=pass_vits mine.toml", "CROPS=my crops"]
    done = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True, check=True)
    chosen = ["--recipes", "pass_vits", "mine.toml", "--crops", "my crops"]
    assert shlex.split(done.stdout)[1:] == ["-m", "tests.bench.gpu", *chosen, "--minutes", "2"]


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
