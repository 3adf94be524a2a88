"""Labels that were put down for an epoch: taken over by who goes on from the same weights, else made anew."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import torch

from datapipe.core.config import StorageConfig
from training.core.host import LocalHost
from training.core.run_folder.run_folder import RunFolder
from training.core.world import World
from training.engine.clock import Clock
from training.methods.cluster_contrast import ClusterContrast, ClusterContrastConfig
from training.nn.vision_transformer import BackboneConfig
from training.trainer.pseudo_labels import PseudoLabels, TrainingImages, Work

IMAGES, BATCH = 12, 6
CONFIG = ClusterContrastConfig(instances=3, iterations=2, images=IMAGES, norm_group=0, cameras=False)
BACKBONE = BackboneConfig(arch="custom", size=(16, 8), patch=8, width=8, depth=1, heads=2)
LABELS = np.where(np.arange(IMAGES) == 11, -1, np.arange(IMAGES) % 3)
KEPT = "pseudo_labels/epoch_0001.safetensors"


def begun(folder: Path, made_from: str = "") -> tuple[ClusterContrast, int]:
    """A fresh method at the start of its first epoch, and how often images were embedded for that."""
    method, asked = ClusterContrast(CONFIG, BACKBONE), []
    names = pyarrow.array([f"{row}.jpg" for row in range(IMAGES)])
    images = TrainingImages(names, names, np.zeros(IMAGES, np.int64), np.full(IMAGES, -1))

    def embed() -> np.ndarray:
        asked.append(1)
        return np.random.default_rng(0).normal(size=(IMAGES, 8)).astype(np.float32)

    work = Work(embed, lambda features, config: LABELS, lambda labels, order: None)
    clusters = ClusterContrast.by_cluster(CONFIG)
    labels = PseudoLabels(clusters, method, images, work, clock=Clock(BATCH, 2 * BATCH, 3, seed=1), world=World(),
                          host=LocalHost(), folder=RunFolder(str(folder), StorageConfig()),
                          made_from=lambda _: made_from)  # fmt: skip
    labels.begin(0)
    return method, len(asked)


def header_of(size: int, text: bytes) -> bytes:
    return size.to_bytes(8, "little") + text


def test_begin__takes_over_what_was_put_down(tmp_path: Path) -> None:
    first, embedded = begun(tmp_path)
    assert embedded == 1 and first.labels.tolist() == LABELS.tolist() and first.memory.shape == (3, 8)
    again, embedded = begun(tmp_path)
    assert embedded == 0 and torch.equal(again.labels, first.labels) and torch.equal(again.memory, first.memory)
    assert begun(tmp_path, made_from="another checkpoint")[1] == 1
    assert len((tmp_path / "pseudo_labels" / "epochs.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: b"",
        lambda content: content[:-4],
        lambda content: content[:40],
        lambda content: header_of(2, b"[]"),
        lambda content: header_of(4, b"\xff\xfe{}"),
        lambda content: header_of(1 << 62, b"{}"),
        lambda content: header_of(2, b"{}"),
    ],
    ids=["empty", "short", "cut", "list", "bytes", "size", "nothing"],
)
def test_begin__makes_anew_what_is_damaged(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    first, _ = begun(tmp_path)
    path = tmp_path / KEPT
    path.write_bytes(spoil(path.read_bytes()))
    again, embedded = begun(tmp_path)
    assert embedded == 1 and torch.equal(again.memory, first.memory)
    assert begun(tmp_path)[1] == 0


def test_kept__says_what_it_was_made_from(tmp_path: Path) -> None:
    begun(tmp_path, made_from="abc")
    content = (tmp_path / KEPT).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"] == {"made_from": "abc", "position": "0"}
