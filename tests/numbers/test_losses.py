import torch
from torch import Tensor, nn

from tests.golden import difference, golden, group, tolerance
from training.backbone import BackboneConfig
from training.heads import HeadConfig
from training.losses import pair_cross_entropies
from training.methods.base import Precision, Progress, Views
from training.methods.distillation import TokenViews
from training.methods.pass_reid import Pass, PassConfig
from training.schedules import teacher_temperature
from training.targets import centre_sum, centred, moved_centre


def test_dino_loss__gradient_and_centre_over_calls() -> None:
    about, tensors = golden("dino_loss")
    settings = about["hyper_parameters"]
    batch = settings["batch"]
    centre_1K = torch.zeros(1, settings["out_dim"])
    calls = sorted({name.split("/")[0] for name in tensors if name.startswith("call")})
    assert calls
    for call in calls:
        case = group(tensors, call + "/")
        temperature = teacher_temperature(
            int(case["epoch"]),
            warmup=settings["warmup_teacher_temp"],
            final=settings["teacher_temp"],
            warmup_epochs=settings["warmup_teacher_temp_epochs"],
        )
        assert abs(temperature - float(case["teacher_temperature"])) < 1e-12
        logits = case["student_logits"].clone().requires_grad_()
        teacher_TBK = case["teacher_logits"].unflatten(0, (-1, batch))
        targets_TBK = centred(teacher_TBK, centre_1K, temperature=temperature)
        student_SBK = logits.unflatten(0, (-1, batch))
        pairs_MB = pair_cross_entropies(student_SBK, targets_TBK, student_temp=settings["student_temp"])
        assert len(pairs_MB) == settings["loss_terms"]
        loss = pairs_MB.mean()
        loss.backward()
        weight_B = torch.full((batch,), 1 / batch)
        centre_1K = moved_centre(centre_1K, centre_sum(teacher_TBK, weight_B), settings["center_momentum"])
        assert logits.grad is not None
        assert difference(loss.detach()[None], case["loss"][None]) < tolerance(about, "loss")
        assert difference(logits.grad, case["grad_student_logits"]) < tolerance(about, "gradient")
        assert difference(centre_1K, case["center_after"]) < tolerance(about, "center")


class Spoken(nn.Module):
    """A network that says given logits, so that the method's own loss is what is measured."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.backbone, self.tokens = network.backbone, network.tokens
        self.logits: dict[str, Tensor] = {}

    def forward(self, views: Views, *, learning: bool, precision: Precision, keep: object = None) -> TokenViews:
        return TokenViews(self.logits, torch.ones(*views["global"].shape[:2], 2))


def test_pass_loss__gradients_and_centres_over_calls() -> None:
    about, tensors = golden("pass_loss")
    settings = about["hyper_parameters"]
    batch, parts, locals_per_part = settings["batch"], settings["areas"], settings["locals_per_area"]
    config = PassConfig(
        parts=parts,
        locals_per_part=locals_per_part,
        local_size=(4, 4),
        head=HeadConfig(out_dim=settings["out_dim"], hidden=4, bottleneck=4),
        student_temp=settings["student_temp"],
        warmup_teacher_temp=settings["warmup_teacher_temp"],
        teacher_temp=settings["teacher_temp"],
        teacher_temp_warmup_epochs=settings["warmup_teacher_temp_epochs"],
        centre_momentum=settings["center_momentum"],
    )
    method = Pass(config, BackboneConfig(arch="custom", size=(8, 4), patch=4, width=8, depth=1, heads=1))
    student, teacher = Spoken(method.student), Spoken(method.teacher)
    method.student, method.teacher = student, teacher  # type: ignore[assignment]
    tokens = ("cls", *(f"pt{part}" for part in range(1, parts + 1)))
    views: Views = {
        "global": torch.zeros(2, batch, 3, 8, 4),
        "local": torch.zeros(parts * locals_per_part, batch, 3, 4, 4),
        "weight": torch.full((batch,), 1 / batch, dtype=torch.float64),
        "position": torch.arange(batch),
    }
    calls = sorted({name.split("/")[0] for name in tensors if name.startswith("call")})
    assert calls
    for call in calls:
        case = group(tensors, call + "/")
        inputs = {name: value.clone().requires_grad_() for name, value in case.items() if name.startswith("student_")}
        stacks = {token: [inputs[f"student_global_{token}"]] for token in tokens}
        for part in range(1, parts + 1):
            stacks["cls"].append(inputs[f"student_area{part}_cls"])
            stacks[f"pt{part}"].append(inputs[f"student_area{part}_pt"])
        student.logits = {token: torch.cat(rows).unflatten(0, (-1, batch)) for token, rows in stacks.items()}
        teacher.logits = {token: case[f"teacher_global_{token}"].unflatten(0, (-1, batch)) for token in tokens}
        for token in tokens:
            before = case[f"center_before_{token}"]
            torch.testing.assert_close(method.get_buffer(f"centre_{token}"), before, rtol=0, atol=1e-6)
        progress = Progress(0, 0, int(case["epoch"]), 0.0, 1, 1.0, 0)
        outcome = method(views, progress)
        outcome.loss.backward()
        method.after_step(outcome.sums, progress)
        assert difference(outcome.loss.detach()[None], case["loss"][None]) < tolerance(about, "loss")
        for name, value in inputs.items():
            assert value.grad is not None, name
            assert difference(value.grad, case[f"grad_{name}"]) < tolerance(about, "gradient"), name
        for token in tokens:
            after = case[f"center_after_{token}"]
            assert difference(method.get_buffer(f"centre_{token}"), after) < tolerance(about, "center"), token
