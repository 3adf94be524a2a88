"""The calculated time of a step: beside rates that others measured, its launches counted, and how it follows the
recipe, the GPU and the number of ranks."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from tests.support.operations import Operations
from tests.training.tiny_recipe import tiny, with_views
from training.config.build import workload
from training.config.recipe_toml import load
from training.config.run_config import RunConfig
from training.config.run_plan import clock_of
from training.nn import distillation_losses
from training.nn.vision_transformer import BackboneConfig
from training.nn.workload import Stack
from training.preflight.calculated import gpus
from training.preflight.calculated.communication import Traffic, traffic
from training.preflight.calculated.computation import LAUNCHES_OF_CASTS, Computation, Part, pixels
from training.preflight.calculated.machine import BAD, GOOD, USUAL, Machine, Reached, machine_of
from training.preflight.calculated.memory import census
from training.preflight.calculated.operations import flops_of_image
from training.preflight.calculated.step_time import Share, StepTime, forecast, step_time
from training.preflight.dry_run import dry_run

FORWARD = {
    ("GeForce RTX 3090", False): (10_231.54, 4_584.86, 1_570.66, 486.7),
    ("GeForce RTX 4090", False): (18_553.34, 8_214.74, 2_992.79, 954.12),
    ("GeForce RTX 4090", True): (23_698.81, 9_948.51, 3_375.59, 1_035.76),
    ("GeForce RTX 5090", False): (26_140.26, 10_972.65, 3_915.56, 1_108.08),
}
"""(GPU, compiled) -> images a second through ViT-T, S, B, L with patches of 16 at 224 x 224 under autocast: timm
`results/benchmark-infer-amp-nchw-pt240-cu124-rtx3090.csv`, `...-pt291-cu128-4090.csv`, `...-4090-dynamo.csv`,
`...-pt291-cu130-5090.csv`."""
TRAINING = {"GeForce RTX 3090": (2_293.54, 1_052.92, 390.86, 117.08)}
"""With the backward pass: timm `results/benchmark-train-amp-nchw-pt112-cu113-rtx3090.csv`, attention not fused."""
ARCHITECTURES = ("vit_tiny", "vit_small", "vit_base", "vit_large")
EIGHT = Share(8, 1, 12)


def rate(gpu: str, arch: Any, reached: Reached, *, trains: bool = False, compiled: bool = False) -> float:
    """Images a second through such a network alone, as calculated."""
    kind = gpus.named(gpu)
    assert kind is not None
    backbone = BackboneConfig(arch=arch, size=(224, 224), compile_blocks=compiled)
    config = replace(recipe("supervised", "fp16"), backbone=backbone)
    how = Computation(config, machine_of(kind, reached)._replace(fused=not trains), "fp32")
    stack = Stack(256, (224, 224), 196, 197)
    part = how.stack(stack, learns=False)
    if trains:
        part = part + how.embedding(stack, 1) + how.block(stack, 1, drops=False).times(backbone.shape.depth)
    return stack.rows / part.seconds


def recipe(name: str, precision: Any = "bf16", **optimisation: Any) -> RunConfig:
    config = load(name)
    return replace(config, optimisation=replace(config.optimisation, precision=precision, **optimisation),
                   backbone=replace(config.backbone, compile_blocks=False))  # fmt: skip


@pytest.mark.parametrize(("gpu", "compiled"), FORWARD)
def test_forward__beside_published_rates(gpu: str, compiled: bool) -> None:
    """GeForce cards run above the clock of their datasheet."""
    for arch, measured in zip(ARCHITECTURES, FORWARD[gpu, compiled], strict=True):
        assert 0.75 < rate(gpu, arch, USUAL, compiled=compiled) / measured < 1.06
        assert rate(gpu, arch, BAD, compiled=compiled) < measured
        assert rate(gpu, arch, GOOD, compiled=compiled) > 0.94 * measured


def test_training__beside_published_rates() -> None:
    for arch, measured in zip(ARCHITECTURES, TRAINING["GeForce RTX 3090"], strict=True):
        found = rate("GeForce RTX 3090", arch, USUAL, trains=True) / measured
        assert 0.95 < found < (1.4 if arch == "vit_tiny" else 1.15), (arch, found)


def in_one(values: Tensor) -> Iterator[tuple[slice, slice]]:
    """All views and images at a time, as on a GPU."""
    yield slice(None), slice(None)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["pass_vits", "dino_vits", "personvit_vits", "personmae_vits"])
def test_launches__are_about_those_of_a_real_step(name: str, precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distillation_losses, "_stretches", in_one)
    config = tiny(name, images=2, precision=precision, attention="fused", compile_blocks=False)
    config = replace(config, backbone=replace(config.backbone, depth=4, drop_path=0.0))
    method, views = with_views(config)
    progress = clock_of(config, 1_000).at(0)
    with Operations() as forward:
        loss = method(views, progress).loss
    with Operations() as backward:
        loss.backward()
    counting = Machine("a host", dict.fromkeys(("fp32", "tf32", "bf16", "fp16"), 1e30), 1, 1e30, 1e30, 1.0, 1, 1, 1e30)  # type: ignore[arg-type]
    parts = step_time(config, census(config), counting, Share(1, 1, 1)).parts
    found = sum(parts[part].launch for part in ("teacher", "student", "heads, loss"))
    assert found == pytest.approx(forward.launched.total(), rel=0.25)
    assert parts["backward"].launch == pytest.approx(backward.launched.total(), rel=0.25)


@pytest.fixture(scope="module")
def sizes() -> Any:
    return census(load("pass_vits"))


def on(gpu: str, sizes: Any, config: RunConfig | None = None, share: Share = EIGHT) -> StepTime:
    kind = gpus.named(gpu)
    assert kind is not None
    return step_time(config or recipe("pass_vits"), sizes, machine_of(kind), share)


def test_step__of_pass_vits_on_eight_h100(sizes: Any) -> None:
    """Memory traffic bounds it: about a seventh of what the GPUs have."""
    found = on("h100", sizes)
    assert 0.05 < found.seconds < 0.11 and next(iter(found.limits())) == "memory traffic"
    assert found.flops == pytest.approx(1_024 * flops_of_image(recipe("pass_vits")))
    assert sum(found.limits().values()) == pytest.approx(found.seconds)
    assert sum(found.seconds_of().values()) == pytest.approx(found.seconds)
    names = ["data", "normalise", "teacher", "student", "heads, loss", "backward", "reduce", "after", "checkpoint"]
    assert list(found.seconds_of()) == names


def test_step__copies_to_a_gpu_go_beside_it_and_count_where_they_are_longer(sizes: Any) -> None:
    kind = gpus.named("h100")
    assert kind is not None
    machine = machine_of(kind)
    usual = on("h100", sizes)
    slow = machine._replace(host=1e6)
    found = step_time(recipe("pass_vits"), sizes, slow, EIGHT)
    assert found.seconds == found.data_s == 3 * pixels(recipe("pass_vits"), 128) / 1e6 > usual.seconds
    assert found.parts["normalise"] == usual.parts["normalise"]


def test_step__gradients_go_beside_the_backward_pass_of_gpus(sizes: Any) -> None:
    kind = gpus.named("h100")
    assert kind is not None
    machine, config, two = machine_of(kind), recipe("pass_vits"), Share(16, 2, 12)

    def reduce(stage: int, *, gbit_s: float, share: Share = two, bucket: int = 16_000_000, on: Any = machine) -> float:
        engine = replace(config.engine, zero_stage=stage, bucket=bucket)  # type: ignore[arg-type]
        found = step_time(replace(config, engine=engine), sizes, on._replace(network=gbit_s), share)
        return found.parts["reduce"].links

    def sent(stage: int, gbit_s: float) -> Any:
        found = traffic(trained=sizes.trained, parameters=sizes.parameters, stage=stage, reduction="fp32", ranks=16,
                        machines=2)  # fmt: skip
        return Traffic(found.gradients, 0).seconds(gbit_s), Traffic(0, found.parameters).seconds(gbit_s)

    for stage in (1, 2):
        gradients_s, parameters_s = sent(stage, 400.0)
        last_s = gradients_s * 16e6 / sizes.trained
        assert reduce(stage, gbit_s=400.0) == pytest.approx(last_s + parameters_s, rel=1e-6)
        assert reduce(stage, gbit_s=400.0, on=machine._replace(launch_s=0.0)) == pytest.approx(
            gradients_s + parameters_s, rel=1e-6)  # fmt: skip
    gradients_s, parameters_s = sent(1, 1.0)
    backward_s = step_time(config, sizes, machine, two).parts["backward"].seconds
    assert reduce(1, gbit_s=1.0) == pytest.approx(gradients_s - backward_s + parameters_s, rel=1e-6)
    assert reduce(3, gbit_s=400.0) < sum(sent(3, 400.0))


def test_step__faster_gpus_are_faster(sizes: Any) -> None:
    seconds = [on(gpu, sizes).seconds for gpu in ("l4", "a100", "h100", "b200")]
    assert seconds == sorted(seconds, reverse=True) and seconds[0] > 4 * seconds[2]


def test_step__float32_is_slower_and_bound_by_products(sizes: Any) -> None:
    full = on("a100", sizes, recipe("pass_vits", "fp32"))
    assert full.seconds > 3 * on("a100", sizes).seconds and next(iter(full.limits())) == "matrix products"


def test_step__compiled_blocks_move_and_launch_less(sizes: Any) -> None:
    config = recipe("pass_vits")
    compiled, auto = (
        replace(config, backbone=replace(config.backbone, compile_blocks=choice)) for choice in (True, "auto")
    )
    before, after = on("h100", sizes), on("h100", sizes, compiled)
    assert on("h100", sizes, auto) == after  # what is to be expected on GPUs
    assert after.parts["student"].memory < 0.9 * before.parts["student"].memory
    assert after.parts["student"].launch < 0.6 * before.parts["student"].launch
    assert after.parts["student"].products == before.parts["student"].products


def test_step__checkpointed_blocks_are_computed_again(sizes: Any) -> None:
    config = recipe("pass_vits")
    again = replace(config, backbone=replace(config.backbone, checkpoint_blocks=True))
    more = on("h100", sizes, again).seconds - on("h100", sizes).seconds
    assert 0.8 < more / on("h100", sizes).parts["student"].seconds < 1.1


def test_step__small_micro_batches_are_bound_by_launches(sizes: Any) -> None:
    """The host launches all of it again for each but casts of weights; the device has as much to do as before."""
    few = on("h100", sizes, recipe("pass_vits", micro_batch=8))
    whole = on("h100", sizes)
    assert next(iter(few.limits())) == "launches"
    casts_s = LAUNCHES_OF_CASTS * 12 * USUAL.launch_s
    each_s = whole.parts["student"].launch - casts_s
    assert few.parts["student"].launch == pytest.approx(16 * each_s + casts_s)
    assert few.parts["student"].products == pytest.approx(whole.parts["student"].products, rel=0.3)


def test_step__is_bound_by_data_where_cores_are_few(sizes: Any) -> None:
    few = on("h100", sizes, share=Share(8, 1, 1))
    assert few.seconds == few.data_s and next(iter(few.limits())) == "data"
    assert few.computing_s == on("h100", sizes).computing_s


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_reduce__is_what_is_sent_over_the_slower_link(stage: Any, sizes: Any) -> None:
    config = recipe("pass_vits")
    config = replace(config, engine=replace(config.engine, zero_stage=stage))
    h100 = gpus.named("h100")
    assert h100 is not None
    machine = machine_of(h100)._replace(launch_s=0.0)  # nothing is sent beside the computation
    for ranks, machines in ((8, 1), (32, 4)):
        sent = traffic(trained=sizes.trained, parameters=sizes.parameters, stage=stage, reduction="fp32", ranks=ranks,
                       machines=2, micro_batches=1)  # fmt: skip
        found = step_time(config, sizes, machine, Share(ranks, machines, 12)).parts["reduce"].seconds
        assert found == pytest.approx(sent.total / machine.link if machines == 1 else sent.seconds())
    assert step_time(config, sizes, machine, Share(1, 1, 12)).parts["reduce"].seconds == 0


def test_step__more_ranks_share_a_batch(sizes: Any) -> None:
    one, eight, many = (on("h100", sizes, share=Share(ranks, -(-ranks // 8), 12)) for ranks in (1, 8, 64))
    assert one.seconds > 6 * eight.seconds
    assert many.parts["backward"].seconds < 0.4 * eight.parts["backward"].seconds
    assert next(iter(many.limits())) == "communication and copies"  # 100 Gb/s for eight GPUs


def test_checkpoint__is_spread_over_the_steps_between_two(sizes: Any) -> None:
    config = recipe("pass_vits")
    often = replace(config, checkpoints=replace(config.checkpoints, every_steps=10))
    rarely = replace(config, checkpoints=replace(config.checkpoints, every_steps=1_000))
    costs = [on("h100", sizes, one).parts["checkpoint"].seconds for one in (often, rarely)]
    assert costs[0] == pytest.approx(100 * costs[1]) and costs[1] > 0


@pytest.mark.parametrize("name", [
    "dino_vits", "personvit_vits", "personmae_vits", "personmae_vitl", "supervised_pass", "usl_market"])  # fmt: skip
def test_forecast__of_every_method(name: str) -> None:
    config = dry_run(load(name)).config
    gpu, ranks = gpus.named("a100"), 1
    assert gpu is not None
    found = forecast(config, census(config), gpu, Share(ranks, 1, 12))
    assert found.least_s < found.usual.seconds < found.most_s < 4 * found.least_s
    assert found.mfu is not None and 0.02 < found.mfu < 0.7
    assert all(part.seconds >= 0 for part in found.usual.parts.values())
    assert workload(config, 1).products_complete


def test_part__is_the_slower_of_device_and_host_and_then_its_links() -> None:
    assert Part(1.0, 2.0, 2.5, 0.5).seconds == 3.5 and Part(1.0, 2.0, 4.0, 0.5).seconds == 4.5
    assert (Part(1, 2, 3, 4) + Part(1, 1, 1, 1)).times(2) == Part(4, 6, 8, 10)
