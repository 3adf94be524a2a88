import dataclasses
import math
import pickle
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from datapipe.core.config import ViewConfig
from datapipe.core.errors import ConfigError
from datapipe.views.masking import draw_masks
from tests.support.ranks import run_ranks
from tests.support.trajectory import run_trajectory
from tests.training.methods.batches import gradients, same_images, taken_apart
from training.core.world import World
from training.engine import ema
from training.methods import build, known
from training.methods.base import Method, TrainingProgress, Views
from training.methods.personmae import PersonMae, PersonMaeConfig
from training.nn.positions import grid, sincos
from training.nn.vision_transformer import BackboneConfig, VisionTransformer

START = TrainingProgress(samples=0, step=0, epoch=0, fraction=0.0, total_steps=40, epoch_steps=5.0, seed=3)
"""Of 8 epochs: the feature loss grows over 2."""
TINY: dict[str, Any] = {"arch": "custom", "size": (32, 16), "patch": 4, "width": 12, "depth": 3, "heads": 3}
SMALL: dict[str, Any] = {"pixel_width": 16, "decoder_heads": 2, "decoder_depth": 1}
SAME: dict[str, Any] = {"regions": "same", "loss_on": "masked"}
BOXES = [[(5, 3, 60, 30, 0), (0, 0, 50, 25, 1), (8, 8, 44, 40, 1), (1, 2, 80, 33, 0)],
         [(0, 8, 70, 28, 0), (9, 4, 30, 20, 1), (8, 8, 44, 40, 1), (40, 9, 33, 20, 0)]]  # fmt: skip


def method(drop_path: float = 0.0, **changes: Any) -> PersonMae:
    """A tiny PersonMAE in float64 whose teacher has already left the student."""
    torch.manual_seed(0)
    backbone = BackboneConfig(**TINY, init_std=0.3, drop_path=drop_path)
    made = PersonMae(PersonMaeConfig(**{**SMALL, **changes}), backbone).double()
    with torch.no_grad():
        for parameter in made.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def batch(made: PersonMae, images: int = 4, dtype: torch.dtype = torch.float64) -> Views:
    generator = torch.Generator().manual_seed(1)
    law = made.config.law(made.student.backbone.config)
    return {
        "region_a": torch.randn(1, images, 3, 32, 16, dtype=dtype, generator=generator),
        "region_b": torch.randn(1, images, 3, 32, 16, dtype=dtype, generator=generator),
        "mask": torch.from_numpy(draw_masks((law,), 7, np.arange(images))),
        "boxes": torch.tensor(BOXES)[:, :images],
        "weight": torch.full((images,), 1 / images, dtype=torch.float64),
        "position": torch.arange(images) + 100,
        "sample": torch.arange(images),
    }


def standard(values: list[float], correction: int, eps: float) -> list[float]:
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - correction)
    return [(value - mean) / math.sqrt(variance + eps) for value in values]


def naive_places(box_a: list[int], box_b: list[int]) -> list[tuple[float, float]]:
    """Centres of B's 8 x 4 patches, by way of the source image, in patches of A."""
    found = []
    for row in range(8):
        for column in range(4):
            across = (column + 0.5) / 4
            x = box_b[1] + box_b[3] * (1 - across if box_b[4] else across)
            right = (x - box_a[1]) / box_a[3]
            y = (box_b[0] + box_b[2] * (row + 0.5) / 8 - box_a[0]) / box_a[2]
            found.append((8 * y - 0.5, 4 * (1 - right if box_a[4] else right) - 0.5))
    return found


