"""Unsupervised training beside the reference: memory, necks, sampler, and whole runs through the users' loop."""

import numpy as np
import pytest
import torch
from torch import Tensor

from datapipe.core.randomness import Ints
from datapipe.sampling.cluster_order import ClusterOrder
from tests.support.cluster_trajectory import ClusterRun, run_clusters
from tests.support.golden import golden, group
from tests.support.ranks import run_ranks
from training.core.world import World
from training.methods.supervised import IdentityHead, SupervisedConfig
from training.nn.ics_stem import settle, take_statistics
from training.nn.identity.cluster_memory import contrast, updated
from training.nn.identity.necks import TokenNecks
from training.reid.retrieval import _whole_distances, evaluate, evaluate_distances

RUNS = [("train_usl", 1), ("train_usl", 2), ("train_usl_pass", 1), ("train_usl_pass", 2)]


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.detach().double() - theirs.double()).abs().max())


@pytest.mark.parametrize(("rule", "prefix"), [("hardest", ""), ("each", "mean_update/")])
def test_cluster_memory__loss_gradient_and_update(rule: str, prefix: str) -> None:
    about, tensors = golden("cluster_memory")
    given = about["hyper_parameters"]
    for call in ("call0/", "call1/"):
        inputs, targets = tensors[f"{call}input"].clone().requires_grad_(), tensors[f"{call}targets"]
        memory = tensors[f"{call}{prefix}memory_before"]
        unit = torch.nn.functional.normalize(inputs, dim=1)
        loss_B, _ = contrast(unit, targets, memory, given["temp"] if "temp" in given else given["temperature"])
        loss_B.mean().backward()
        theirs = tensors[f"{call}{prefix}loss"]
        assert abs(float(loss_B.mean().detach() - theirs)) < 1e-5 * float(theirs)
        grad = tensors[f"{call}{prefix}grad_input"]
        assert difference(inputs.grad, grad) < 1e-5 * float(grad.abs().max())
        after = updated(memory, unit.detach(), targets, momentum=given["momentum"], rule=rule)  # type: ignore[arg-type]
        assert difference(after, tensors[f"{call}{prefix}memory_after"]) < 1e-6


@pytest.mark.parametrize(("fusion", "neck", "prefix"), [
    ("cat", "one", "cat_single/"), ("mean", "one", "mean_single/"), ("cat", "each", "cat_multi/"),
    ("mean", "each", "mean_multi/")])  # fmt: skip
def test_necks__outputs_gradients_and_statistics(fusion: str, neck: str, prefix: str) -> None:
    about, tensors = golden("usl_necks")
    given = about["hyper_parameters"]
    necks = TokenNecks(given["width"], given["parts"], fusion=fusion, neck=neck, group=given["batch"])  # type: ignore[arg-type]
    necks.load_state_dict(group(tensors, f"{prefix}state/"), strict=False)
    names = ["cls", *(f"pt{part}" for part in range(1, given["parts"] + 1))]
    tokens = {name: tensors[f"train/{name}"].clone().requires_grad_() for name in names}
    output = necks(tokens["cls"], torch.stack([tokens[name] for name in names[1:]], dim=1))
    theirs = tensors[f"{prefix}train_output"]
    assert difference(output, theirs) < 1e-5 * float(theirs.abs().max())
    (output * tensors[f"{prefix}upstream"]).sum().backward()
    ours = {name: token.grad for name, token in tokens.items()}
    ours |= {name: value.grad for name, value in necks.named_parameters() if value.requires_grad}
    for name, grad in group(tensors, f"{prefix}grad/").items():
        assert difference(ours[name], grad) < 1e-5 * float(grad.abs().max()), name
    settle(necks, take_statistics(necks, torch.tensor(1.0)))
    for name, buffer in group(tensors, f"{prefix}after/").items():
        assert difference(necks.get_buffer(name), buffer) <= 1e-5 * float(buffer.abs().max()), name
    necks.train(False)
    tested = necks(tensors["test/cls"], torch.stack([tensors[f"test/{name}"] for name in names[1:]], dim=1))
    theirs = tensors[f"{prefix}eval_output"]
    assert difference(tested, theirs) < 1e-5 * float(theirs.abs().max())


