import math
import pickle
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from datapipe.core.config import ViewConfig
from datapipe.core.errors import ConfigError
from tests.training.methods.batches import gradients, rows, same_images, taken_apart
from training.methods import build, known
from training.methods.base import TrainingProgress, Views
from training.methods.pass_reid import Pass, PassConfig
from training.nn.feature_diagnostics import cosine_to_others
from training.nn.heads import HeadConfig
from training.nn.vision_transformer import BackboneConfig

START = TrainingProgress(samples=0, step=0, epoch=0, fraction=0.0, total_steps=10, epoch_steps=5.0, seed=3)


def method(drop_path: float = 0.0, **changes: Any) -> Pass:
    """A tiny PASS in float64 whose teacher has already left the student."""
    torch.manual_seed(0)
    head = HeadConfig(out_dim=10, hidden=8, bottleneck=6, init_std=0.3)
    config = PassConfig(**{"parts": 3, "locals_per_part": 2, "local_size": (16, 8), "head": head, **changes})
    backbone = BackboneConfig(
        arch="custom", size=(32, 16), patch=8, width=12, depth=2, heads=3, init_std=0.3, drop_path=drop_path
    )
    made = Pass(config, backbone).double()
    with torch.no_grad():
        for parameter in made.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for name, centre in made.named_buffers():
        if name.startswith("centre"):
            centre.normal_(std=0.2)
    return made


def batch(images: int = 4, locals_: int = 6, dtype: torch.dtype = torch.float64) -> Views:
    generator = torch.Generator().manual_seed(1)
    return {
        "global": torch.randn(2, images, 3, 32, 16, dtype=dtype, generator=generator),
        "local": torch.randn(locals_, images, 3, 16, 8, dtype=dtype, generator=generator),
        "weight": torch.full((images,), 1 / images, dtype=torch.float64),
        "position": torch.arange(images) + 100,
        "sample": torch.arange(images),
    }