def naive_losses(made: PersonMae, views: Views, image: int) -> tuple[float, float]:
    """The two terms as the docstrings have them: one image, one patch at a time."""
    encoder, mask = made.student.backbone, views["mask"][0, image].flatten().tolist()
    visible = [patch for patch, hidden in enumerate(mask) if not hidden]
    tokens = encoder.patch_embed(views["region_a"][0, image][None]) + encoder.patch_positions(8, 4)
    tokens = torch.cat([encoder._prefix(None, 1), torch.stack([tokens[:, patch] for patch in visible], dim=1)], dim=1)
    memories = []
    for block in encoder.blocks:
        tokens = block(tokens)
        memories.append(tokens)
    seen, target = encoder.norm(tokens), views["region_b"][0, image]
    places = target.new_tensor([naive_places(*views["boxes"][:, image].tolist())])
    told: dict[str, Tensor] = {}
    for name, memory in (("pixel", memories[0]), ("feature", memories[-1])):
        decoder = made.student.head.get_submodule(name)
        told[name] = decoder.predict(decoder(seen, memory, places)[:, seen.shape[1] :])[0]
    taught, _ = made.teacher.backbone.embed(target[None], part=None)
    for block in made.teacher.backbone.blocks:
        taught = block(taught)
    pixel = feature = 0.0
    for patch in range(32):
        top, left = 4 * (patch // 4), 4 * (patch % 4)
        piece = target[:, top : top + 4, left : left + 4]
        wanted = torch.stack([target.new_tensor(standard(channel.flatten().tolist(), 0, 1e-5)) for channel in piece])
        pixel += float((told["pixel"][patch] - wanted.T.flatten()).square().mean()) / 32
        ours, theirs = (standard(row.tolist(), 0, 1e-6) for row in (told["feature"][patch], taught[0, 1 + patch]))
        feature += sum((a - b) ** 2 for a, b in zip(ours, theirs, strict=True)) / 12 / 32
    return pixel, feature


@torch.no_grad()
def test_loss__equals_naive_loops() -> None:
    made = method(feature_weight=0.7, pixel_norm="bootmae")
    views = batch(made, 2)
    terms = [naive_losses(made, views, image) for image in range(2)]
    for epoch, growth in ((0, 0.5), (1, 1.0), (5, 1.0)):
        outcome = made(views, START._replace(epoch=epoch))
        expected = sum(pixel + 0.7 * growth * feature for pixel, feature in terms) / 2
        assert float(outcome.loss) == pytest.approx(expected, rel=1e-9)
        assert outcome.metrics["loss_pixel"].tolist() == pytest.approx([pixel for pixel, _ in terms], rel=1e-9)
        assert outcome.metrics["loss_feature"].tolist() == pytest.approx([feature for _, feature in terms], rel=1e-9)


@torch.no_grad()
def test_hidden_patches__do_not_reach_the_loss_unless_they_are_in_b() -> None:
    for changes, hidden_counts, visible_counts in (({}, False, True), (SAME, True, True)):
        made = method(**changes)
        views = batch(made)
        whole = float(made(views, START).loss)
        pixels = views["mask"][0].repeat_interleave(4, dim=1).repeat_interleave(4, dim=2)[None, :, None]
        for where, counts in ((pixels, hidden_counts), (~pixels, visible_counts)):
            other = made(views | {"region_a": views["region_a"] + where * 0.5 * views["region_b"]}, START)
            assert (float(other.loss) != whole) == counts


@torch.no_grad()
def test_two_equal_regions__are_told_the_plain_positions() -> None:
    made = method()
    views = batch(made) | {"boxes": torch.tensor([BOXES[0], BOXES[0]])}
    asked = made._queries(views, views["mask"][0].flatten(1).to(torch.int8).argsort(dim=1, stable=True))
    torch.testing.assert_close(asked.places_BQ2, grid(8, 4).expand(4, -1, -1))
    moved = made._queries(batch(made), views["mask"][0].flatten(1).long()).places_BQ2
    wanted = torch.tensor([naive_places(list(a), list(b)) for a, b in zip(*BOXES, strict=True)], dtype=torch.float64)
    torch.testing.assert_close(moved, wanted)


@torch.no_grad()
def test_one_region__all_patches_or_only_the_hidden_ones() -> None:
    hidden, everything = method(**SAME), method(regions="same")
    views = batch(hidden)
    one, all_ = hidden(views, START), everything(views, START)
    assert float(one.loss) != float(all_.loss)
    assert set(views) > {"region_a", "mask", "weight", "position"}
    needed = {name: views[name] for name in ("region_a", "mask", "weight", "position")}  # type: ignore[literal-required]
    assert float(hidden(needed, START).loss) == float(one.loss)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.0, 0.5, 0.75])
