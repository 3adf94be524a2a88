"""Whole training trajectories of the references, through the Method, loop and steppers that users run."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.golden import group
from tests.ranks import run_ranks
from tests.trajectory import Trajectory, batches_of, pass_trajectory, run_trajectory
from training.engine.world import World

VARIANTS = [("", True), ("stored_pos/", False)]
"""(prefix in the golden file, is the position table resized at native size?)"""


def _largest_relative(ours: list[float], theirs: Tensor) -> float:
    return float(((torch.tensor(ours, dtype=torch.float64) - theirs) / theirs).abs().max())


def _key_bias_masked(name: str, value: Tensor) -> Tensor:
    """The key third of attn.qkv.bias has a zero gradient; AdamW turns its round-off into steps (golden/README.md)."""
    if not name.endswith("attn.qkv.bias"):
        return value
    third = len(value) // 3
    return torch.cat([value[:third], value[2 * third :]])


def _largest_state_difference(found: Trajectory, network: str, theirs: dict[str, Tensor], mask: bool) -> float:
    differences = []
    for name, value in theirs.items():
        ours = found.state[f"{network}.{name}"].double()
        pair = (ours, value.double())
        if mask:
            pair = (_key_bias_masked(name, pair[0]), _key_bias_masked(name, pair[1]))
        differences.append(float((pair[0] - pair[1]).abs().max()))
    return max(differences)


@pytest.mark.parametrize(("prefix", "native_resize"), VARIANTS)
def test_train_pass__float64_plain(prefix: str, native_resize: bool) -> None:
    about, tensors, make = pass_trajectory("train_pass", native_resize=native_resize)
    setting = about["hyper_parameters"]
    found = run_trajectory(World(), make, setting, batches_of(setting, tensors), dtype=torch.float64)
    assert _largest_relative(found.losses, tensors[f"{prefix}f64/loss"]) < 1e-8
    for network in ("student", "teacher"):
        final = group(tensors, f"{prefix}final_{network}/")
        assert final
        assert _largest_state_difference(found, network, final, mask=False) < 1e-6
    for name, centre in group(tensors, f"{prefix}f64/final_center/center_").items():
        assert (found.state[f"centre_{name}"].double() - centre).abs().max() < 1e-8
    _check_norms(found, setting, tensors[f"{prefix}f64/grad_norms"], 1e-6)


def _check_norms(found: Trajectory, setting: dict[str, Any], theirs: Tensor, tolerance: float) -> None:
    order = [found.names.index(f"student.{name}") for name in setting["trainable_parameters"]]
    ours = torch.stack(found.norms)[:, order]
    # norms that are mathematically zero (key third alone never is a whole tensor) do not occur
    assert ((ours - theirs).abs() / theirs.abs().clamp(min=1e-6)).max() < tolerance


def test_train_pass__rehearsal_leaves_no_trace() -> None:
    about, tensors, make = pass_trajectory("train_pass", native_resize=False)
    setting = about["hyper_parameters"]
    batches = batches_of(setting, tensors)
    plain = run_trajectory(World(), make, setting, batches, dtype=torch.float64)
    rehearsed = run_trajectory(World(), make, setting, batches, dtype=torch.float64, rehearsal=True)
    assert plain.losses == rehearsed.losses
    assert all(torch.equal(value, rehearsed.state[name]) for name, value in plain.state.items())


def test_train_pass__accumulation_changes_only_rounding() -> None:
    about, tensors, make = pass_trajectory("train_pass", native_resize=False)
    setting = about["hyper_parameters"]
    found = run_trajectory(
        World(), make, setting, batches_of(setting, tensors), dtype=torch.float64, micro_batch=1
    )
    assert _largest_relative(found.losses, tensors["stored_pos/f64/loss"]) < 1e-8


def _all_stages(
    world: World, stages: list[int | None], micro_batch: int | None
) -> dict[str, tuple[list[float], float]]:
    """In one rank: losses and final state differences of every stage, with and without a rehearsal in front."""
    about, tensors, make = pass_trajectory("train_pass", native_resize=False)
    setting = about["hyper_parameters"]
    results = {}
    for stage in stages:
        for rehearsal in (False, True):
            found = run_trajectory(
                world, make, setting, batches_of(setting, tensors), zero_stage=stage, rehearsal=rehearsal,
                dtype=torch.float32 if stage is not None else torch.float64, micro_batch=micro_batch,
            )  # fmt: skip
            states = max(
                _largest_state_difference(found, network, group(tensors, f"stored_pos/final_{network}/"), mask=True)
                for network in ("student", "teacher")
            )
            results[f"{stage} {rehearsal}"] = (found.losses, states)
    return results


@pytest.mark.slow
@pytest.mark.parametrize(("world", "micro_batch"), [(1, None), (1, 2), (2, 1), (3, None)])
def test_train_pass__deepspeed(world: int, micro_batch: int | None) -> None:
    """ZeRO 0, 1, 2 in float32, and the plain stepper in float64, on real processes; three ranks need padding."""
    _, tensors, _ = pass_trajectory("train_pass", native_resize=False)
    for results in run_ranks(world, _all_stages, [None, 0, 1, 2], micro_batch):
        for name, (losses, states) in results.items():
            plain = name.startswith("None")
            wanted = tensors[f"stored_pos/{'f64' if plain else 'f32'}/loss"]
            assert _largest_relative(losses, wanted) < (1e-8 if plain else 2e-6), name
            assert states < (1e-6 if plain else 1e-5), name