def naive_loss(made: Pass, views: Views, image: int, temperature: float) -> float:
    """The formula as it stands in the paper's code, one image, one view and one term at a time."""

    def logits(network: Any, view: Tensor, part: int | str) -> dict[str, list[float]]:
        seen = network.backbone(view[None], part=part)
        tokens = {"cls": seen.cls[0]}
        numbers = range(1, 4) if part == "all" else [part]
        tokens |= {f"pt{number}": seen.parts[0, index] for index, number in enumerate(numbers)}
        return {token: network.head({token: value})[token].tolist() for token, value in tokens.items()}

    def softmax(values: list[float]) -> list[float]:
        powers = [math.exp(value) for value in values]
        return [power / sum(powers) for power in powers]

    teacher = [logits(made.teacher, views["global"][view, image], "all") for view in range(2)]
    student = [logits(made.student, views["global"][view, image], "all") for view in range(2)]
    for view in range(6):
        student.append(logits(made.student, views["local"][view, image], view // 2 + 1))
    total, terms = 0.0, 0
    for token in ("cls", "pt1", "pt2", "pt3"):
        centre = made.get_buffer(f"centre_{token}")[0].tolist()
        for u in range(2):
            p = softmax([(t - c) / temperature for t, c in zip(teacher[u][token], centre, strict=True)])
            for v in range(8):
                if v == u or token not in student[v]:
                    continue
                q = softmax([s / 0.1 for s in student[v][token]])
                total -= sum(a * math.log(b) for a, b in zip(p, q, strict=True))
                terms += 1
    assert terms == 2 * 7 + 3 * 2 * 3
    return total / terms


@torch.no_grad()
def test_loss__equals_naive_loops() -> None:
    made, views = method(warmup_teacher_temp=0.07, teacher_temp=0.05, teacher_temp_warmup_epochs=3), batch(2)
    for epoch, temperature in enumerate((0.07, 0.06, 0.05)):
        expected = sum(naive_loss(made, views, image, temperature) for image in range(2)) / 2
        outcome = made(views, START._replace(epoch=epoch))
        assert float(outcome.loss) == pytest.approx(expected, rel=1e-12)
        assert all(value.shape == (2,) for value in outcome.metrics.values())
        of_image = (14 * outcome.metrics["loss_cls"] + 18 * outcome.metrics["loss_part"]) / 32
        assert float(of_image.mean()) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
def test_micro_batches_and_padding__loss_sums_and_gradients_add_up(drop_path: float) -> None:
    made, views = method(drop_path), batch()
    whole, parts = taken_apart(made, views, START)
    for name in whole.metrics:
        if name.startswith("loss") or "entropy" in name:  # the others compare images
            same_images(whole, parts, name)


@torch.no_grad()
def test_drop_path__in_the_student_only_and_by_position() -> None:
    views = batch()
    none, some = method(0.0), method(0.9)
    assert float(none(views, START).loss) != float(some(views, START).loss)
    assert float(some(views, START).loss) == float(some(views, START._replace(step=5)).loss)
    assert float(some(views, START).loss) != float(some(views, START._replace(seed=4)).loss)
    for name, value in none(views, START).sums.items():  # the teacher's logits
        assert torch.equal(value, some(views, START).sums[name])


@torch.no_grad()
def test_sinkhorn__leaves_padding_out_and_needs_the_whole_batch() -> None:
    made, views = method(targets="sinkhorn", teacher_temp=0.1, warmup_teacher_temp=0.1), batch()
    assert made.couples_batch() and not method().couples_batch()
    assert not [name for name, _ in made.named_buffers() if name.startswith("centre")]
    whole, padded = made(views, START), made(rows(views, 0, 4, padding=2), START)
    assert whole.sums == {}
    made.after_step(whole.sums, START)
    torch.testing.assert_close(padded.loss, whole.loss, rtol=1e-12, atol=0)


def test_float64__from_end_to_end() -> None:
    for targets in ("centring", "sinkhorn"):
        made = method(0.3, targets=targets)
        outcome = made(batch(), START)
        outcome.loss.backward()
        made.after_step(outcome.sums, START)
        everything = [outcome.loss, *outcome.sums.values(), *outcome.metrics.values(), *gradients(made).values()]
        assert {value.dtype for value in [*everything, *made.buffers()]} == {torch.float64}


def test_bf16__heads_loss_and_gradients_stay_float32() -> None:
    made, views = method().float(), batch(dtype=torch.float32)
    full = made(views, START).loss.detach()
    made.precision = "bf16"
    outcome = made(views, START)
    outcome.loss.backward()
    everything = [outcome.loss, *outcome.sums.values(), *outcome.metrics.values(), *gradients(made).values()]
    assert {value.dtype for value in everything} == {torch.float32}
    assert 0 < abs(float((outcome.loss - full).detach())) < 0.05 * float(full)


def test_fp16__refused_on_a_cpu() -> None:
    made = method().float()
    made.precision = "fp16"
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        made(batch(dtype=torch.float32), START)


@torch.no_grad()
def test_centre__moves_after_the_step_towards_the_raw_logits() -> None:
    made, views = method(centre_momentum=0.7), batch()
    before = {name: value.clone() for name, value in made.named_buffers() if name.startswith("centre")}
    assert before.keys() == {"centre_cls", "centre_pt1", "centre_pt2", "centre_pt3"}
    outcome = made(views, START)
    seen = made.teacher.backbone(views["global"].flatten(0, 1))
    expected = made.teacher.head({"pt2": seen.parts[:, 1]})["pt2"].mean(dim=0, keepdim=True)
    assert torch.equal(made.get_buffer("centre_pt2"), before["centre_pt2"])
    made.after_step(outcome.sums, START)
    torch.testing.assert_close(made.get_buffer("centre_pt2"), 0.7 * before["centre_pt2"] + 0.3 * expected)


def test_roles__of_the_student_only() -> None:
    made = method(freeze_last_layer_epochs=2)
    roles = made.roles()
    assert list(roles) == [name for name, value in made.named_parameters() if value.requires_grad]
    assert all(name.startswith("student.") for name in roles)
    assert {name for name, role in roles.items() if role.release_epoch} == {
        f"student.head.last_layer_{token}.weight_v" for token in ("cls", "pt1", "pt2", "pt3")
    }
    assert {role.release_epoch for role in roles.values()} == {0, 2}
    assert roles["student.backbone.cls_pos"].decay and roles["student.backbone.pos_embed"].decay
    assert not roles["student.backbone.norm.weight"].decay and not roles["student.head.mlp_pt1.2.bias"].decay
    assert roles["student.backbone.blocks.1.attn.qkv.weight"].depth == 2
    assert roles["student.head.mlp_cls.0.weight"].depth == 3

    free = method(head=HeadConfig(out_dim=10, hidden=8, bottleneck=6, norm_last_layer=False)).roles()
    assert free["student.head.last_layer_pt1.weight_g"].decay


def test_teacher__starts_as_the_student_and_is_the_one_evaluated() -> None:
    torch.manual_seed(0)
    config = PassConfig(local_size=(16, 8), head=HeadConfig(out_dim=10, hidden=8, bottleneck=6))
    made = build(config, BackboneConfig(arch="custom", size=(32, 16), patch=8, width=12, depth=1, heads=2))
    assert isinstance(made, known()["pass"])
    student, teacher = made.student.state_dict(), made.teacher.state_dict()
    assert student.keys() == teacher.keys()
    assert all(torch.equal(student[name], teacher[name]) for name in student)
    assert not any(parameter.requires_grad for parameter in made.teacher.parameters())
    assert made.backbone() is made.teacher.backbone


def test_any_number_of_parts() -> None:
    for parts in (1, 2, 4):
        made = method(parts=parts, locals_per_part=1)
        outcome = made(batch(locals_=parts), START)
        outcome.loss.backward()
        assert gradients(made).keys() == made.roles().keys()


@pytest.mark.parametrize(("parts", "overlap", "bands"), [
    (3, 0.5, [(0, 0.5), (0.25, 0.75), (0.5, 1)]),
    (1, 0.5, [(0, 1)]),
    (2, 0.0, [(0, 0.5), (0.5, 1)]),
    (4, 0.5, [(0, 0.4), (0.2, 0.6), (0.4, 0.8), (0.6, 1)]),
])  # fmt: skip
def test_bands__cover_the_image_and_overlap(parts: int, overlap: float, bands: list[tuple[float, float]]) -> None:
    made = PassConfig(parts=parts, part_overlap=overlap).bands
    assert [limit for band in made for limit in band] == pytest.approx([limit for band in bands for limit in band])
    assert made[-1][1] == 1.0


def test_views__two_globals_and_the_locals_of_each_band_in_order() -> None:
    spec = pickle.loads(pickle.dumps(Pass.views(PassConfig(), ViewConfig(), BackboneConfig(size=(256, 128)))))
    assert [group.name for group in spec.groups] == ["global", "local"]
    global_, local = spec.groups
    assert global_.size == (256, 128) and len(global_.bands) == 2
    assert local.size == (128, 64)
    assert local.bands == ((0, 0.5),) * 3 + ((0.25, 0.75),) * 3 + ((0.5, 1),) * 3


def test_config__mistakes_are_told() -> None:
    with pytest.raises(ValidationError, match="part_overlap"):
        PassConfig(part_overlap=1.0)
    with pytest.raises(ConfigError, match="does not divide local_size"):
        method(local_size=(20, 8))


@torch.no_grad()
def test_collapse_signs__cosine_and_entropy() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0], [5.0, 5.0]])
    weight = torch.tensor([0.5, 0.5, 0.5, 0.0])
    torch.testing.assert_close(cosine_to_others(features, weight)[:3], torch.tensor([0.5, 0.5, 0.0]))
    assert float(cosine_to_others(features[:1], weight[:1])) == 0.0
    made, views = method(), batch()
    views["global"] = views["global"][:, :1].expand(-1, 4, -1, -1, -1)  # all images alike
    for token in ("cls", "pt1", "pt2", "pt3"):  # and the teacher says nothing of them
        made.teacher.head.get_parameter(f"last_layer_{token}.weight_g").zero_()
        made.get_buffer(f"centre_{token}").zero_()
    metrics = made(views, START).metrics
    torch.testing.assert_close(metrics["feature_cosine"], torch.ones(4, dtype=torch.float64))
    for name in ("target_entropy", "target_entropy_part"):
        torch.testing.assert_close(metrics[name], torch.full((4,), math.log(10), dtype=torch.float64))
    for name in ("target_information", "target_information_part"):
        torch.testing.assert_close(metrics[name], torch.zeros(4, dtype=torch.float64))