def test_encoder__cost_falls_with_the_mask_ratio(ratio: float) -> None:
    """Products counted in the blocks: linear in the tokens but for attention, so somewhat less than the share kept."""
    backbone = BackboneConfig(arch="custom", size=(128, 64), patch=8, width=48, depth=2, heads=3)
    encoder = VisionTransformer(backbone)
    patches = 16 * 8
    kept = PersonMae(PersonMaeConfig(mask_ratio=ratio, pixel_width=16), backbone).kept
    assert kept == patches - int(ratio * patches)
    tokens, _ = encoder.embed(torch.randn(2, 3, 128, 64), part=None, visible=torch.arange(kept).expand(2, -1))
    assert tokens.shape == (2, 1 + kept, 48)
    with FlopCounterMode(display=False) as counter:
        deque(encoder.outputs(tokens), maxlen=0)
    T, C = 1 + kept, 48
    linear, attention = 2 * 12 * T * C * C, 2 * 2 * T * T * C
    assert counter.get_total_flops() == 2 * 2 * (linear + attention)  # images, blocks
    share = counter.get_total_flops() / (4 * (2 * 12 * 129 * C * C + 4 * 129 * 129 * C))
    assert share <= T / 129 and share == pytest.approx({0.0: 1.0, 0.5: 0.42, 0.75: 0.18}[ratio], abs=0.02)


@torch.no_grad()
def test_encoder__dropping_nothing_changes_nothing() -> None:
    encoder = method().student.backbone
    images = torch.randn(2, 3, 32, 16, dtype=torch.float64)
    torch.testing.assert_close(encoder(images, visible=torch.arange(32).expand(2, -1)), encoder(images))
    shuffled = encoder(images, visible=torch.arange(32).flip(0).expand(2, -1))
    torch.testing.assert_close(shuffled.cls, encoder(images).cls)
    torch.testing.assert_close(shuffled.patches.flip(1), encoder(images).patches)


@pytest.mark.parametrize("changes", [{}, SAME, {**SAME, "weigh_centres": True}, {"regions": "same"}])
@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_micro_batches_and_padding__loss_and_gradients_add_up(changes: dict[str, Any], drop_path: float) -> None:
    made = method(drop_path, **changes)
    views = batch(made)
    whole, parts = taken_apart(made, views, START)
    for name, metric in whole.metrics.items():
        assert metric.shape == (4,), name
        if name.startswith("loss"):  # the others compare images
            same_images(whole, parts, name)


@torch.no_grad()
def test_drop_path__in_the_student_only_and_by_position() -> None:
    none, some = method(0.0), method(0.9)
    views = batch(none)
    assert float(none(views, START).loss) != float(some(views, START).loss)
    assert float(some(views, START).loss) == float(some(views, START._replace(step=5)).loss)
    assert float(some(views, START).loss) != float(some(views, START._replace(seed=4)).loss)
    assert torch.equal(none(views, START).metrics["feature_cosine"], some(views, START).metrics["feature_cosine"])


def test_checkpointed_blocks__change_nothing() -> None:
    plain, frugal = method(0.5), method(0.5)
    frugal.student.backbone.config = dataclasses.replace(frugal.student.backbone.config, checkpoint_blocks=True)
    for made in (plain, frugal):
        made(batch(made), START).loss.backward()
    expected = gradients(plain)
    for name, value in gradients(frugal).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-15)


