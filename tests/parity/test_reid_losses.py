"""The losses of fine-tuning and the learning rates that it really uses, beside the reference's numbers."""

from statistics import mean

import pytest
import torch
from torch import Tensor

from tests.support.golden import difference, golden, tolerance
from training.engine.clock import Clock
from training.engine.param_groups import settings_at
from training.engine.settings import OptimisationConfig
from training.nn.identity.reid_losses import distances, hardest, identity, triplet


def triplet_of(features: Tensor, labels: Tensor, margin: float = 0.0) -> Tensor:
    return triplet(*hardest(distances(features, features), labels, labels), margin).mean()


@pytest.mark.parametrize(("margin", "name"), [(0.0, "triplet"), (0.3, "triplet_margin")])
def test_triplet__loss_and_gradient(margin: float, name: str) -> None:
    about, tensors = golden("reid_losses")
    features = tensors["features"].clone().requires_grad_()
    loss = triplet_of(features, tensors["labels"], margin)
    loss.backward()
    assert features.grad is not None
    assert difference(loss, tensors[f"{name}_loss"]) < tolerance(about, "loss")
    assert difference(features.grad, tensors[f"{name}_grad_features"]) < tolerance(about, "gradient")


def test_hardest__are_the_reference_s_images() -> None:
    about, tensors = golden("reid_losses")
    features, labels = tensors["features"], tensors["labels"]
    far = distances(features, features)
    for kind, found in zip(("positive", "negative"), hardest(far, labels, labels), strict=True):
        assert difference(found, tensors[f"hardest_{kind}_distance"]) < tolerance(about, "loss")
        theirs = far.gather(1, tensors[f"hardest_{kind}_index"][:, None])[:, 0]
        assert torch.equal(found, theirs), kind


def test_total__identity_and_triplet_with_and_without_smoothing() -> None:
    about, tensors = golden("reid_losses")
    setting, labels = about["hyper_parameters"], tensors["labels"]
    features, scores = (tensors[name].clone().requires_grad_() for name in ("features", "scores"))
    known = identity(scores, labels).mean()
    total = setting["id_weight"] * known + setting["triplet_weight"] * triplet_of(features, labels)
    total.backward()
    assert features.grad is not None and scores.grad is not None
    assert difference(known, tensors["identity_loss"]) < tolerance(about, "loss")
    assert difference(total, tensors["total_loss"]) < tolerance(about, "loss")
    assert difference(scores.grad, tensors["total_grad_scores"]) < tolerance(about, "gradient")
    assert difference(features.grad, tensors["total_grad_features"]) < tolerance(about, "gradient")
    smooth = identity(scores, labels, smoothing=setting["label_smoothing"]).mean() + triplet_of(features, labels)
    assert difference(smooth, tensors["total_loss_label_smoothing"]) < tolerance(about, "loss")


def test_total__several_heads_by_the_reference_s_weights() -> None:
    """Half the first head plus half the mean of the others, for both terms. No recipe has several heads."""
    about, tensors = golden("reid_losses")
    heads = sorted(name.removeprefix("list/scores") for name in tensors if name.startswith("list/scores"))
    labels = tensors["labels"]
    known = [float(identity(tensors[f"list/scores{head}"], labels).mean()) for head in heads]
    apart = [float(triplet_of(tensors[f"list/features{head}"], labels)) for head in heads]
    total = sum(0.5 * values[0] + 0.5 * mean(values[1:]) for values in (known, apart))
    assert difference(torch.tensor(total), tensors["list/total_loss"]) < tolerance(about, "loss")


@pytest.mark.parametrize(("kind", "factor"), [("weight", 1.0), ("bias", None)])
def test_learning_rates__those_that_epochs_train_with(kind: str, factor: float | None) -> None:
    """Over the whole run, at the first and the last step of each epoch, whose steps are not whole."""
    about, tensors = golden("reid_losses")
    setting = about["hyper_parameters"]["lr"]
    lr, epochs = setting["base_lr"], setting["epochs"]
    config = OptimisationConfig(
        schedule="epoch", epochs=epochs, warmup_epochs=setting["warmup_epochs"], lr=lr,
        warmup_lr=setting["warmup_start_factor"] * lr, final_lr=setting["lr_min_factor"] * lr,
    )  # fmt: skip
    clock = Clock(batch=64, epoch_samples=1_000, epochs=epochs, seed=0)
    first = [-(-epoch * 1_000 // 64) * 64 for epoch in range(epochs + 1)]
    group = setting["bias_lr_factor"] if factor is None else factor
    for samples in (first, [start - 64 for start in first[1:]]):
        ours = [settings_at(config, clock.at(place)).lr_of(group) for place in samples]
        theirs = tensors[f"lr/used_{kind}"][: len(ours)]
        torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), theirs, rtol=tolerance(about, "lr"), atol=0)


def naive(features: Tensor, anchor: Tensor, label: Tensor, known: Tensor, margin: float) -> list[float]:
    """Anchor by anchor, image by image."""
    losses = []
    for row, own in zip(features[: len(anchor)], anchor.tolist(), strict=True):
        far = [((row - other) ** 2).sum().sqrt() for other in features]
        pairs = [(d, who) for d, who, real in zip(far, label.tolist(), known.tolist(), strict=True) if real]
        excess = max(d for d, who in pairs if who == own) - min(d for d, who in pairs if who != own)
        losses.append(max(0.0, float(excess) + margin) if margin else float(torch.log1p(torch.exp(excess))))
    return losses


@pytest.mark.parametrize("margin", [0.0, 0.3])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_triplet__naive_loop_without_unknown_images(seed: int, margin: float) -> None:
    noise = torch.Generator().manual_seed(seed)
    features = torch.randn(11, 6, dtype=torch.float64, generator=noise)
    label = torch.tensor([4, 4, 7, 7, 2, 2, 4, 7, 2, 0, 0])
    known = torch.tensor([True] * 9 + [False] * 2)
    seen = label.masked_fill(~known, -1)
    ours = triplet(*hardest(distances(features[:8], features), seen[:8], seen), margin)
    assert ours.tolist() == pytest.approx(naive(features, label[:8], label, known, margin), rel=1e-6)


def test_identity__naive_loop_and_nothing_for_the_unknown() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    label = torch.tensor([3, -1, 0, 4])
    shares = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    for smoothing in (0.0, 0.2):
        target = torch.full((4, 5), smoothing / 5, dtype=torch.float64)
        target[torch.arange(4), label.clamp(min=0)] += 1 - smoothing
        expected = [-float((target[row] * shares[row].log()).sum()) if label[row] >= 0 else 0.0 for row in range(4)]
        assert identity(logits, label, smoothing=smoothing).tolist() == pytest.approx(expected, rel=1e-12)


def test_hardest__one_identity_alone_has_no_negative() -> None:
    features = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    label = torch.zeros(4, dtype=torch.int64)
    loss = triplet_of(features, label)
    loss.backward()
    assert float(loss.detach()) == 0 and features.grad is not None and torch.isfinite(features.grad).all()
