"""Activation checkpointing and torch.compile act block by block and change no result, with drop path on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from datapipe.core.errors import ConfigError
from tests.end_to_end.tiny import final_state, recipe, shards, step_records
from tests.support.ranks import run_ranks
from training.config import recipe_toml as recipes
from training.core.host import LocalHost
from training.core.world import World
from training.nn.drop_path import draw_path_masks
from training.nn.vision_transformer import BackboneConfig, VisionTransformer
from training.preflight.checks import refuse_unsuited
from training.trainer.pretrain import pretrain

PLAIN = ("--engine.stepper", "plain", "--optimisation.micro-batch", "3")
STAGES = [("--engine.stepper", "deepspeed", "--engine.zero-stage", str(stage)) for stage in range(4)]
CHECKPOINTED, COMPILED = ("--backbone.checkpoint-blocks", "True"), ("--backbone.compile-blocks", "True")
RUNS: dict[str, tuple[str, ...]] = {
    "plain": PLAIN,
    "plain, checkpointed": (*PLAIN, *CHECKPOINTED),
    "plain, compiled": (*PLAIN, *COMPILED),
    "stage 0, compiled": (*STAGES[0], *COMPILED),
    "stage 1, checkpointed": (*STAGES[1], *CHECKPOINTED),
    "stage 1, compiled": (*STAGES[1], *COMPILED),
    "stage 2, both": (*STAGES[2], *CHECKPOINTED, *COMPILED),
    "stage 3, checkpointed": (*STAGES[3], *CHECKPOINTED),
}
STEPS = 4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, write_crops: Callable[..., dict[str, bytes]]) -> Path:
    folder = tmp_path_factory.mktemp("blocks")
    write_crops(folder / "crops", 6 * STEPS)
    return recipe(folder, shards(folder / "crops", str(folder / "shards")).url, "unused")


def _all(world: World, path: str, folder: str) -> tuple[dict[str, int], float]:
    """How many graphs were compiled in all after each run; how far compiled blocks are off on visible patches alone."""
    graphs = {}
    for name, flags in RUNS.items():
        pretrain(recipes.load(path, ["--out", f"{folder}/{name}", *flags]), world=world, host=LocalHost())
        graphs[name] = _compiled_so_far()
    difference = _of_visible_patches(recipes.load(path).backbone)
    graphs["visible patches"] = _compiled_so_far()
    return graphs, difference


def _compiled_so_far() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _of_visible_patches(config: BackboneConfig) -> float:
    """Largest difference between a backbone's gradients and those of its compiled twin, patches dropped in front."""
    torch.manual_seed(0)
    plain = VisionTransformer(config)
    compiled = VisionTransformer(replace(config, compile_blocks=True))
    compiled.load_state_dict(plain.state_dict())
    images, visible = torch.randn(5, 3, *config.size), torch.tensor([[0, 5, 6]]).expand(5, -1)
    path_masks = draw_path_masks(config.drop_rates, seed=0, purpose="x", position=torch.arange(5), views=1)
    for backbone in (plain, compiled):
        backbone(images, visible=visible, path_masks=path_masks).cls.sin().sum().backward()
    pairs = zip(plain.parameters(), compiled.parameters(), strict=True)
    return max(float((one.grad - other.grad).abs().max() / one.grad.abs().max()) for one, other in pairs)


def _losses(run: Path) -> torch.Tensor:
    return torch.tensor([record["loss"] for record in step_records(run)], dtype=torch.float64)


@pytest.mark.slow
def test_blocks__checkpointed_and_compiled_give_the_same_losses_under_every_engine(path: Path, tmp_path: Path) -> None:
    [(graphs, of_visible_patches)] = run_ranks(1, _all, str(path), str(tmp_path))
    assert of_visible_patches < 1e-5
    # the student's blocks and the teacher's, and the student's once more where rows and tokens are equally many by
    # chance: not one graph for each step, size of view, number of blocks, or engine
    assert graphs["plain, checkpointed"] == 0 and max(graphs.values()) <= 3
    wanted, names = _losses(tmp_path / "plain"), final_state(tmp_path / "plain").keys()
    assert len(wanted.unique()) == STEPS
    for run in RUNS:
        assert (_losses(tmp_path / run) - wanted).abs().max() < 1e-5, run
        assert final_state(tmp_path / run).keys() == names, run


@pytest.mark.slow
def test_compiled_blocks__refused_where_parameters_are_split(path: Path) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"compile_blocks.*zero_stage"):
        refuse_unsuited(recipes.load(path, [*STAGES[3], *COMPILED]), cpu)
    for flags in RUNS.values():
        refuse_unsuited(recipes.load(path, flags), cpu)
