"""The calculated activations beside the tensors that autograd really saves."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.training.tiny_recipe import tiny, with_views
from training.config.build import workload
from training.config.run_config import RunConfig
from training.config.run_plan import clock_of
from training.preflight.calculated import memory
from training.preflight.calculated.activation_memory import numerics, saved

RECIPES = ("dino_vits", "dino_vitb", "pass_vits", "personvit_vits", "personmae_vits")
WITHIN = 0.01


def without_drop_path(config: RunConfig) -> RunConfig:
    """Every branch computed for every image: what drop path spares depends on what it draws."""
    return replace(config, backbone=replace(config.backbone, drop_path=0.0))


def really_saved(config: RunConfig) -> tuple[int, int]:
    """(bytes of all storages that autograd keeps, but for parameters, buffers and batch; patches hidden in fact)."""
    method, views = with_views(config)
    held: list[Tensor] = [*method.parameters(), *method.buffers(), *views.values()]  # type: ignore[list-item]
    others = {tensor.untyped_storage().data_ptr() for tensor in held}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        address = tensor.untyped_storage().data_ptr()
        if address not in others:
            found[address] = tensor  # kept alive, so that no other tensor gets the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        method(views, clock_of(config, 100).at(0))
    hidden = int(views["mask"].sum()) if config.method.name == "personvit" else 0
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values()), hidden


def calculated(config: RunConfig, hidden: int) -> int:
    how = numerics(config, cuda=False)
    work = workload(config, config.optimisation.batch)
    if hidden:  # in fact, not on the average
        cls_rows, patches = work.scored
        work = work._replace(scored=(cls_rows, patches._replace(student=hidden, targets=hidden)))
    parts = saved(config, config.optimisation.batch, how, work)
    sizes = memory.census(config)
    if config.backbone.checkpoint_blocks:  # autocast keeps the lowered weights of blocks there, autograd does not
        sizes = replace(sizes, lowered_blocks=0)
    return sum(parts.values()) + memory.lowered_copies(sizes, how)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoint_blocks", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("attention", ["plain", "fused"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_saved__is_what_autograd_keeps(recipe: str, precision: str, attention: str, checkpoint_blocks: bool) -> None:
    config = tiny(recipe, images=5, precision=precision, attention=attention, checkpoint_blocks=checkpoint_blocks)
    whole = without_drop_path(config)
    real, hidden = really_saved(whole)
    assert calculated(whole, hidden) == pytest.approx(real, rel=WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["dino_vits", "personvit_vits"])
def test_saved__less_where_drop_path_spares_branches(recipe: str) -> None:
    config = tiny(recipe, images=64, drop_path=0.4)
    real, hidden = really_saved(config)
    assert calculated(config, hidden) == pytest.approx(real, rel=2 * WITHIN)
    compiled = replace(config, backbone=replace(config.backbone, compile_blocks=True))
    assert calculated(compiled, hidden) == calculated(without_drop_path(config), hidden) > 1.1 * real


@pytest.mark.parametrize("recipe", ["pass_vits", "personmae_vits"])
def test_saved__one_image(recipe: str) -> None:
    config = without_drop_path(tiny(recipe, images=1, attention="plain", checkpoint_blocks=True))
    real, hidden = really_saved(config)
    assert calculated(config, hidden) == pytest.approx(real, rel=WITHIN)


def test_saved__layer_scale_keeps_what_it_multiplies() -> None:
    config = without_drop_path(tiny("dino_vits", images=5, attention="plain", layer_scale=1e-5))
    real, hidden = really_saved(config)
    assert calculated(config, hidden) == pytest.approx(real, rel=WITHIN)


@pytest.mark.parametrize("change", [
    {"regions": "same", "loss_on": "all"}, {"regions": "same", "loss_on": "masked"}, {"decoder_heads": 4},
], ids=["same_region", "masked_patches", "own_heads"])  # fmt: skip
def test_saved__personmae_otherwise(change: dict) -> None:
    config = without_drop_path(tiny("personmae_vits", images=5, attention="plain"))
    config = replace(config, method=replace(config.method, **change))
    real, hidden = really_saved(config)
    assert calculated(config, hidden) == pytest.approx(real, rel=WITHIN)


def test_saved__grows_with_every_image() -> None:
    config = tiny("pass_vits", images=4)
    how = numerics(config, cuda=True)
    one, two, four = (sum(saved(config, images, how).values()) for images in (1, 2, 4))
    assert four - two == pytest.approx(2 * (two - one), abs=4) and two > one  # what drop path spares is rounded
