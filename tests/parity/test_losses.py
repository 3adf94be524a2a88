"""The methods' own losses, gradients and centres, given the logits that the references were given."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.support.golden import difference, golden, group, tolerance
from training.methods.base import Method, TrainingProgress, Views
from training.methods.dino import Dino, DinoConfig
from training.methods.distillation import TokenViews
from training.methods.pass_reid import Pass, PassConfig
from training.methods.personvit import MaskedViews, PersonVit, PersonVitConfig
from training.nn.heads import HeadConfig
from training.nn.vision_transformer import BackboneConfig

BACKBONE = BackboneConfig(arch="custom", size=(8, 4), patch=4, width=8, depth=1, heads=1)


class Spoken(nn.Module):
    """A network that says what it is told, so that the method's own loss is what is measured."""

    said: Any = None

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.backbone, self.tokens = network.backbone, network.tokens

    def forward(self, views: Views, **_: object) -> Any:
        return self.said


def spoken(method: Method) -> tuple[Spoken, Spoken]:
    """Put such networks into a method."""
    student, teacher = Spoken(method.student), Spoken(method.teacher)
    method.student, method.teacher = student, teacher
    return student, teacher


def shared_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """What the configurations of all three methods have in common."""
    return {
        "local_size": (4, 4),
        "student_temp": settings["student_temp"],
        "warmup_teacher_temp": settings["warmup_teacher_temp"],
        "teacher_temp": settings["teacher_temp"],
        "teacher_temp_warmup_epochs": settings["warmup_teacher_temp_epochs"],
        "centre_momentum": settings["center_momentum"],
        "head": HeadConfig(out_dim=settings["out_dim"], hidden=4, bottleneck=4),
    }


def views_of(batch: int, locals_: int) -> Views:
    return {
        "global": torch.zeros(2, batch, 3, 8, 4),
        "local": torch.zeros(locals_, batch, 3, 4, 4),
        "weight": torch.full((batch,), 1 / batch, dtype=torch.float64),
        "position": torch.arange(batch),
    }


def token_views(logits: dict[str, Tensor], batch: int) -> TokenViews:
    """Logits with rows view-major, [S * B, K], as a network says them."""
    return TokenViews({token: rows.unflatten(0, (-1, batch)) for token, rows in logits.items()},
                      torch.ones(2, batch, 2))  # fmt: skip


def calls_of(tensors: dict[str, Tensor]) -> list[str]:
    calls = sorted({name.split("/")[0] for name in tensors if name.startswith("call")})
    assert calls
    return calls


def at_epoch(case: dict[str, Tensor]) -> TrainingProgress:
    return TrainingProgress(0, 0, int(case["epoch"]), 0.0, 1, 1.0, 0)


def close(ours: Tensor, theirs: Tensor, about: dict[str, Any], kind: str, name: str = "") -> None:
    assert difference(ours.detach().reshape(theirs.shape), theirs) < tolerance(about, kind), name


def test_dino_loss__gradient_and_centre_over_calls() -> None:
    about, tensors = golden("dino_loss")
    settings = about["hyper_parameters"]
    batch, locals_ = settings["batch"], settings["ncrops"] - 2
    method = Dino(DinoConfig(locals=locals_, **shared_settings(settings)), BACKBONE)
    student, teacher = spoken(method)
    for call in calls_of(tensors):
        case = group(tensors, call + "/")
        logits = case["student_logits"].clone().requires_grad_()
        student.said, teacher.said = (
            token_views({"cls": logits}, batch),
            token_views({"cls": case["teacher_logits"]}, batch),
        )
        torch.testing.assert_close(method.get_buffer("centre_cls"), case["center_before"], rtol=0, atol=1e-6)
        assert abs(method.temperature("cls", int(case["epoch"])) - float(case["teacher_temperature"])) < 1e-12
        outcome = method(views_of(batch, locals_), at_epoch(case))
        outcome.loss.backward()
        method.after_step(outcome.sums, at_epoch(case))
        assert logits.grad is not None
        close(outcome.loss, case["loss"][None], about, "loss")
        close(logits.grad, case["grad_student_logits"], about, "gradient")
        close(method.get_buffer("centre_cls"), case["center_after"], about, "center")


