"""Supervised fine-tuning through the steppers that users run, beside the same training written naively with PyTorch's
own layers; and on several ranks beside one."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datapipe.stream.batch import Batch
from datapipe.views.erasing import Erasures, draw_erasures
from tests.support.ranks import run_ranks
from tests.support.trajectory import FixedBatches, NoFaults, Noting
from training.config.batch_split import BatchSplit, split_batch
from training.core.exchange import Exchange
from training.core.host import LocalHost
from training.core.world import World
from training.engine.clock import Clock
from training.engine.param_groups import group_parameters, settings_at
from training.engine.plain import PlainStepper
from training.engine.settings import OptimisationConfig
from training.methods.base import TrainingProgress, Views
from training.methods.supervised import Supervised, SupervisedConfig, to_transreid
from training.nn.drop_path import draw_path_masks
from training.nn.identity.necks import GroupedBatchNorm
from training.nn.identity.random_erasing import NOISE
from training.nn.vision_transformer import BackboneConfig
from training.trainer.loop import Segment, TrainingRun, train

BACKBONE = BackboneConfig(arch="custom", size=(16, 8), patch=4, width=12, depth=2, heads=2, drop_path=0.2, init_std=0.2)
CLASSES, BATCH, STEPS = 5, 8, 6
OPTIMISATION = OptimisationConfig(
    optimizer="sgd", schedule="epoch", epochs=3, warmup_epochs=1, batch=BATCH, micro_batch=BATCH, precision="fp32",
    lr=0.05, warmup_lr=0.01, final_lr=0.001, weight_decay=0.01, final_weight_decay=0.01, clip="none",
)  # fmt: skip
CLOCK = Clock(BATCH, 2 * BATCH, 3, seed=5)


class LabelledBatches(FixedBatches):
    """Two fixed batches by turns: two images each of four identities; the identities of the second are others."""

    def _rows(self, views: dict[str, np.ndarray], start: int) -> Batch:
        batch = super()._rows(views, start)
        shift = start // self.size % 2
        batch.label[:] = np.where(batch.weight > 0, (batch.position % self.size // 2 + shift) % CLASSES, -1)
        return batch


def pictures() -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [{"image": random.normal(size=(1, BATCH, 3, *BACKBONE.size))} for _ in range(2)]


def method_of(**settings: Any) -> Supervised:
    torch.manual_seed(1)
    config = SupervisedConfig(**{"classes": CLASSES, "instances": 2, "erase": 0.0, **settings})
    return Supervised(config, BACKBONE).double()


def place(batch: Batch) -> Views:
    return {"image": torch.from_numpy(batch.views["image"]), "label": torch.from_numpy(batch.label.copy()),
            "position": torch.from_numpy(batch.position), "weight": torch.from_numpy(batch.weight)}  # fmt: skip


def fine_tune(world: World, settings: dict[str, Any], rows: int = 0) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and final state; `rows`: images of a rank, padding included, where that is not as few as will do."""

    def placed(batch: Batch) -> Views:
        return with_erasures(place(batch), batch.position, settings.get("erase", 0.0))

    method = method_of(**settings)
    split = BatchSplit(rows, rows) if rows else split_batch(BATCH, BATCH, world.size)
    stepper = PlainStepper(method, group_parameters(method), OPTIMISATION, world)
    losses: list[float] = []
    run = TrainingRun(
        method=method, stepper=stepper, loader=LabelledBatches(pictures(), BATCH, split, world.rank), place=placed,
        clock=CLOCK, optimisation=OPTIMISATION, micro_batch=split.micro_batch, checkpoints=None, host=LocalHost(),
        faults=NoFaults(), exchange=Exchange(world), observers=[Noting(lambda step: losses.append(step.result.loss))],
    )  # fmt: skip
    train(run, Segment(STEPS * BATCH))
    return losses, {name: value.clone() for name, value in method.state_dict().items()}


def with_erasures(views: Views, position: np.ndarray, probability: float) -> Views:
    """With the rectangles of these images, as the loader draws them; padding, which comes last, has none."""
    spec = NOISE.spec(BACKBONE.size, probability)
    if spec is None:
        return views
    found, real = Erasures.none(spec, len(position)), int((position >= 0).sum())
    draw_erasures(spec, CLOCK.at(0).seed, position[:real], found.rows(slice(0, real)))
    return {**views, "erased": found.rectangle, "noise": torch.from_numpy(found.flat()).double()}


def steps() -> Iterator[tuple[TrainingProgress, Views]]:
    for batch in LabelledBatches(pictures(), BATCH, BatchSplit(BATCH, BATCH), 0).after(0, STEPS * BATCH):
        yield CLOCK.at(batch.start), place(batch)