@pytest.mark.parametrize("fusion", ["cat", "mean"])
def test_supervised_head__fuses_and_normalises_as_the_single_neck(fusion: str) -> None:
    """With a classifier that changes nothing the logits of fine-tuning are what unsupervised training normalises."""
    about, tensors = golden("usl_necks")
    width, parts = about["hyper_parameters"]["width"], about["hyper_parameters"]["parts"]
    channels = width * (2 if fusion == "cat" else 1)
    config = SupervisedConfig(parts=parts, fusion=fusion, neck="one", classes=channels)  # type: ignore[arg-type]
    head = IdentityHead(config, width)
    state = group(tensors, f"{fusion}_single/state/")
    head.load_state_dict(state | {"classifier.weight": torch.eye(channels)}, strict=False)
    cls, *each = (tensors[f"train/{name}"] for name in ("cls", *(f"pt{part}" for part in range(1, parts + 1))))
    logits = head(cls, torch.stack(each, dim=1), torch.ones(len(cls), dtype=torch.bool)).logits_BK
    theirs = tensors[f"{fusion}_single/train_output"]
    assert difference(torch.nn.functional.normalize(logits, dim=1), theirs) < 1e-5 * float(theirs.abs().max())


def _statistics(draws: Ints, labels: Ints, cameras: Ints, instances: int) -> dict[str, float]:
    """Shares over groups of `instances` rows, the anchor first."""
    groups = draws.reshape(-1, instances)
    anchor, others = groups[:, 0], groups[:, 1:]
    cameras_of = {label: set(cameras[labels == label].tolist()) for label in np.unique(labels[anchor])}
    has_other = np.array([len(cameras_of[label]) > 1 for label in labels[anchor]])
    return {
        "another camera": float((cameras[others] != cameras[anchor][:, None])[has_other].mean()),
        "twice": float(np.mean([len(set(row)) < instances for row in groups.tolist()])),
        "anchor again": float((others == anchor[:, None]).any(axis=1).mean()),
    }


@pytest.mark.parametrize("variant", ["camera_aware", "no_camera"])
def test_cluster_order__draws_as_the_reference_does(variant: str) -> None:
    """Shares, and how often each image is drawn, within three standard errors of two independent samples."""
    about, tensors = golden("usl_sampler")
    given = about["hyper_parameters"]
    labels, cameras = tensors["labels"].numpy(), tensors["cameras"].numpy()
    theirs = tensors[f"{variant}/draws"].numpy().astype(np.int64)
    clusters, instances = given["clusters"], given["instances"]
    order = ClusterOrder(labels, cameras if variant == "camera_aware" else None, seed=3, start=800, clusters=clusters,
                         instances=instances)  # fmt: skip
    ours = order.samples(800 + np.arange(theirs.size)).reshape(theirs.shape)
    for row in ours:  # every cluster once a pass, all of a group from one cluster
        assert sorted(labels[row[::instances]]) == list(range(clusters))
        assert (labels[row].reshape(-1, instances) == labels[row[::instances]][:, None]).all()
    groups = theirs.size // instances
    one, other = (_statistics(draws, labels, cameras, instances) for draws in (ours, theirs))
    for name in one:
        spread = 3 * np.sqrt(2 * max(other[name] * (1 - other[name]), 1e-12) / groups) + 1e-9
        assert abs(one[name] - other[name]) <= spread, (name, one[name], other[name])
    counts, expected = (np.bincount(draws.ravel(), minlength=len(labels)) for draws in (ours, theirs))
    beyond = np.abs(counts - expected) > 3 * np.sqrt(counts + expected + 1)
    assert beyond.mean() < 0.01  # three standard errors of each: 3 in 1,000 by chance
    for ours_or_theirs in (ours, theirs):
        assert not set(np.flatnonzero(labels < 0)) & set(ours_or_theirs.ravel().tolist())