def test_ibot_loss__both_terms_gradients_and_centres_over_calls() -> None:
    about, tensors = golden("ibot_loss")
    settings = about["hyper_parameters"]
    batch, globals_, locals_ = settings["batch"], settings["ngcrops"], settings["nlcrops"]
    config = PersonVitConfig(
        locals=locals_, patch_head="separate", patch_out_dim=settings["patch_out_dim"],
        warmup_teacher_patch_temp=settings["warmup_teacher_temp2"], teacher_patch_temp=settings["teacher_temp2"],
        patch_centre_momentum=settings["center_momentum2"], lambda_dino=settings["lambda1"],
        lambda_mim=settings["lambda2"], **shared_settings(settings),
    )  # fmt: skip
    method = PersonVit(config, BACKBONE)
    student, teacher = spoken(method)
    for call in calls_of(tensors):
        case = group(tensors, call + "/")
        inputs = {name: value.clone().requires_grad_() for name, value in case.items() if name.startswith("student_")}
        views = views_of(batch, locals_)
        views["mask"] = torch.stack([case[f"mask_view{view}"] for view in range(globals_)])
        hidden = inputs["student_global_patch"].unflatten(0, (-1, batch))[views["mask"].flatten(2)]
        cls = torch.cat([inputs["student_global_cls"], inputs["student_local_cls"]])
        student.said = MaskedViews(token_views({"cls": cls}, batch), hidden, None)
        patches = case["teacher_global_patch"].unflatten(0, (-1, batch))
        seen = token_views({"cls": case["teacher_global_cls"]}, batch)
        teacher.said = MaskedViews(seen, patches[views["mask"].flatten(2)], patches.mean(dim=2))
        for token in ("cls", "patch"):
            before = case[f"center_{token}_before"].reshape(1, -1)
            torch.testing.assert_close(method.get_buffer(f"centre_{token}"), before, rtol=0, atol=1e-6)
            temperature = float(case[f"teacher_temperature_{token}"])
            assert abs(method.temperature(token, int(case["epoch"])) - temperature) < 1e-12
        outcome = method(views, at_epoch(case))
        outcome.loss.backward()
        method.after_step(outcome.sums, at_epoch(case))
        close(outcome.loss, case["loss"][None], about, "loss")
        terms = {"cls": config.lambda_dino, "patch": config.lambda_mim}
        for term, factor in terms.items():
            close(factor * outcome.metrics[f"loss_{term}"].mean(), case[f"loss_{term}"][None], about, "loss", term)
        for name, value in inputs.items():
            assert value.grad is not None, name
            close(value.grad, case[f"grad_{name}"], about, "gradient", name)
        for token in ("cls", "patch"):
            close(method.get_buffer(f"centre_{token}"), case[f"center_{token}_after"], about, "center", token)


def test_pass_loss__gradients_and_centres_over_calls() -> None:
    about, tensors = golden("pass_loss")
    settings = about["hyper_parameters"]
    batch, parts, locals_per_part = settings["batch"], settings["areas"], settings["locals_per_area"]
    method = Pass(PassConfig(parts=parts, locals_per_part=locals_per_part, **shared_settings(settings)), BACKBONE)
    student, teacher = spoken(method)
    tokens = ("cls", *(f"pt{part}" for part in range(1, parts + 1)))
    for call in calls_of(tensors):
        case = group(tensors, call + "/")
        inputs = {name: value.clone().requires_grad_() for name, value in case.items() if name.startswith("student_")}
        stacks = {token: [inputs[f"student_global_{token}"]] for token in tokens}
        for part in range(1, parts + 1):
            stacks["cls"].append(inputs[f"student_area{part}_cls"])
            stacks[f"pt{part}"].append(inputs[f"student_area{part}_pt"])
        student.said = token_views({token: torch.cat(rows) for token, rows in stacks.items()}, batch)
        teacher.said = token_views({token: case[f"teacher_global_{token}"] for token in tokens}, batch)
        for token in tokens:
            before = case[f"center_before_{token}"]
            torch.testing.assert_close(method.get_buffer(f"centre_{token}"), before, rtol=0, atol=1e-6)
        outcome = method(views_of(batch, parts * locals_per_part), at_epoch(case))
        outcome.loss.backward()
        method.after_step(outcome.sums, at_epoch(case))
        close(outcome.loss, case["loss"][None], about, "loss")
        for name, value in inputs.items():
            assert value.grad is not None, name
            close(value.grad, case[f"grad_{name}"], about, "gradient", name)
        for token in tokens:
            close(method.get_buffer(f"centre_{token}"), case[f"center_after_{token}"], about, "center", token)