def test_float64__from_end_to_end() -> None:
    for changes in ({}, {**SAME, "weigh_centres": True}, {"positions": "learned", "pixel_norm": "none"}):
        made = method(0.3, **changes)
        outcome = made(batch(made), START)
        outcome.loss.backward()
        everything = [outcome.loss, *outcome.metrics.values(), *gradients(made).values()]
        assert {value.dtype for value in everything} == {torch.float64} and outcome.sums == {}


def test_bf16__loss_and_gradients_stay_float32() -> None:
    made = method().float()
    views = batch(made, dtype=torch.float32)
    full = made(views, START).loss.detach()
    made.precision = "bf16"
    outcome = made(views, START)
    outcome.loss.backward()
    everything = [outcome.loss, *outcome.metrics.values(), *gradients(made).values()]
    assert {value.dtype for value in everything} == {torch.float32}
    assert 0 < abs(float((outcome.loss - full).detach())) < 0.05 * float(full)


def test_roles__of_the_student_only() -> None:
    made = method()
    roles = made.roles()
    assert list(roles) == [name for name, value in made.named_parameters() if value.requires_grad]
    assert gradients_of(made) == roles.keys()
    assert all(name.startswith("student.") for name in roles)
    assert (
        "student.backbone.pos_embed" not in roles
        and "student.backbone.pos_embed" in method(positions="learned").roles()
    )
    assert not roles["student.backbone.cls_token"].decay and roles["student.head.pixel.mask_token"].decay
    assert not roles["student.head.feature.predict.bias"].decay and not roles["student.backbone.norm.weight"].decay
    assert roles["student.backbone.blocks.1.attn.qkv.weight"].depth == 2
    assert roles["student.backbone.patch_embed.proj.weight"].depth == 0
    assert roles["student.head.pixel.blocks.0.cross.query.weight"].depth == 4
    assert {role.release_epoch for role in roles.values()} == {0}


def gradients_of(made: PersonMae) -> set[str]:
    made(batch(made), START).loss.backward()
    return set(gradients(made))


def test_positions__fixed_sincos_in_student_and_teacher() -> None:
    for made in (method(), known()["personmae"](PersonMaeConfig(**SMALL), BackboneConfig(**TINY))):
        table = made.student.backbone.pos_embed[0]
        torch.testing.assert_close(table[1:].double(), sincos(grid(8, 4), 12), atol=1e-6, rtol=0)
        assert not table[0].any() and not table.requires_grad


def test_teacher__starts_as_the_encoder_follows_it_and_the_student_is_evaluated() -> None:
    torch.manual_seed(0)
    made = build(PersonMaeConfig(**SMALL), BackboneConfig(**TINY))
    assert isinstance(made, known()["personmae"])
    student, teacher = dict(made.student.named_parameters()), dict(made.teacher.named_parameters())
    assert all(torch.equal(student[name], value) for name, value in teacher.items())
    assert not any(value.requires_grad for value in made.teacher.parameters())
    assert made.backbone() is made.student.backbone and not made.couples_batch()
    with torch.no_grad():
        made.student.backbone.norm.bias.add_(1.0)
    ema.update(student, teacher, 0.75)
    assert torch.equal(teacher["backbone.norm.bias"], torch.full((12,), 0.25))


@pytest.mark.parametrize(("size", "patch"), [((24, 8), 4), ((16, 24), 4), ((32, 16), 8), ((18, 6), 3)])
def test_any_rectangle(size: tuple[int, int], patch: int) -> None:
    config = PersonMaeConfig(**SMALL)
    backbone = BackboneConfig(**{**TINY, "size": size, "patch": patch})
    made = PersonMae(config, backbone)
    spec = PersonMae.views(config, ViewConfig(), backbone)
    views: Views = {
        "region_a": torch.randn(1, 2, 3, *size),
        "region_b": torch.randn(1, 2, 3, *size),
        "mask": torch.from_numpy(draw_masks(spec.masks, 0, np.arange(2))),
        "boxes": torch.tensor([[(0, 0, 9, 9, 0)] * 2, [(0, 0, 5, 9, 1)] * 2]),
        "weight": torch.full((2,), 0.5),
        "position": torch.arange(2),
    }
    assert made(views, START).loss.isfinite()


