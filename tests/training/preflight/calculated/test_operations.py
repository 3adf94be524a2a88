"""Operations of an image beside what PyTorch's own counter finds in a step on tensors without memory."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from training import methods
from training.config.build import build_method, view_spec, workload
from training.config.recipe_toml import load
from training.config.run_config import RunConfig
from training.config.run_plan import clock_of
from training.preflight.calculated.operations import Operations, computed_of_image, flops_of_image, of_image, operations
from training.recipes import SHIPPED

WITHIN = 1e-3
IMAGES = 20
"""Of which a whole number of patches is hidden by every law."""
GFLOP = {
    "dino_vits": 82.582, "pass_vits": 91.615, "pass_vitb": 347.18, "pass_vitl": 1215.2, "personvit_vits": 86.377,
    "personvit_vitb": 323.08, "personmae_vits": 22.768, "personmae_vitb": 65.590, "personmae_vitl": 179.54,
}  # fmt: skip
"""Of an image of whole recipes, as PyTorch 2.15 counted them once."""


def counted(config: RunConfig, images: int = IMAGES) -> tuple[float, float]:
    """Operations of an image in (the forward pass, all of a step), as PyTorch counts them; nothing is dropped."""
    with torch.device("meta"):
        method = build_method(config)
    fake, clock = FakeTensorMode(allow_non_fake_inputs=True), clock_of(config, 10**7)
    position = torch.arange(images)
    with fake, FlopCounterMode(display=False) as counter:
        method = method.to_empty(device="cpu").train()
        loss = method({**views(config, images), "position": position}, clock.at(0)).loss
        forward = counter.get_total_flops()
        loss.backward()
    return forward / images, counter.get_total_flops() / images


def views(config: RunConfig, images: int) -> Any:
    """A micro-batch's views; as many patches are hidden as on average."""
    spec = view_spec(config)
    found = {}
    for group in spec.groups:
        count, _, height, width, channels = spec.shape(group, images)
        found[group.name] = torch.empty(count, images, channels, height, width)
    if spec.masks:
        grid, ratios = spec.masks[0].grid, spec.masks[0].config.ratios
        found["mask"] = torch.empty(len(spec.masks), images, *grid, dtype=torch.bool)
        hidden = len(spec.masks) * images * math.prod(grid) * sum(ratios) / len(ratios)
        found["hidden"] = torch.empty(round(hidden), dtype=torch.int64)
    if spec.boxed:
        found["boxes"] = torch.empty(spec.boxed, images, 5, dtype=torch.int64)
    labels = {name: torch.empty(images, dtype=torch.int64) for name in ("sample", "label", "camera")}
    return found | labels | {"weight": torch.empty(images)}


def recipe(name: str, **backbone: Any) -> RunConfig:
    """A shipped recipe without drop path and erasing; with `depth`, blocks of the same shape, but so many."""
    config = load(SHIPPED / f"{name}.toml")
    kind, method = methods.of(config.method), config.method
    if kind.by_identity(method) is not None:
        method = replace(kind.for_identities(method, 751), erase=0.0)
    if kind.by_cluster(method) is not None:
        method = replace(kind.for_images(method, 12_936), erase=0.0, norm_group=0)
    if "depth" in backbone:
        width, _, heads, _ = config.backbone.shape
        backbone = {"arch": "custom", "width": width, "heads": heads, **backbone}
    precision = replace(config.optimisation, precision="fp32")
    return replace(config, method=method, optimisation=precision,
                   backbone=replace(config.backbone, drop_path=0.0, **backbone))  # fmt: skip


def agrees(config: RunConfig) -> None:
    forward, total = counted(config)
    assert of_image(config).forward == pytest.approx(forward, rel=WITHIN)
    assert computed_of_image(config) == pytest.approx(total, rel=WITHIN)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(("name", "depth"), [
    ("dino_vitb", 1), ("pass_vitl", 1), ("personvit_vitb", 1), ("personmae_vits", 1), ("supervised_pass", 6),
    ("usl_market", 6)])  # fmt: skip
def test_operations__are_those_of_a_step(name: str, depth: int) -> None:
    """Few blocks, so that heads, decoders and the convolutional stem (`dino_vitb`) weigh more."""
    agrees(recipe(name, depth=depth))


@pytest.mark.parametrize("name", GFLOP)
def test_operations__of_whole_recipes(name: str) -> None:
    assert flops_of_image(recipe(name)) / 1e9 == pytest.approx(GFLOP[name], rel=WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize("layer_scale", [0.0, 1e-5])
def test_operations__of_checkpointed_blocks_are_computed_twice_and_count_once(layer_scale: float) -> None:
    config = recipe("supervised", depth=3, layer_scale=layer_scale)
    again = recipe("supervised", depth=3, layer_scale=layer_scale, checkpoint_blocks=True)
    assert flops_of_image(again) == flops_of_image(config) == computed_of_image(config)
    agrees(again)


@pytest.mark.slow
@pytest.mark.parametrize("changed", [{"patch_head": "separate", "patch_out_dim": 4_096, "locals": 0}])
def test_operations__of_other_heads(changed: dict[str, Any]) -> None:
    config = recipe("personvit_vits", depth=1)
    agrees(replace(config, method=replace(config.method, **changed)))


@pytest.mark.slow
@pytest.mark.parametrize("changed", [
    {"regions": "same", "loss_on": "masked"}, {"decoder_heads": 5, "pixel_width": 64, "decoder_depth": 3}])  # fmt: skip
def test_operations__of_other_decoders(changed: dict[str, Any]) -> None:
    config = recipe("personmae_vits", depth=1)
    agrees(replace(config, method=replace(config.method, **changed)))


def test_operations__are_proportional_to_images() -> None:
    config = recipe("personvit_vitb")
    one, many = (operations(workload(config, images), config.backbone) for images in (100, 300))
    assert Operations(*(3 * part for part in one)) == pytest.approx(many, rel=1e-9)


def test_operations__of_a_method_that_says_nothing_are_known_from_below() -> None:
    """The default of `Method.workload`: the student's backbone over every view."""
    config = recipe("dino_vits")
    kind = methods.of(config.method)
    work = super(kind, kind).workload(config.method, config.views, config.backbone, IMAGES)
    found = operations(work, config.backbone)
    assert not work.products_complete and found.teacher == found.heads == 0
    assert found.student == operations(workload(config, IMAGES), config.backbone).student
