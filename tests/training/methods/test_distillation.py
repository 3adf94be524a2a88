"""What holds for DINO and PersonViT alike, with either stem, and the loss of each by its formula."""

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from datapipe.core.config import ViewConfig
from datapipe.core.errors import ConfigError
from datapipe.views.masking import MaskConfig, draw_masks
from tests.support.ranks import run_ranks
from tests.training.methods.batches import gradients, rows, same_images, taken_apart
from training.core.collectives import all_reduce
from training.core.world import World
from training.engine import ema
from training.engine.param_groups import group_parameters
from training.engine.plain import PlainStepper
from training.engine.settings import OptimisationConfig
from training.methods import build, known
from training.methods.base import TrainingProgress, Views
from training.methods.dino import Dino, DinoConfig
from training.methods.distillation import Distillation, DistillationConfig
from training.methods.personvit import PersonVit, PersonVitConfig
from training.nn.distillation_losses import hidden_patch_cross_entropies
from training.nn.heads import HeadConfig
from training.nn.vision_transformer import BackboneConfig

START = TrainingProgress(samples=0, step=0, epoch=0, fraction=0.0, total_steps=10, epoch_steps=5.0, seed=3)
HEAD = HeadConfig(out_dim=10, hidden=8, bottleneck=6, init_std=0.3, norm_last_layer=False)
TINY: dict[str, Any] = {"arch": "custom", "size": (32, 16), "patch": 8, "width": 12, "depth": 2, "heads": 3,
                        "init_std": 0.3}  # fmt: skip
LOCALS = 3
KINDS: dict[str, tuple[type[DistillationConfig], dict[str, Any]]] = {
    "dino": (DinoConfig, {}),
    "personvit": (PersonVitConfig, {}),
    "personvit separate": (PersonVitConfig, {"patch_head": "separate", "patch_out_dim": 7}),
    "personvit student_only": (PersonVitConfig, {"patch_head": "student_only"}),
}


def method(kind: str, backbone: dict[str, Any] | None = None, **changes: Any) -> Distillation:
    """A tiny one in float64 whose teacher has already left the student."""
    torch.manual_seed(0)
    config, own = KINDS[kind]
    settings = {"locals": LOCALS, "local_size": (16, 8), "head": HEAD, **own, **changes}
    made = build(config(**settings), BackboneConfig(**{**TINY, **(backbone or {})})).double()  # type: ignore[arg-type]
    assert isinstance(made, Distillation)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for name, centre in made.named_buffers():
        if name.startswith("centre"):
            centre.normal_(std=0.2)
    return made


def batch(images: int = 4, dtype: torch.dtype = torch.float64) -> Views:
    """The first image has no hidden patches in either view, the second one in one view only."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(2, images, 4, 2, generator=generator) < 0.4
    mask[:, 0] = False
    mask[1, 1] = False
    return {
        "global": torch.randn(2, images, 3, 32, 16, dtype=dtype, generator=generator),
        "local": torch.randn(LOCALS, images, 3, 16, 8, dtype=dtype, generator=generator),
        "mask": mask,
        "weight": torch.full((images,), 1 / images, dtype=torch.float64),
        "position": torch.arange(images) + 100,
        "sample": torch.arange(images),
    }


# -- the losses, by their formulas ---------------------------------------------------------------------------------


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def cross_entropy(teacher: Tensor, centre: Tensor, temperature: float, student: Tensor) -> float:
    p = softmax([(t - c) / temperature for t, c in zip(teacher.tolist(), centre[0].tolist(), strict=True)])
    q = softmax([s / 0.1 for s in student.tolist()])
    return -sum(a * math.log(b) for a, b in zip(p, q, strict=True))


def naive_cls(made: Distillation, views: Views, image: int, temperature: float) -> float:
    """One image, one view and one term at a time; the student's global views with their patches hidden."""
    masked = isinstance(made, PersonVit)

    def logits(network: Any, view: Tensor, mask: Tensor | None = None) -> Tensor:
        cls = network.backbone(view[None], mask=None if mask is None else mask.flatten()[None]).cls[0]
        said = network.head({"cls": cls}) if masked else {"cls": network.head(cls)}
        return said["cls"]

    teacher = [logits(made.teacher, views["global"][u, image]) for u in range(2)]
    student = [logits(made.student, views["global"][v, image], views["mask"][v, image] if masked else None)
               for v in range(2)]  # fmt: skip
    student += [logits(made.student, views["local"][v, image]) for v in range(LOCALS)]
    terms = [
        cross_entropy(teacher[u], made.get_buffer("centre_cls"), temperature, student[v])
        for u in range(2) for v in range(2 + LOCALS) if u != v
    ]  # fmt: skip
    assert len(terms) == 2 * (1 + LOCALS)
    return sum(terms) / len(terms)


