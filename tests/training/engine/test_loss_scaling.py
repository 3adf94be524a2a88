"""Loss scaling: powers of two change no result, an overflow costs no sample, and a resumed run has the same scale.

Float16 needs a GPU, but scaling does not: it is carried out here in float32, which overflows too if the scale is large.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import training.trainer.pretrain
from datapipe.core.errors import ConfigError
from datapipe.storage import open_store
from datapipe.stream.batch import Batch
from tests.end_to_end.tiny import StoppingHost, audited, command, final_state, finished, recipe, shards
from tests.support.ranks import run_ranks
from training import checkpoint
from training.config import recipe_toml as recipes
from training.config.batch_split import BatchSplit
from training.config.build import make_stepper
from training.config.run_config import RunConfig
from training.core.host import LocalHost
from training.core.world import World, alone
from training.engine.loss_scaling import GROWTH_STEPS, LARGEST, LossScale, first_scale
from training.engine.stepper import Stepper
from training.methods.base import Method, Views
from training.preflight.checks import refuse_unsuited
from training.trainer.batch_to_device import BatchToDevice
from training.trainer.pretrain import pretrain

CROPS, BATCH = 36, 6
STEPS = CROPS // BATCH
HUGE = LossScale(2.0**126)
"""Gradients times this are beyond float32."""
UNCLIPPED = ("--optimisation.clip", "none")
"""A clip factor over a huge scale would be subnormal, and round."""
GROWING = LossScale(2.0**10, GROWTH_STEPS - 4)
"""Grows with the fourth step."""


def test_scale__grows_after_good_steps_up_to_a_limit() -> None:
    scale = LossScale(8.0)
    for _ in range(GROWTH_STEPS - 1):
        scale = scale.after_step()
    assert scale == LossScale(8.0, GROWTH_STEPS - 1)
    assert scale.after_step() == LossScale(16.0, 0)
    assert LossScale(LARGEST, GROWTH_STEPS - 1).after_step() == LossScale(LARGEST, 0)


def test_scale__is_halved_by_an_overflow_down_to_one() -> None:
    assert LossScale(8.0, 77).after_overflow() == LossScale(4.0, 0)
    assert not LossScale(2.0).smallest and LossScale(2.0).after_overflow().smallest
    assert first_scale("fp16") == LossScale(65_536.0) and first_scale("bf16") is None is first_scale("fp32")


class PoisonedPlace(BatchToDevice):
    """Turns a view of one step into NaN, once; step 0: never."""

    def __init__(self, device: torch.device, step: int) -> None:
        super().__init__(device)
        self.step = step

    def __call__(self, batch: Batch) -> Views:
        views = super().__call__(batch)
        if batch.start == (self.step - 1) * BATCH:
            self.step = 0
            views["global"][0, 0] = float("nan")
        return views


def _run(
    world: World, path: str, out: str, *flags: str, scale: LossScale | None = None, poison: int = 0, stop: int = 0
) -> None:
    """One run in this process of the test; `scale`: what it begins with, though its precision is float32."""

    def scaled(config: RunConfig, method: Method, world: World, split: BatchSplit) -> Stepper:
        stepper = make_stepper(config, method, world, split)
        stepper.scale = scale
        return stepper

    training.trainer.pretrain.make_stepper = scaled
    training.trainer.pretrain.BatchToDevice = lambda device, _: PoisonedPlace(device, poison)  # type: ignore[assignment,misc]
    pretrain(recipes.load(path, ["--out", out, *flags]), world=world, host=StoppingHost(stop))


def _all(world: World, path: str, folder: str, *flags: str) -> None:
    def run(name: str, *more: str, **options: Any) -> None:
        _run(world, path, f"{folder}/{name}", *flags, *more, **options)

    one_image = (*UNCLIPPED, "--optimisation.batch", "1", "--optimisation.epochs", "0.1")
    run("unscaled")
    run("scaled", scale=LossScale())
    run("unclipped", *UNCLIPPED)
    run("huge", *UNCLIPPED, scale=HUGE)
    run("growing", scale=GROWING)
    run("growing, poisoned", scale=GROWING, poison=5)
    run("growing, resumed", scale=GROWING, stop=3)
    run("growing, resumed")
    run("one image", *one_image)  # with two ranks, all that the second one has is padding
    run("one image, huge", *one_image, scale=HUGE)
    if "deepspeed" in flags:
        for stage in ("0", "2", "3"):
            run(f"stage {stage}, huge", *UNCLIPPED, "--engine.zero-stage", stage, scale=HUGE)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, write_crops: Callable[..., dict[str, bytes]]) -> Path:
    folder = tmp_path_factory.mktemp("scaling")
    write_crops(folder / "crops", CROPS)
    return recipe(folder, shards(folder / "crops", str(folder / "shards")).url, "unused")


def _scales(run: Path) -> list[float]:
    """The loss scale that each step was done with, over all attempts."""
    logs = sorted((run / "metrics").glob("attempt_*.jsonl"))
    records = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return list({record["step"]: record["scale"] for record in records if "scale" in record}.values())


def _final_scale(run: Path) -> dict[str, float]:
    store = open_store(str(run / "checkpoints"))
    return checkpoint.read_marker(store, checkpoint.complete(store)[-1]).loss_scale


def _faults(run: Path) -> list[str]:
    log = run / "faults" / "steps.jsonl"
    return log.read_text().splitlines() if log.exists() else []


def _same(left: Path, right: Path) -> bool:
    one, other = final_state(left), final_state(right)
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.slow
@pytest.mark.parametrize(("world", "stepper"), [(1, "plain"), (2, "deepspeed")])
def test_scaling__in_real_runs(path: Path, tmp_path: Path, world: int, stepper: str) -> None:
    run_ranks(world, _all, str(path), str(tmp_path), "--engine.stepper", stepper)
    unscaled = tmp_path / "unscaled"
    assert _scales(unscaled) == [] and _final_scale(unscaled) == {}

    assert _same(unscaled, tmp_path / "scaled"), "powers of two round nothing"
    assert _scales(tmp_path / "scaled") == [2.0**16] * STEPS
    assert _final_scale(tmp_path / "scaled") == {"value": 2.0**16, "good": STEPS}

    # float32 overflows until the scale fits; no fault, no sample lost or doubled
    for name in ["huge"] + [f"stage {stage}, huge" for stage in (0, 2, 3) if stepper == "deepspeed"]:
        run = tmp_path / name
        assert _same(tmp_path / "unclipped", run), name
        assert 2.0**24 < min(_scales(run)) <= max(_scales(run)) < HUGE.value
        assert "gradients overflow at a loss scale of" in (run / "log.txt").read_text()
        assert _faults(run) == []
        samples = [sample for _, seen in sorted(audited(run).items()) for sample in seen]
        assert sorted(samples) == list(range(CROPS))

    # step 4 is the last of GROWTH_STEPS; what comes back after a stop or a NaN is the scale of the checkpoint
    for name in ("growing", "growing, resumed", "growing, poisoned"):
        assert _scales(tmp_path / name) == [2.0**10] * 4 + [2.0**11] * 2
        assert _final_scale(tmp_path / name) == {"value": 2.0**11, "good": 2}
        assert _same(unscaled, tmp_path / name), name
    assert [json.loads(line)["action"] for line in _faults(tmp_path / "growing, poisoned")] == ["rewound"]
    assert len(list((tmp_path / "growing, resumed" / "metrics").iterdir())) == 2

    # the gradients of padding are zero at any scale: only the first rank overflows, and both reduce it
    assert _same(tmp_path / "one image", tmp_path / "one image, huge")
    assert max(_scales(tmp_path / "one image, huge")) < HUGE.value


@pytest.mark.slow
@pytest.mark.parametrize("module", ["training", "cluster"])
def test_fp16__refused_on_a_cpu_before_anything_is_read(tmp_path: Path, module: str) -> None:
    nowhere = recipe(tmp_path, str(tmp_path / "absent"), str(tmp_path / "run"))
    flags = ("--optimisation.precision", "fp16", "--engine.device", "cpu")
    code, output, errors = finished(command(module, "pretrain", str(nowhere), *flags))
    assert code == 1 and "Traceback" not in errors
    assert "fp16 needs a GPU" in errors and "optimisation.precision" in errors and "absent" not in errors
    assert not (tmp_path / "run").exists()


def test_fp16__refused_for_a_cpu_alone(path: Path) -> None:
    config = recipes.load(path, ["--optimisation.precision", "fp16"])
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        refuse_unsuited(config, torch.device("cpu"))
    refuse_unsuited(config, torch.device("cuda"))


@pytest.mark.slow
@pytest.mark.skipif(not torch.cuda.is_available(), reason="GPU absent: float16 autocast with loss scaling")
@pytest.mark.parametrize("stepper", ["plain", "deepspeed"])
def test_fp16__trains_like_float32_on_a_gpu(path: Path, tmp_path: Path, stepper: str) -> None:
    found = {}
    for precision in ("fp32", "fp16"):
        run = tmp_path / precision
        flags = ["--out", str(run), "--engine.stepper", stepper, "--engine.device", "cuda"]
        config = recipes.load(path, [*flags, "--optimisation.precision", precision])
        with alone("cuda", group=stepper == "deepspeed") as world:
            assert pretrain(config, world=world, host=LocalHost()).complete
        found[precision] = final_state(run)
        assert {value.dtype for value in found[precision].values() if value.is_floating_point()} == {torch.float32}
    assert len(_scales(tmp_path / "fp16")) == STEPS and 1 <= _final_scale(tmp_path / "fp16")["value"] <= 2.0**16
    for name, value in found["fp32"].items():
        if name.startswith("model/student"):
            torch.testing.assert_close(found["fp16"][name], value, rtol=0.05, atol=0.01)