def _check(found: ClusterRun, item: str, replicas: int, *, exact: bool) -> None:
    about, tensors = golden(item)
    given, prefix = about["hyper_parameters"], "" if replicas == 1 else f"replicas{replicas}/"
    kind, loss, rest = ("f64", 1e-8, 1e-8) if exact else ("f32", 2e-5, 1e-5)
    losses = torch.cat([tensors[f"{prefix}epoch{epoch}/{kind}/losses"] for epoch in range(given["epochs"])]).double()
    assert float(((torch.tensor(found.losses, dtype=torch.float64) - losses) / losses).abs().max()) < loss
    for epoch in range(given["epochs"]):
        name = f"{prefix}epoch{epoch}"
        assert np.array_equal(found.labels[epoch], tensors[f"{name}/labels"].numpy()), epoch
        assert difference(torch.from_numpy(found.features[epoch]), tensors[f"{name}/f64/features"]) < rest, epoch
        assert difference(found.started[epoch], tensors[f"{name}/f64/memory_start"]) < rest, epoch
        assert difference(found.ended[epoch], tensors[f"{name}/f64/memory_end"]) < rest, epoch
        drawn = torch.from_numpy(found.labels[epoch])[tensors[f"{name}/batches"]]
        assert torch.equal(drawn, tensors[f"{name}/targets"])
    wanted = np.repeat(tensors["lr"].numpy(), given["iters"])
    assert np.allclose(found.rates, wanted, rtol=1e-12, atol=0)
    for name, theirs in group(tensors, f"{prefix}final/").items():
        ours = found.state[f"student.{'head' if name.startswith('bottleneck') else 'backbone'}.{name}"]
        assert difference(ours, theirs) < rest, name


@pytest.mark.parametrize(("item", "replicas"), RUNS)
def test_cluster_contrast__whole_runs_in_float64(item: str, replicas: int) -> None:
    _check(run_clusters(World(), item, dtype=torch.float64, replicas=replicas), item, replicas, exact=True)


def _on_ranks(world: World, exact: bool) -> list[ClusterRun]:
    stage = None if exact else 1
    dtype = torch.float64 if exact else torch.float32
    return [run_clusters(world, item, dtype=dtype, replicas=2, zero_stage=stage)
            for item in ("train_usl", "train_usl_pass")]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "exact"), [(2, True), (2, False), (3, True)],
                         ids=["float64 plain", "float32 DeepSpeed", "a rank too many"])  # fmt: skip
def test_cluster_contrast__whole_runs_on_several_ranks(ranks: int, exact: bool) -> None:
    """The batch of a rank is one of the reference's replicas, and where there are none left padding; all ranks have one
    memory."""
    golden("train_usl"), golden("train_usl_pass")  # skips here, not in the ranks
    results = run_ranks(ranks, _on_ranks, exact)
    for number, item in enumerate(("train_usl", "train_usl_pass")):
        first, *others = (result[number] for result in results)
        for other in others:
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(first.ended, other.ended, strict=True))
        _check(first, item, 2, exact=exact)


@pytest.mark.parametrize("prefix", ["", "ties/"])
def test_retrieval__as_unsupervised_code_scores(prefix: str) -> None:
    """Features as they are, not of length 1; scikit-learn's average precision, which takes ties together."""
    _, tensors = golden("usl_retrieval")
    query, gallery = tensors["query_features"].numpy(), tensors[f"{prefix}gallery_features"].numpy()
    labels = [tensors[f"{part}_{what}"].numpy() for what in ("identities", "cameras") for part in ("query", "gallery")]
    distances = tensors[f"{prefix}distmat"].numpy()
    blocks = _whole_distances(np.concatenate([query, gallery]), len(query), 64.0)
    assert np.abs(np.concatenate([block.copy() for _, block in blocks]) - distances).max() < 1e-5
    found = evaluate(query, gallery, *labels, normalise=False, ties="together", ranks=100)
    assert abs(evaluate_distances(distances, *labels, ties="together").mAP - float(tensors[f"{prefix}mAP"])) < 1e-9
    if not prefix:  # with ties the order that `eval_func` sorts them into is nobody's choice
        assert abs(evaluate_distances(distances, *labels).mAP - float(tensors["eval_func_mAP"])) < 1e-9
        assert abs(found.mAP - float(tensors["mAP"])) < 1e-9
        assert np.abs(found.cmc[:100] - tensors["cmc"].numpy()).max() < 1e-6
    else:
        assert abs(found.mAP - evaluate(query, gallery, *labels, normalise=False).mAP) > 0.01
