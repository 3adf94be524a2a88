"""Drives the method, loop, steppers and pseudo labels that users run over a golden run of cluster contrast."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datapipe.core.randomness import Ints
from datapipe.sampling.cluster_order import ClusterOrder
from datapipe.stream.batch import Batch, LoaderCounters
from tests.support.golden import golden, group
from tests.support.trajectory import NoFaults, Noting, _stepper, model_state
from training.clustering.dbscan import cluster
from training.clustering.settings import ClusteringConfig
from training.config.batch_split import BatchSplit, split_batch
from training.core.exchange import Exchange
from training.core.host import LocalHost
from training.core.world import World
from training.engine.clock import Clock
from training.engine.settings import OptimisationConfig
from training.methods import build
from training.methods.base import Views
from training.methods.cluster_contrast import ClusterContrast, ClusterContrastConfig
from training.nn.vision_transformer import BackboneConfig
from training.trainer.loop import Segment, TrainingRun, train
from training.trainer.monitoring.observer import StepDone
from training.trainer.pseudo_labels import PseudoLabels, TrainingImages, Work
from training.weights.counted_keys import load_counted


@dataclass
class ClusterRun:
    """What a run gave, epoch by epoch."""

    losses: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    labels: list[Ints] = field(default_factory=list)
    features: list[np.ndarray] = field(default_factory=list)
    started: list[Tensor] = field(default_factory=list)
    """Memory at the start of each epoch."""
    ended: list[Tensor] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)


class _GoldenBatches:
    """The images that the reference drew, with our labels; padding where a rank has more rows than the batch."""

    intake = LoaderCounters()

    def __init__(self, images: Tensor, drawn: list[Tensor], size: int, split: BatchSplit, rank: int) -> None:
        self.images, self.drawn, self.size, self.split, self.rank = images, drawn, size, split, rank
        self.labels: Ints = np.empty(0, np.int64)

    def follow(self, labels: Ints, order: ClusterOrder) -> None:
        self.labels = labels

    def after(self, position: int, until: int) -> Iterator[Batch]:
        for start in range(position, until, self.size):
            within = self.rank * self.split.per_rank + np.arange(self.split.per_rank)
            real = within < self.size
            drawn = torch.cat([one.flatten() for one in self.drawn]).numpy()
            rows = drawn[start + np.where(real, within, 0)]
            place = np.where(real, start + within, -1)
            views = {"image": (self.images[rows] * torch.from_numpy(real)[:, None, None, None])[None].numpy()}
            weight = np.where(real, 1 / self.size, 0.0)
            labels = np.where(real, self.labels[rows], -1)
            yield Batch(views, place, place, weight, labels, place, start, start + self.size)


def settings_of(item: str, replicas: int) -> tuple[ClusterContrastConfig, BackboneConfig, OptimisationConfig]:
    """Our settings of a golden run."""
    given = golden(item)[0]["hyper_parameters"]
    config = ClusterContrastConfig(
        clustering=ClusteringConfig(k1=given["k1"], k2=given["k2"], eps=given["eps"], min_samples=given["min_samples"]),
        iterations=given["iters"], instances=given["instances"], images=given["train_images"],
        parts=sum(name.startswith("part_token") for name in given["trainable_parameters"]),
        fusion=given.get("feat_fusion", "cat"), neck="each" if given.get("multi_neck") else "one",
        norm_group=given["batch"] // replicas, temperature=given["temp"], momentum=given["momentum"],
        update="hardest" if given["use_hard"] else "each", erase=0.0,
    )  # fmt: skip
    backbone = BackboneConfig(
        arch="custom", size=tuple(given["img_size"]), patch=given["patch"], width=given["embed_dim"],
        depth=given["depth"], heads=given["num_heads"], mlp_ratio=given["mlp_ratio"],
    )  # fmt: skip
    optimisation = OptimisationConfig(
        epochs=given["epochs"], batch=given["batch"], optimizer="sgd", momentum=0.9, schedule="staircase",
        staircase_epochs=given["step_size"], staircase_factor=given["gamma"], lr=given["lr"], warmup_epochs=0.0,
        weight_decay=given["weight_decay"], final_weight_decay=given["weight_decay"], clip="none", precision="fp32",
    )  # fmt: skip
    return config, backbone, optimisation


def initial(item: str, replicas: int) -> ClusterContrast:
    """The method in the golden run's initial state."""
    config, backbone, _ = settings_of(item, replicas)
    method = build(config, backbone)
    assert isinstance(method, ClusterContrast)
    given = group(golden(item)[1], "init/")
    necks = {name: given.pop(name) for name in list(given) if name.startswith("bottleneck")}
    load_counted(method.student.backbone, given)
    load_counted(method.student.head, necks)
    return method


def run_clusters(
    world: World, item: str, *, dtype: torch.dtype, replicas: int = 1, zero_stage: int | None = None, until: int = 0
) -> ClusterRun:
    """The whole run, or its first `until` samples; `zero_stage` None: the plain stepper."""
    about, tensors = golden(item)
    given, prefix = about["hyper_parameters"], "" if replicas == 1 else f"replicas{replicas}/"
    config, _, optimisation = settings_of(item, replicas)
    method = initial(item, replicas).to(dtype)
    split = split_batch(optimisation.batch, config.norm_group, world.size, config.norm_group)
    clock = Clock(optimisation.batch, optimisation.batch * config.iterations, optimisation.epochs, seed=1)
    images = tensors["images"]
    train_images = images[: given["train_images"]].to(dtype)
    drawn = [tensors[f"{prefix}epoch{epoch}/batches"] for epoch in range(given["epochs"])]
    source = _GoldenBatches(images, drawn, optimisation.batch, split, world.rank)
    found = ClusterRun()

    def embed() -> np.ndarray:
        network = method.embedder().train(False)
        with torch.inference_mode():
            features = network.named_features(train_images)["neck"].numpy()  # type: ignore[operator]
        network.train(True)
        found.features.append(features)
        return features

    def follow(labels: Ints, order: ClusterOrder) -> None:
        source.follow(labels, order)
        found.labels.append(labels.copy())
        found.started.append(method.memory.clone())

    def place(batch: Batch) -> Views:
        views: dict[str, Any] = {"image": torch.from_numpy(batch.views["image"]).to(dtype)}
        for name in ("position", "sample", "label"):
            views[name] = torch.from_numpy(getattr(batch, name))
        return {**views, "weight": torch.from_numpy(batch.weight).to(dtype)}  # type: ignore[return-value]

    def watch(step: StepDone) -> None:
        found.losses.append(step.result.loss)
        found.rates.append(step.settings.lr)

    stepper = _stepper(method, optimisation, world, split, zero_stage)
    run = TrainingRun(
        method=method, stepper=stepper, loader=source, place=place, clock=clock, optimisation=optimisation,
        micro_batch=split.micro_batch, checkpoints=None, host=LocalHost(), faults=NoFaults(), exchange=Exchange(world),
        observers=[Noting(watch)],
    )  # fmt: skip
    rows = given["train_images"]
    known = TrainingImages(None, None, tensors["train_cameras"].numpy(), np.full(rows, -1))
    clusters = ClusterContrast.by_cluster(config)
    labels = PseudoLabels(
        clusters, method, known, Work(embed, cluster, follow), clock=clock, world=world, host=LocalHost(), folder=None
    )
    position = 0
    for end in labels.ends():
        labels.begin(position)
        position, _ = train(run, Segment(end), position=position)
        found.ended.append(method.memory.clone())
    found.state = model_state(stepper, world)
    return found
