"""Pseudo labels of every epoch of a run that learns from clusters: made, kept in the run folder, and taken over.

Before the first step of an epoch all training images are embedded by all ranks, clustered by one, and put down:

    pseudo_labels/epoch_0007.parquet       key, name, label of every image; -1: outside all clusters
    pseudo_labels/epochs.jsonl             a line an epoch: clusters, outliers, agreement with true identities, seconds
    pseudo_labels/epoch_0007.safetensors   what training needs: labels and memory, and which checkpoint they were made
                                           from; written last

A run that is stopped before its next checkpoint takes them from there; later on they are part of the checkpoints.
"""

import io
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pyarrow
import pyarrow.parquet
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray

from datapipe.core.errors import DataError, NotFoundError, UserError
from datapipe.core.progress import counted
from datapipe.core.randomness import Ints
from datapipe.sampling.cluster_order import ClusterOrder
from datapipe.views.normalisation import MEAN_STD
from training import checkpoint, methods
from training.clustering.settings import ClusteringConfig
from training.config.run_plan import RunPlan, clustered
from training.core.host import Host, run_lines
from training.core.run_folder.run_folder import RunFolder
from training.core.world import World
from training.engine.clock import Clock
from training.methods.base import ByCluster, Method
from training.reid.embed import EmbedConfig, Embedder
from training.reid.embed_stream import embed_stream
from training.trainer.alive import alive

if TYPE_CHECKING:
    from datapipe.stream.loader import Loader

FOLDER = "pseudo_labels"
HISTORY = f"{FOLDER}/epochs.jsonl"
GIANT = 0.5
"""Share of the clustered images in one cluster from which on that is warned of."""
NOISE = 0.9
"""Share of images outside all clusters from which on that is warned of."""

Features = NDArray[np.floating[Any]]


class TrainingImages(NamedTuple):
    """What is known of the images that are clustered, row by row."""

    keys: pyarrow.Array
    names: pyarrow.Array
    cameras: Ints
    """-1 where unknown."""
    identities: Ints
    """True ones, for measuring alone; -1 where unknown."""


@dataclass(frozen=True)
class Work:
    """What labelling is made of; functions of the run, or of a test."""

    embed: Callable[[], Features]
    """Features [N, F] of all training images, as the network is now; on every rank, called by all together."""
    cluster: Callable[[Features, ClusteringConfig], Ints]
    """Labels [N]; called by one rank."""
    follow: Callable[[Ints, ClusterOrder], None]
    """Has the batches of the coming steps made by these labels, in this order."""


