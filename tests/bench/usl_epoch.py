"""An epoch of training without labels, in shares: features, neighbours, Jaccard distances, DBSCAN, iterations."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np

from datapipe.core.config import StorageConfig, SynthConfig
from datapipe.synth.market_folder import render
from tests.bench.measure import Spread
from tests.bench.scale import Scale
from tests.bench.table import Row, Table
from training.clustering.dbscan import cluster_graph
from training.clustering.jaccard import MOST_NEAR, near_pairs
from training.clustering.k_reciprocal import memberships
from training.clustering.nearest import nearest_neighbours
from training.clustering.settings import ClusteringConfig
from training.core.host import LocalHost
from training.core.run_folder.run_folder import RunFolder
from training.core.world import alone
from training.evaluation.fine_tune import prepare
from training.reid.settings import RANDOM
from training.report.run_files import RunFiles
from training.trainer.pretrain import pretrain
from training.trainer.pseudo_labels import HISTORY

CAMERAS, IMAGES = 4, 4
"""Of each rendered person: so many cameras, and images in each."""


@dataclass(frozen=True)
class _Parts:
    """Seconds of one clustering."""

    search: float
    jaccard: float
    dbscan: float


def usl_epoch(scale: Scale) -> Table:
    """Train ViT-S without labels on rendered people for one epoch, and say what its time went to."""
    people = max(4, scale.usl_images // (CAMERAS * IMAGES))
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "people"
        render(data, SynthConfig(train_identities=people, test_identities=2, cameras=CAMERAS, images=IMAGES))
        epoch = _trained(str(data), f"{folder}/run", scale)
    parts = _clustered(people * CAMERAS * IMAGES, scale)
    whole = sum(epoch.values()) + parts.search + parts.jaccard + parts.dbscan
    shares = {
        "features": epoch["embed"], "neighbours": parts.search, "Jaccard distances": parts.jaccard,
        "DBSCAN": parts.dbscan, "iterations": epoch["iterations"],
    }  # fmt: skip
    rows = tuple(Row(f"{name}, % of the epoch", Spread.of([100 * part / whole])) for name, part in shares.items())
    about = (f"{people * CAMERAS * IMAGES} rendered crops, ViT-S at 128 x 64, {scale.usl_iterations} iterations of "
             f"{scale.usl_batch} images, one process")  # fmt: skip
    notes = (
        "features and iterations are those of a run as users start it; the three steps of clustering are timed on "
        "random features of as many images and 384 channels, about centres: time depends on sizes and little else",
        f"published: 12,936 images, 200 iterations of 256, so that an image is trained on {200 * 256 / 12_936:.1f} "
        "times an epoch and embedded once",
    )
    return Table("usl_epoch", about, "% of the wall clock", rows, notes)


def _trained(data: str, out: str, scale: Scale) -> dict[str, float]:
    """Seconds of an epoch by part."""
    batch = str(scale.usl_batch)
    flags = [
        "--backbone.size", "128", "64", "--optimisation.epochs", "1", "--optimisation.batch", batch,
        "--optimisation.micro-batch", batch, "--method.iterations", str(scale.usl_iterations),
        "--method.norm-group", batch, "--method.instances", str(scale.usl_batch // 2), "--method.clustering.k1", "12",
        "--method.clustering.k2", "4", "--method.clustering.min-samples", "1", "--method.clustering.eps", "0.3",
        "--engine.stepper", "plain", "--engine.device", "cpu",
    ]  # fmt: skip
    config = prepare(RANDOM, data, out, task="usl", flags=flags)
    with alone("cpu") as world:
        pretrain(config, world=world, host=LocalHost())
    made = json.loads(Path(out, HISTORY).read_text().splitlines()[0])
    records = RunFiles(RunFolder(out, StorageConfig())).records
    images_per_s = float(np.median([record["images_per_s"] for record in records if "images_per_s" in record]))
    return {"embed": made["embed_s"], "iterations": scale.usl_iterations * scale.usl_batch / images_per_s}


def _clustered(images: int, scale: Scale) -> _Parts:
    """Seconds of the steps of clustering as many images."""
    random = np.random.default_rng(0)
    config = ClusteringConfig()
    features = random.standard_normal((images, scale.channels), np.float32)
    features += (
        2 * random.standard_normal((max(2, images // 16), scale.channels), np.float32).repeat(16, axis=0)[:images]
    )
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    began = perf_counter()
    nearest = nearest_neighbours(features, config.k1)
    searched = perf_counter()
    members = memberships(features, nearest, k1=config.k1, k2=config.k2, threads=1)
    graph = near_pairs(members, config.eps, most=MOST_NEAR * nearest.size, threads=1, label="pairs")
    compared = perf_counter()
    cluster_graph(graph, config)
    return _Parts(searched - began, compared - searched, perf_counter() - compared)