def naive_patches(made: Distillation, views: Views, image: int, temperature: float) -> float:
    total = 0.0
    for view in range(2):
        picture, mask = views["global"][view, image][None], views["mask"][view, image].flatten()
        taught = made.teacher.head({"patch": made.teacher.backbone(picture).patches[0]})["patch"]
        learnt = made.student.head({"patch": made.student.backbone(picture, mask=mask[None]).patches[0]})["patch"]
        terms = [
            cross_entropy(taught[n], made.get_buffer("centre_patch"), temperature, learnt[n])
            for n in range(8) if mask[n]
        ]  # fmt: skip
        total += sum(terms) / max(1, len(terms))
    return total / 2


@torch.no_grad()
def test_dino_loss__equals_naive_loops() -> None:
    made, views = method("dino", warmup_teacher_temp=0.07, teacher_temp=0.05, teacher_temp_warmup_epochs=3), batch(2)
    for epoch, temperature in enumerate((0.07, 0.06, 0.05)):
        expected = sum(naive_cls(made, views, image, temperature) for image in range(2)) / 2
        outcome = made(views, START._replace(epoch=epoch))
        assert float(outcome.loss) == pytest.approx(expected, rel=1e-12)
        assert float(outcome.metrics["loss_cls"].mean()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dino"])
@torch.no_grad()
def test_personvit_loss__equals_naive_loops(kind: str) -> None:
    made = method(
        kind, warmup_teacher_temp=0.07, teacher_temp=0.05, warmup_teacher_patch_temp=0.03, teacher_patch_temp=0.09,
        teacher_temp_warmup_epochs=3, lambda_dino=0.7, lambda_mim=1.9,
    )  # fmt: skip
    views = batch(3)
    for epoch, (cls_temp, patch_temp) in enumerate([(0.07, 0.03), (0.06, 0.06), (0.05, 0.09), (0.05, 0.09)]):
        cls = [naive_cls(made, views, image, cls_temp) for image in range(3)]
        patches = [naive_patches(made, views, image, patch_temp) for image in range(3)]
        assert patches[0] == 0 and min(patches[1:]) > 0  # an image without hidden patches counts all the same
        outcome = made(views, START._replace(epoch=epoch))
        assert float(outcome.loss) == pytest.approx(0.7 * sum(cls) / 3 + 1.9 * sum(patches) / 3, rel=1e-12)
        assert outcome.metrics["loss_cls"].tolist() == pytest.approx(cls, rel=1e-12)
        assert outcome.metrics["loss_patch"].tolist() == pytest.approx(patches, rel=1e-12)


def test_hidden_patch_cross_entropies__equal_naive_loops() -> None:
    torch.manual_seed(0)
    mask = torch.rand(2, 3, 5) < 0.5
    mask[0, 1] = False
    count = int(mask.sum())
    student = torch.randn(count, 4, dtype=torch.float64)
    targets = torch.softmax(torch.randn(count, 4, dtype=torch.float64), dim=-1)
    ours = hidden_patch_cross_entropies(student, targets, mask, student_temp=0.3)
    place = {tuple(index): row for row, index in enumerate(mask.nonzero().tolist())}
    for b in range(3):
        total = 0.0
        for g in range(2):
            terms = []
            for n in range(5):
                if mask[g, b, n]:
                    row = place[g, b, n]
                    q = softmax((student[row] / 0.3).tolist())
                    terms.append(-sum(p * math.log(value) for p, value in zip(targets[row].tolist(), q, strict=True)))
            total += sum(terms) / max(1, len(terms))
        assert float(ours[b]) == pytest.approx(total / 2, rel=1e-12)


# -- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("kind", list(KINDS))
def test_micro_batches_and_padding__loss_sums_and_gradients_add_up(kind: str, drop_path: float) -> None:
    made, views = method(kind, {"drop_path": drop_path}), batch()
    whole, parts = taken_apart(made, views, START)
    for name in whole.metrics:
        if name.startswith("loss") or name in ("hidden", "target_entropy", "uniform_entropy"):  # others compare images
            same_images(whole, parts, name)


@pytest.mark.parametrize("kind", list(KINDS))
@torch.no_grad()
def test_sinkhorn__leaves_padding_out_and_needs_the_whole_batch(kind: str) -> None:
    made, views = method(kind, targets="sinkhorn"), batch()
    assert made.couples_batch() and not method(kind).couples_batch()
    assert not [name for name, _ in made.named_buffers() if name.startswith("centre")]
    whole, padded = made(views, START), made(rows(views, 0, 4, padding=2), START)
    assert whole.sums == {}
    torch.testing.assert_close(padded.loss, whole.loss, rtol=1e-12, atol=0)


def _sinkhorn_loss(world: World) -> float:
    """In one rank of two: the second has padding alone, so no hidden patches either."""
    made, views = method("personvit", targets="sinkhorn"), batch()
    mine = views if world.rank == 0 else rows(views, 0, 0, padding=4)
    return float(all_reduce(made(mine, START).loss.detach()))


@pytest.mark.slow
def test_sinkhorn__a_rank_without_hidden_patches_takes_part() -> None:
    expected = float(method("personvit", targets="sinkhorn")(batch(), START).loss.detach())
    assert run_ranks(2, _sinkhorn_loss) == pytest.approx([expected] * 2, rel=1e-12)


@pytest.mark.parametrize("kind", list(KINDS))
@torch.no_grad()
def test_drop_path__in_the_student_only_and_by_position(kind: str) -> None:
    views = batch()
    none, some = method(kind), method(kind, {"drop_path": 0.9})
    assert float(none(views, START).loss) != float(some(views, START).loss)
    assert float(some(views, START).loss) == float(some(views, START._replace(step=5)).loss)
    assert float(some(views, START).loss) != float(some(views, START._replace(seed=4)).loss)
    for name, value in none(views, START).sums.items():  # the teacher's logits
        assert torch.equal(value, some(views, START).sums[name])


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["patch", "ics"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_precision__float64_and_bf16_from_end_to_end(kind: str, stem: str) -> None:
    for targets in ("centring", "sinkhorn"):
        made, views = method(kind, {"drop_path": 0.3, "stem": stem}, targets=targets), batch()
        outcome = made(views, START)
        outcome.loss.backward()
        made.after_step(outcome.sums, START)
        floating = [value for value in made.buffers() if value.is_floating_point()]
        everything = [outcome.loss, *outcome.sums.values(), *outcome.metrics.values(), *gradients(made).values()]
        assert {value.dtype for value in [*everything, *floating]} == {torch.float64}

        lower = method(kind, {"stem": stem}, targets=targets).float()
        views = batch(dtype=torch.float32)
        whole = float(lower(views, START).loss.detach())
        lower.precision = "bf16"
        outcome = lower(views, START)
        outcome.loss.backward()
        everything = [outcome.loss, *outcome.sums.values(), *outcome.metrics.values(), *gradients(lower).values()]
        assert {value.dtype for value in everything} == {torch.float32}
        assert 0 < abs(float(outcome.loss.detach()) - whole) < 0.05 * whole


# -- student and teacher -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(KINDS))
def test_teacher__starts_as_the_student_and_follows_it_by_name(kind: str) -> None:
    torch.manual_seed(0)
    config, own = KINDS[kind]
    backbone = BackboneConfig(**TINY)
    made = build(config(local_size=(16, 8), head=HEAD, **own), backbone)  # type: ignore[arg-type]
    assert isinstance(made, known()[kind.split()[0]]) and made.backbone() is made.teacher.backbone
    student, teacher = dict(made.student.named_parameters()), dict(made.teacher.named_parameters())
    missing = {"backbone.masked_embed"} if "personvit" in kind else set()
    if kind == "personvit student_only":
        missing |= {"head.last_layer2.weight_g", "head.last_layer2.weight_v"}
    assert student.keys() - teacher.keys() == missing and not teacher.keys() - student.keys()
    assert all(torch.equal(student[name], value) for name, value in teacher.items())
    assert not any(parameter.requires_grad for parameter in teacher.values())
    with torch.no_grad():
        student["backbone.cls_token"].add_(1.0)
    before = teacher["backbone.cls_token"].clone()
    ema.update(student, teacher, 0.75)
    torch.testing.assert_close(teacher["backbone.cls_token"] - before, torch.full_like(before, 0.25))


def test_personvit__hides_patches_from_the_student_alone() -> None:
    made, views = method("personvit"), batch()
    whole = {**views, "mask": torch.zeros_like(views["mask"])}
    with torch.no_grad():
        masked, unmasked = made(views, START), made(whole, START)  # type: ignore[arg-type]
    for name, value in masked.sums.items():  # of the teacher
        assert torch.equal(value, unmasked.sums[name])
    assert float(masked.loss) != float(unmasked.loss)
    assert not unmasked.metrics["loss_patch"].any() and not unmasked.metrics["hidden"].any()
    assert torch.equal(masked.metrics["hidden"], views["mask"].double().mean(dim=(0, 2, 3)))
    assert not PersonVit(PersonVitConfig(local_size=(16, 8), head=HEAD), BackboneConfig(**TINY)
                         ).student.backbone.masked_embed.any()  # fmt: skip


@torch.no_grad()
def test_personvit__both_centres_follow_the_raw_logits() -> None:
    made = method("personvit separate", centre_momentum=0.7, patch_centre_momentum=0.6)
    views = batch()
    before = {name: value.clone() for name, value in made.named_buffers()}
    assert {name: value.shape[-1] for name, value in before.items()} == {"centre_cls": 10, "centre_patch": 7}
    made.after_step(made(views, START).sums, START)
    seen = made.teacher.backbone(views["global"].flatten(0, 1))
    for token, rows_, momentum in (("cls", seen.cls, 0.7), ("patch", seen.patches.flatten(0, 1), 0.6)):
        expected = made.teacher.head({token: rows_})[token].mean(dim=0, keepdim=True)  # all patches, hidden or not
        moved = momentum * before[f"centre_{token}"] + (1 - momentum) * expected
        torch.testing.assert_close(made.get_buffer(f"centre_{token}"), moved)


@torch.no_grad()
def test_personvit__patch_entropy_is_a_mean_over_hidden_patches() -> None:
    made, views = method("personvit"), batch()
    made.teacher.head.last_layer.weight_g.zero_()  # the teacher says nothing
    made.get_buffer("centre_patch").zero_()
    metrics = made(views, START).metrics
    torch.testing.assert_close(metrics["target_entropy_patch"], torch.full((4,), math.log(10), dtype=torch.float64))


@pytest.mark.parametrize("kind", list(KINDS))
def test_roles__prototypes_decay_and_wait(kind: str) -> None:
    made = method(kind, freeze_last_layer_epochs=2)
    roles = made.roles()
    assert list(roles) == [name for name, value in made.named_parameters() if value.requires_grad]
    waiting = {name for name, role in roles.items() if role.release_epoch}
    layers = ["last_layer", "last_layer2"] if kind.endswith(("separate", "student_only")) else ["last_layer"]
    assert waiting == {f"student.head.{layer}.weight_{part}" for layer in layers for part in "gv"}
    assert all(roles[name].decay and roles[name].depth == 3 for name in waiting)
    if kind != "dino":
        assert roles["student.backbone.masked_embed"] == roles["student.backbone.cls_token"]
    assert not roles["student.backbone.norm.weight"].decay


def test_views__of_the_loader() -> None:
    config = PersonVitConfig(locals=5, mask=MaskConfig(ratios=(0.25,), spreads=(0.0,)))
    spec = pickle.loads(pickle.dumps(PersonVit.views(config, ViewConfig(), BackboneConfig(size=(384, 128)))))
    assert [(group.name, group.size, len(group.bands)) for group in spec.groups] == [
        ("global", (384, 128), 2), ("local", (128, 64), 5)
    ]  # fmt: skip
    assert set(spec.groups[1].bands) == {(0.0, 1.0)}
    masks = draw_masks(spec.masks, 0, np.arange(3))
    assert masks.shape == (2, 3, 24, 8) and not np.array_equal(masks[0], masks[1])
    plain = Dino.views(DinoConfig(locals=0), ViewConfig(), BackboneConfig())
    assert [group.name for group in plain.groups] == ["global"] and plain.masks == ()
    with_locals = Dino.views(DinoConfig(), ViewConfig(), BackboneConfig())
    assert [len(group.bands) for group in with_locals.groups] == [2, 8]


@pytest.mark.parametrize("kind", list(KINDS))
def test_no_locals__only_the_two_globals(kind: str) -> None:
    made, views = method(kind, {"drop_path": 0.3}, locals=0), batch()
    del views["local"]
    outcome = made(views, START)
    outcome.loss.backward()
    assert gradients(made).keys() == made.roles().keys()


def test_config__local_size_must_fit() -> None:
    for kind in KINDS:
        with pytest.raises(ConfigError, match="does not divide local_size"):
            method(kind, local_size=(20, 8))


# -- the ICS stem --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dino", "personvit"])
def test_ics__padding_stays_out_and_statistics_settle_after_the_step(kind: str) -> None:
    made, views = method(kind, {"stem": "ics"}), batch()
    assert made.couples_batch()
    before = {name: value.clone() for name, value in made.named_buffers() if "running" in name}
    whole = made(views, START)
    padded = made(rows(views, 0, 4, padding=3), START)
    torch.testing.assert_close(padded.loss, whole.loss, rtol=1e-12, atol=0)
    for name, value in whole.sums.items():
        torch.testing.assert_close(padded.sums[name], value, rtol=1e-12, atol=1e-15)
    buffers = dict(made.named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in before.items())  # a forward pass changes nothing
    made.after_step(whole.sums, START)
    assert not any(torch.equal(buffers[name], value) for name, value in before.items())
    tracked = {name: int(value) for name, value in buffers.items() if name.endswith("num_batches_tracked")}
    assert {count for name, count in tracked.items() if name.startswith("student")} == {2}  # one per resolution
    assert {count for name, count in tracked.items() if name.startswith("teacher")} == {1}


def test_ics__a_rehearsal_leaves_no_trace() -> None:
    made = method("dino", {"stem": "ics"})
    stepper = PlainStepper(made, group_parameters(made), OptimisationConfig(), World())
    before = {name: value.clone() for name, value in made.state_dict().items()}
    stepper.rehearse(batch(), START)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    stepper.forward(batch(), START)
    assert all(len(value) == 2 for name, value in stepper._gather()[1].items() if "student" in name)


def _ics_step(world: World) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
    """In one rank: loss, gradients and sums of a batch of three, with padding where there are two ranks."""
    made, views = method("dino", {"stem": "ics", "drop_path": 0.4}), batch(3)
    per = -(-3 // world.size)
    low, high = world.rank * per, min(3, (world.rank + 1) * per)
    outcome = made(rows(views, low, high, padding=per - (high - low)), START)
    outcome.loss.backward()
    found = {name: all_reduce(value) for name, value in gradients(made).items()}
    return (
        float(all_reduce(outcome.loss.detach())),
        found,
        {n: all_reduce(v) for n, v in outcome.sums.items()},
    )


@pytest.mark.slow
def test_ics__ranks_make_the_step_of_one_process() -> None:
    loss, expected, sums = run_ranks(1, _ics_step)[0]
    for found_loss, found, found_sums in run_ranks(2, _ics_step):
        assert found_loss == pytest.approx(loss, rel=1e-12)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-7, atol=1e-11, msg=name)
        for name, value in sums.items():
            torch.testing.assert_close(found_sums[name], value, rtol=0, atol=1e-12, msg=name)