def naive_triplet(features: Tensor, label: Tensor) -> Tensor:
    losses, rows = [], features.unbind()
    for row, own in zip(rows, label.tolist(), strict=True):
        others = [other for other in zip(rows, label.tolist(), strict=True) if other[0] is not row]
        near = torch.stack([(row - other).norm() for other, who in others if who == own]).max()
        off = torch.stack([(row - other).norm() for other, who in others if who != own]).min()
        losses.append(torch.log1p(torch.exp(near - off)))
    return torch.stack(losses).mean()


def necks_of(method: Supervised, width: int) -> list[nn.BatchNorm1d]:
    """PyTorch's own, with a bias that does not train."""
    config = method.config
    fused = 2 * width if config.parts and config.fusion == "cat" else width
    widths = [fused] if config.neck == "one" else [width] * (1 + config.parts)
    necks = [nn.BatchNorm1d(channels).double() for channels in widths]
    for neck in necks:
        neck.bias.requires_grad_(False)
    return necks


def naive(settings: dict[str, Any]) -> tuple[list[float], dict[str, Tensor], list[nn.BatchNorm1d]]:
    """The same training with batch norms, SGD and cross-entropy of PyTorch. The method's backbone is used."""
    method = method_of(**settings)
    backbone, classifier = method.student.backbone, method.student.head.classifier
    necks = necks_of(method, BACKBONE.shape.width)
    trained = {f"backbone.{name}": value for name, value in backbone.named_parameters()}
    trained |= {"classifier": classifier.weight} | {f"neck.{n}": neck.weight for n, neck in enumerate(necks)}
    biases = [value for name, value in trained.items() if name.endswith("bias")]
    others = [value for name, value in trained.items() if not name.endswith("bias")]
    optimizer = torch.optim.SGD([{"params": others}, {"params": biases}], lr=1, momentum=0.9, weight_decay=0.01)
    losses = []
    for progress, views in steps():
        for group, factor in zip(optimizer.param_groups, (1, 2), strict=True):
            group["lr"] = settings_at(OPTIMISATION, progress).lr_of(factor)
        path_masks = keep_of(progress, views)
        seen = backbone(views["image"][0], path_masks=path_masks)
        tokens = [seen.cls, *seen.parts.unbind(dim=1)]
        feature = naively_fused(tokens, method.config.fusion)
        if len(necks) == 1:
            normal = necks[0](feature)
        else:
            each = [neck(token) for neck, token in zip(necks, tokens, strict=True)]
            normal = naively_fused(each, method.config.fusion)
        loss = F.cross_entropy(classifier(normal), views["label"]) + naive_triplet(feature, views["label"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, trained, necks


def naively_fused(tokens: list[Tensor], fusion: str) -> Tensor:
    cls, *parts = tokens
    if not parts:
        return cls
    mean = sum(parts) / len(parts)
    return torch.cat([cls, mean], dim=1) if fusion == "cat" else (cls + mean) / 2


def keep_of(progress: TrainingProgress, views: Views) -> Tensor | None:
    position = views["position"]
    return draw_path_masks(
        BACKBONE.drop_rates, seed=progress.seed, purpose="drop_path/image", position=position, views=1
    )


MEAN = {"parts": 2, "fusion": "mean"}


@pytest.mark.parametrize(
    "settings",
    [{}, {"parts": 2}, {"parts": 2, "neck": "each"}, MEAN, {**MEAN, "neck": "each"}],
    ids=["cls", "one", "each", "mean-one", "mean-each"],
)
def test_training__equals_a_naive_one(settings: dict[str, Any]) -> None:
    ours, state = fine_tune(World(), settings)
    theirs, trained, necks = naive(settings)
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert len(set(ours)) == STEPS
    for name, value in trained.items():
        if name.startswith("backbone"):
            torch.testing.assert_close(state[f"student.{name}"], value.detach(), rtol=0, atol=1e-9)
    for number, neck in enumerate(necks):
        prefix = f"student.head.bottleneck{f'_{number}' if number else ''}."
        for name, value in neck.state_dict().items():
            torch.testing.assert_close(state[prefix + name], value, rtol=0, atol=1e-9)


SHARES = (4, 6)
"""Rows of each of two ranks: even ones, and six, of which the second rank has four as padding."""


def _both(world: World, settings: dict[str, Any]) -> list[tuple[list[float], dict[str, Tensor]]]:
    return [fine_tune(world, settings, rows) for rows in SHARES]


@pytest.mark.slow
def test_training__two_processes_as_one() -> None:
    settings = {"parts": 1, "neck": "each", "erase": 0.5}
    losses, state = fine_tune(World(), settings)
    for found in run_ranks(2, _both, settings):
        for share, (other_losses, other) in zip(SHARES, found, strict=True):
            assert other_losses == pytest.approx(losses, rel=1e-9), share
            for name, value in state.items():
                torch.testing.assert_close(other[name], value, rtol=0, atol=1e-9)


def test_mining__sees_the_whole_batch_of_all_ranks() -> None:
    """With mining within ranks the losses would differ: here the hardest negatives lie on the other rank."""
    method = method_of()
    progress, views = next(steps())
    whole = method(views, progress).loss
    halves: list[Views] = [{name: value[..., part, :, :, :] if name == "image" else value[part]  # type: ignore[misc]
                            for name, value in views.items()} for part in (slice(0, 4), slice(4, 8))]  # fmt: skip
    apart = sum(method(half, progress).loss for half in halves)
    assert abs(float(whole.detach()) - float(apart.detach())) > 1e-3


@pytest.mark.parametrize("neck", ["one", "each", "none"])
@torch.no_grad()
def test_fusion__mean_is_that_of_the_tokens_by_numpy(neck: str) -> None:
    """The feature in front of the necks, and the logits behind them, whose running statistics are not those of a fresh
    batch norm."""
    method = method_of(parts=3, fusion="mean", neck=neck)
    head, images = method.student.head.eval(), torch.from_numpy(pictures()[0]["image"][0])
    for name, value in head.named_buffers():
        if name.endswith(("mean", "var")):
            value.copy_(torch.rand(value.shape, dtype=value.dtype) + 0.5)
    seen = method.student.backbone.eval().features(images)
    cls, parts = seen.cls.numpy(), seen.parts.numpy()
    output = head(seen.cls, seen.parts, torch.ones(BATCH, dtype=torch.bool))
    feature = 0.5 * cls + (parts[:, 0] + parts[:, 1] + parts[:, 2]) / 6
    np.testing.assert_allclose(output.feature_BF.numpy(), feature, rtol=1e-12)
    state = {name: value.numpy() for name, value in head.state_dict().items()}

    def normal(values: np.ndarray, name: str) -> np.ndarray:
        scale = state[f"{name}.weight"] / np.sqrt(state[f"{name}.running_var"] + 1e-5)
        return (values - state[f"{name}.running_mean"]) * scale

    if neck == "one":
        feature = normal(feature, "bottleneck")
    elif neck == "each":
        of_parts = sum(normal(parts[:, part], f"bottleneck_{part + 1}") for part in range(3))
        feature = normal(cls, "bottleneck") / 2 + of_parts / 6
    logits = feature @ state["classifier.weight"].T + state.get("classifier.bias", 0.0)
    assert logits.shape == (BATCH, CLASSES) and state["classifier.weight"].shape == (CLASSES, BACKBONE.shape.width)
    np.testing.assert_allclose(output.logits_BK.numpy(), logits, rtol=1e-10, atol=1e-12)


def test_loss__an_image_of_unknown_identity_counts_for_nothing() -> None:
    method = method_of(identity_weight=1.0)
    progress, views = next(steps())
    views["label"][3] = -1
    outcome = method(views, progress)
    assert outcome.metrics["loss_identity"][3] == 0 == outcome.metrics["loss_triplet"][3]
    assert outcome.metrics["identified"][3] == 0 and torch.isfinite(outcome.loss)


def test_neck__bias_stays_zero_and_padding_stays_out() -> None:
    neck = GroupedBatchNorm(3, group=0).double()
    values = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    real = torch.tensor([True, True, True, False])
    library = nn.BatchNorm1d(3).double()
    torch.testing.assert_close(neck(values, real)[:3], library(values[:3]))
    assert not neck.bias.requires_grad and not neck.bias.any()


def test_roles__of_both_published_recipes() -> None:
    roles = method_of().roles()
    assert all(role.decay for role in roles.values())
    assert {role.lr_factor for name, role in roles.items() if name.endswith("bias")} == {2.0}
    assert {role.lr_factor for name, role in roles.items() if not name.endswith("bias")} == {1.0}
    assert "student.head.bottleneck.bias" not in roles
    masked = method_of(decay="weights", bias_lr_factor=1.0, neck="none").roles()
    decayed = {name for name, role in masked.items() if role.decay}
    assert "student.head.classifier.weight" in decayed and "student.backbone.blocks.0.attn.qkv.weight" in decayed
    assert not {name for name in decayed if name.endswith(("bias", "cls_token", "pos_embed", "norm1.weight"))}
    depths = {name: role.depth for name, role in masked.items()}
    assert depths["student.backbone.patch_embed.proj.weight"] == 0 == depths["student.backbone.pos_embed"]
    assert depths["student.backbone.blocks.1.norm1.weight"] == 2
    assert depths["student.head.classifier.bias"] == 3 == depths["student.backbone.norm.weight"]


def test_to_transreid__names_of_the_reference() -> None:
    names = to_transreid(method_of(parts=3, neck="each")).keys()
    assert {"base.cls_token", "base.part_token3", "base.blocks.0.attn.qkv.weight", "bottleneck.weight",
            "bottleneck_3.running_var", "classifier.weight"} < names  # fmt: skip
    assert {name.split(".")[0] for name in names} == {
        "base", "bottleneck", "bottleneck_1", "bottleneck_2", "bottleneck_3", "classifier"
    }  # fmt: skip
