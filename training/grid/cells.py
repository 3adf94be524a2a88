"""The cells of a grid of evaluations: one set of weights, one task, one data set each."""

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from datapipe.core.config import StorageConfig
from training.config import recipe_toml as recipes
from training.config.continuation import FREE_TO_CHANGE
from training.config.run_config import RunConfig
from training.grid.request import GridTask
from training.reid.settings import ScoringConfig

CELLS = "cells"
"""Folder of all cells below that of the grid: `cells/<weights>/<data set>/<task>`."""


@dataclass(frozen=True)
class GridWeights:
    """One set of weights. Picklable, and plain values as JSON."""

    name: str
    """As the table calls it, and a part of paths."""
    given: str
    """The address as it was given."""
    start: str
    """Folder of the export with these weights; empty: none, the backbone of the recipe as it is drawn."""
    sha256: str = ""
    checkpoint: str = ""
    """Name of the checkpoint, of a run's weights."""
    step: int | None = None
    samples: int | None = None
    """Images seen in pre-training."""
    rows: int | None = None
    """Images of the data set that it was pre-trained on."""

    @property
    def epochs(self) -> float | None:
        """Passes over the data set of pre-training, of a run's weights."""
        return self.samples / self.rows if self.samples is not None and self.rows else None

    @property
    def series(self) -> str:
        """What the weights of one run have in common; that of other weights is theirs alone."""
        return self.name.rpartition("@")[0] if self.checkpoint else self.name


@dataclass(frozen=True)
class GridData:
    """One labelled data set. Picklable."""

    name: str
    """As tasks, table and paths call it."""
    url: str
    set_name: str
    """What it is: market1501, own, ..."""
    identity: str
    """Equal where the images and labels are, as far as counts tell."""
    scoring: ScoringConfig
    shards: str = ""
    """Manifest of its training part; empty: it has none, or none is needed."""
    trainable: bool = False
    """Has it a training part?"""


@dataclass(frozen=True)
class Cell:
    """One evaluation. Picklable."""

    folder: str
    """Below the folder of the grid; its name among the cells."""
    weights: GridWeights
    data: GridData
    task: GridTask
    out: str
    """Folder of the grid."""
    storage: StorageConfig
    start: str
    """Export that is scored, or that training starts from; empty: none."""
    source: str = ""
    """Folder of the cell whose weights these are; it must be complete first."""
    config: RunConfig | None = None
    """The run that trains, and scores itself; None: the weights are scored as they are."""
    remark: str = ""
    """What sets it apart from another cell of this kind."""

    @property
    def url(self) -> str:
        """Address of its own folder."""
        return f"{self.out.rstrip('/')}/{self.folder}"

    @property
    def identity(self) -> str:
        """Digest of all that decides its scores: what was scored stands as long as it is equal."""
        settings: list[Any] = []
        if self.config is not None:
            tree = recipes.leaves((), recipes.to_tree(self.config))
            settings = [pair for pair in tree if not pair[0].startswith(FREE_TO_CHANGE)]
        about = [
            self.weights.sha256,
            self.data.url,
            self.data.identity,
            repr(self.data.scoring),
            str(self.task),
            settings,
        ]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def about(self) -> dict[str, Any]:
        """Plain values, for files."""
        return {
            "folder": self.folder,
            "weights": asdict(self.weights),
            "data": self.data.name,
            "data_set": self.data.set_name,
            "task": str(self.task),
            "source": self.source,
            "recipe": self.config.method.name if self.config else "",
            "remark": self.remark,
        }


def folder_of(weights: GridWeights, data: GridData, task: str) -> str:
    """Name of a cell, and its folder."""
    return f"{CELLS}/{weights.name}/{data.name}/{task}"