def test_views__two_regions_with_boxes_and_a_mask_of_equal_counts() -> None:
    backbone = BackboneConfig(size=(256, 128))
    spec = pickle.loads(pickle.dumps(PersonMae.views(PersonMaeConfig(), ViewConfig(flip=0.3), backbone)))
    assert [(group.name, group.size, group.flip) for group in spec.groups] == [
        ("region_a", (256, 128), 0.3), ("region_b", (256, 128), 0.3),
    ]  # fmt: skip
    assert spec.boxed == 2 and [law.hidden for law in spec.masks] == [96]
    assert spec.masks[0].grid == (16, 8) and spec.masks[0].config.least_area == 10
    single = PersonMae.views(PersonMaeConfig(**SAME), ViewConfig(), backbone)
    assert [group.name for group in single.groups] == ["region_a"] and len(single.masks) == 1


@pytest.mark.parametrize(("changes", "message"), [
    ({"loss_on": "masked"}, "needs regions"),
    ({"regions": "same", "weigh_centres": True}, "needs loss_on"),
    ({"pixel_width": 18}, "multiples of 4"),
    ({"mask_ratio": 1.0}, "mask_ratio"),
])  # fmt: skip
def test_config__mistakes_are_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PersonMaeConfig(**changes)


def test_config__must_go_with_the_backbone() -> None:
    with pytest.raises(ConfigError, match="3 blocks"):
        method(pixel_memory=3)
    with pytest.raises(ConfigError, match="visible patches would tell"):
        PersonMae(PersonMaeConfig(**SMALL), BackboneConfig(**{**TINY, "patch": 16}, stem="ics"))
    with pytest.raises(ConfigError, match="multiple of 4"):
        PersonMae(PersonMaeConfig(**SMALL), BackboneConfig(**{**TINY, "width": 18}))


SETTING: dict[str, Any] = {
    "epochs": 3, "batch": 3, "iterations_per_epoch": 2, "clip_grad_per_tensor": 3.0,
    "lr": {"base": 2e-3, "final": 1e-5, "warmup_epochs": 1}, "weight_decay": (0.05, 0.05),
    "teacher_momentum": (0.9, 1.0),
}  # fmt: skip
"""Six steps of three images: two ranks need padding."""


def make() -> Method:
    return method(0.2).float()


def fixed_batches() -> list[dict[str, np.ndarray]]:
    found = []
    for number in range(2):
        views = batch(method(), 3, dtype=torch.float32)
        found.append({name: views[name].numpy() * (1 + number if name.startswith("region") else 1)  # type: ignore
                      for name in ("region_a", "region_b", "mask", "boxes")})  # fmt: skip
    return found


def all_stages(world: World, stages: list[int | None], micro_batches: list[int | None]) -> dict[str, list[float]]:
    """In one rank: the losses of six steps under every stepper, in micro-batches of each size."""
    return {
        f"stage {stage}, micro-batches of {micro}": run_trajectory(
            world, make, SETTING, fixed_batches(), dtype=torch.float32, zero_stage=stage, micro_batch=micro
        ).losses
        for stage in stages
        for micro in micro_batches
    }


@pytest.mark.slow
@pytest.mark.parametrize(("world", "micro_batches"), [(1, [None, 2]), (2, [1])])
def test_deepspeed__the_same_losses_as_the_plain_stepper(world: int, micro_batches: list[int | None]) -> None:
    """ZeRO 0 to 3 and the plain stepper in float32 on real processes, against one plain process."""
    (expected,) = all_stages(World(), [None], [None]).values()
    assert len(expected) == 6 and expected[-1] < expected[0]
    for found in run_ranks(world, all_stages, [None, 0, 1, 2, 3], micro_batches):
        for name, losses in found.items():
            worst = max(abs(ours / theirs - 1) for ours, theirs in zip(losses, expected, strict=True))
            assert worst < 2e-6, (name, worst)