class PseudoLabels:
    """The pseudo labels of a run. Every rank calls every method, in the same steps."""

    def __init__(
        self, clusters: ByCluster, method: Method, images: TrainingImages, work: Work, *, clock: Clock, world: World,
        host: Host, folder: RunFolder | None, made_from: Callable[[int], str] = lambda _: "",
    ) -> None:  # fmt: skip
        """`folder` None: nothing is kept. `made_from`: what tells the checkpoint of a position from all others, "" at
        the start of the run; asked of one rank."""
        self._clusters, self._method, self._images, self._work = clusters, method, images, work
        self._clock, self._world, self._host, self._folder = clock, world, host, folder
        self._made_from = made_from

    def ends(self) -> list[int]:
        """Samples seen at the end of each epoch."""
        return self._clock.epoch_ends

    def begin(self, position: int) -> bool:
        """Return once the epoch of this position has its labels, memory and order: True where they were made now. What
        a restored checkpoint has of an epoch under way is taken over. Raises DataError where clustering gives nothing
        that can be trained on."""
        made = False
        epoch = position // self._clock.epoch_samples
        start = epoch * self._clock.epoch_samples
        if position == start:
            with alive(self._host, position // self._clock.batch):
                made = self._label(epoch, start)
        labels = self._method.state_dict()["labels"].cpu().numpy().copy()  # the next epoch writes over them
        self._work.follow(labels, self._order(labels, start))
        return made

    def _label(self, epoch: int, start: int) -> bool:
        """True: by clustering; False: they were kept from before."""
        kept = self._together(lambda: self._kept(epoch, start))
        if kept is None:
            began = time.monotonic()
            features = self._work.embed()
            embedded = time.monotonic()
            labels = self._together(lambda: self._clustered(features, epoch))
            self._method.begin_epoch(torch.from_numpy(labels), torch.from_numpy(features))
            seconds = {"embed_s": embedded - began, "cluster_s": time.monotonic() - embedded}
            self._together(lambda: self._keep(epoch, start, labels, seconds))
        else:
            run_lines.info(f"epoch {epoch + 1:,}: labels as they were made before")
            self._adopt(kept)
        return kept is None

    def _together(self, work: Callable[[], Any]) -> Any:
        """The leading rank's result of `work`, on all ranks; where it fails all raise."""
        result: Any = None
        if self._world.is_leader:
            try:
                result = work()
            except UserError as error:
                result = error
        self._world.meet()  # clustering may take longer than any collective may
        result = self._world.broadcast(result)
        if isinstance(result, UserError):
            raise result
        return result

    def _clustered(self, features: Features, epoch: int) -> Ints:
        """On the leading rank: labels, and what is to be said of them."""
        labels = self._work.cluster(features, self._clusters.clustering)
        sizes = np.bincount(labels[labels >= 0])
        run_lines.info(described(epoch, sizes, len(labels)))
        for warning in doubts(sizes, len(labels)):
            run_lines.warning(warning)
        if not len(sizes):
            raise DataError(
                f"epoch {epoch + 1:,}: all {len(labels):,} images are noise: clustering found no cluster",
                hint="a larger method.clustering.eps, a smaller method.clustering.min_samples, or other weights",
            )
        self._order(labels, epoch * self._clock.epoch_samples)
        return labels

    def _order(self, labels: Ints, start: int) -> ClusterOrder:
        clusters = self._clusters
        together = max(clusters.group, clusters.instances)
        return ClusterOrder(
            labels, self._images.cameras if clusters.cameras else None, seed=self._clock.seed, start=start,
            clusters=self._clock.batch // clusters.instances, instances=clusters.instances,
            together=together if together % clusters.instances == 0 else self._clock.batch,
        )  # fmt: skip

    # -- the run folder -------------------------------------------------------------------------------------------

    def _keep(self, epoch: int, start: int, labels: Ints, seconds: dict[str, float]) -> None:
        """On the leading rank: put down what an epoch begins with."""
        if self._folder is None:
            return
        name = f"{FOLDER}/epoch_{epoch + 1:04d}"
        table = pyarrow.table({"key": self._images.keys, "name": self._images.names, "label": labels})
        buffer = io.BytesIO()
        pyarrow.parquet.write_table(table, buffer, compression="zstd")
        self._folder.write(f"{name}.parquet", buffer.getvalue())
        self._folder.append(HISTORY, json.dumps({
            "epoch": epoch, "position": start, **quality(labels, self._images.identities), **seconds,
        }))  # fmt: skip
        state = self._method.state_dict()
        tensors = {key: state[key].cpu().contiguous() for key in ("labels", "memory")}
        about = {"made_from": self._made_from(start), "position": str(start)}
        self._folder.write(f"{name}.safetensors", safetensors.torch.save(tensors, about))

    def _kept(self, epoch: int, start: int) -> dict[str, torch.Tensor] | None:
        """On the leading rank: what was put down for this epoch from the very weights that the network has now."""
        if self._folder is None:
            return None
        try:
            data = self._folder.store.read(f"{FOLDER}/epoch_{epoch + 1:04d}.safetensors")
            tensors = safetensors.torch.load(data)
            about = _metadata(data)
        except (NotFoundError, safetensors.SafetensorError, ValueError):
            return None
        fitting = about == {"made_from": self._made_from(start), "position": str(start)}
        fitting = fitting and tensors["labels"].shape == self._method.state_dict()["labels"].shape
        return tensors if fitting else None

    def _adopt(self, kept: dict[str, torch.Tensor]) -> None:
        self._method.adopt_shapes({name: tuple(tensor.shape) for name, tensor in kept.items()})
        state = self._method.state_dict()
        with torch.no_grad():
            for name, tensor in kept.items():
                state[name].copy_(tensor)


def _metadata(data: bytes) -> dict[str, str]:
    """The metadata of the content of a safetensors file that has been loaded, and so is whole. The library gives it of
    files on disk alone (0.8: `safe_open`); the format is eight bytes with the size of a header in JSON, then that."""
    size = int.from_bytes(data[:8], "little")
    about: dict[str, str] = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    return about


def described(epoch: int, sizes: Ints, images: int) -> str:
    """An epoch's clusters in a line. `sizes`: images of each."""
    outside = images - int(sizes.sum())
    if not len(sizes):
        return f"epoch {epoch + 1:,}: no clusters, all {images:,} images are noise"
    largest = counted(int(sizes.max()), "image")
    return (f"epoch {epoch + 1:,}: {counted(len(sizes), 'cluster')}, the largest of {largest}; "
            f"{outside:,} of {images:,} images outside ({outside / images:.1%})")  # fmt: skip


def doubts(sizes: Ints, images: int) -> list[str]:
    """What looks wrong with clusters, and what to try."""
    if not len(sizes):
        return []
    found = []
    if sizes.max() > GIANT * sizes.sum() and len(sizes) > 1 or len(sizes) == 1:
        found.append(f"one cluster holds {sizes.max() / sizes.sum():.0%} of the clustered images: a smaller "
                     "method.clustering.eps separates them")  # fmt: skip
    outside = images - int(sizes.sum())
    if outside > NOISE * images:
        found.append(f"{outside / images:.0%} of the images are outside all clusters: a larger method.clustering.eps "
                     "takes more of them in")  # fmt: skip
    return found


def quality(labels: Ints, identities: Ints) -> dict[str, Any]:
    """Clusters, outliers, and, over the clustered images of known identity, how well both agree: the adjusted Rand
    index (Hubert and Arabie, 1985) and normalised mutual information, as scikit-learn computes them."""
    sizes = np.bincount(labels[labels >= 0])
    found: dict[str, Any] = {"clusters": len(sizes), "outliers": int((labels < 0).sum()),
                             "largest": int(sizes.max(initial=0))}  # fmt: skip
    known = (labels >= 0) & (identities >= 0)
    if known.any():
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

        found["identities"] = len(np.unique(identities[identities >= 0]))
        found["ari"] = float(adjusted_rand_score(identities[known], labels[known]))
        found["nmi"] = float(normalized_mutual_info_score(identities[known], labels[known]))
    return found


def make_pseudo_labels(
    plan: RunPlan, method: Method, loader: "Loader", *, world: World, host: Host, folder: RunFolder
) -> PseudoLabels | None:
    """The pseudo labels of a run, if its method learns from them."""
    config = plan.config
    clusters = clustered(config)
    if clusters is None:
        return None
    stream = loader.stream
    tables = [manifest.table(["key", "name"], config.storage) for manifest in stream.manifests]
    table = pyarrow.concat_tables(tables)
    images = TrainingImages(table["key"].combine_chunks(), table["name"].combine_chunks(), stream.camera, stream.pid)
    mean, std = MEAN_STD[config.views.statistics]
    embedding = EmbedConfig(
        interpolation=config.evaluation.interpolation, mean=mean, std=std, batch=config.evaluation.scoring.embed_batch,
        threads=loader.threads,
    )  # fmt: skip
    feature = methods.quoted_feature(config.method)

    def embed() -> Features:
        return embed_stream(cast(Embedder, method.embedder()), stream, feature, size=config.backbone.size, world=world,
                            config=embedding, label="embed the training images")  # fmt: skip

    def made_from(position: int) -> str:
        if not position:
            return ""
        store = folder.at("checkpoints")
        return checkpoint.read_marker(store, checkpoint.name_of(position // plan.clock.batch)).sha256

    def labelled(features: Features, settings: ClusteringConfig) -> Ints:
        from training.clustering.dbscan import cluster  # scikit-learn takes a second to import, and no start needs it

        return cluster(features, settings, threads=loader.threads)

    work = Work(embed, labelled, lambda labels, order: loader.follow(order, labels))
    return PseudoLabels(clusters, method, images, work, clock=plan.clock, world=world, host=host, folder=folder,
                        made_from=made_from)  # fmt: skip
