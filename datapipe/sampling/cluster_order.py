"""Pure: (pseudo labels, seed, position) -> which sample, for batches of clusters within one epoch of clustering.

What RandomMultipleGallerySampler of cluster-contrast-reid (`clustercontrast/utils/data/sampler.py`) does in one
process, as an order: any position is found by itself, so it resumes exactly and in any world.
"""

import numpy as np

from datapipe.core.errors import DataError
from datapipe.core.randomness import Ints, words
from datapipe.sampling.epoch_order import KEY_WORDS, encrypt

CLUSTER_ORDER_VERSION = 1
"""Part of every key; raised whenever the same arguments would give another order."""


class ClusterOrder:
    """Batches of `clusters` different clusters with `instances` images each, side by side, from position `start` on.

    Rows whose label is negative (outliers) never appear. A pass shows every cluster once, whatever its size, in random
    order; clusters at its end that do not fill a batch are dropped. Of a cluster a pass shows an anchor, uniformly
    drawn, then `instances` - 1 others. With `cameras` the others come from other cameras than the anchor's where the
    cluster has any, else from its other images; all different if there are at least `instances` to choose from, else
    drawn with replacement. A cluster of a single image repeats it.

    Raises DataError for fewer clusters than a batch needs.
    """

    def __init__(
        self, labels: Ints, cameras: Ints | None, *, seed: int, start: int, clusters: int, instances: int,
        together: int = 0,
    ) -> None:  # fmt: skip
        """`labels`, `cameras` int64 [rows]; cameras None: they are not used. `together`: neighbours that one rank
        should get; 0: the images of a cluster."""
        if min(clusters, instances) < 1:
            raise ValueError(f"impossible: {clusters} clusters with {instances} instances")
        self.seed, self.start, self.clusters, self.instances = seed, start, clusters, instances
        self.rows, self.together = len(labels), together or instances
        order = np.argsort(labels, kind="stable")
        rows = order[np.searchsorted(labels, 0, sorter=order) :]
        edges = np.flatnonzero(np.diff(labels[rows], prepend=-1))
        self._members = np.split(rows, edges[1:]) if len(rows) else []
        self._cameras = cameras
        if len(self._members) < clusters:
            raise DataError(
                f"a batch takes {clusters} clusters, and clustering found {len(self._members)}",
                hint="a larger method.clustering.eps or a smaller method.clustering.min_samples finds more; fewer "
                "clusters in a batch: a smaller optimisation.batch, or more method.instances",
            )

    def samples(self, positions: Ints) -> Ints:
        """The sample ids at these places of the stream (from `start`), int64 [n]."""
        turns, instance = np.divmod(np.asarray(positions, dtype=np.int64) - self.start, self.instances)
        seen, which = np.unique(turns, return_inverse=True)
        drawn = np.array([self._drawn(cluster, turn) for cluster, turn in zip(self._of_turns(seen), seen, strict=True)])
        return drawn.reshape(-1, self.instances)[which, instance]

    def blocks(self, samples: Ints) -> Ints:
        """Each sample by itself: those of a cluster lie anywhere, and are read one by one."""
        return samples

    def turns(self, positions: Ints) -> Ints:
        """All 0: a sample may come again at any time."""
        return np.zeros(len(positions), dtype=np.int64)

    def _of_turns(self, turns: Ints) -> Ints:
        """The cluster whose turn it is."""
        count = len(self._members)
        passes, place = np.divmod(turns, count // self.clusters * self.clusters)
        keys = words(self.seed, f"clusters/{CLUSTER_ORDER_VERSION}/turns/{self.start}", passes, KEY_WORDS)
        return encrypt(place, np.array([count]), keys)

    def _drawn(self, cluster: int, turn: int) -> Ints:
        """Rows of a cluster's turn, the anchor first."""
        members = self._members[cluster]
        purpose = f"clusters/{CLUSTER_ORDER_VERSION}/images/{self.start}"
        numbers = words(self.seed, purpose, np.array([turn]), 1 + max(len(members), self.instances))[0]
        anchor = int(numbers[0] % np.uint64(len(members)))
        others = np.delete(members, anchor)
        if self._cameras is not None:
            elsewhere = others[self._cameras[others] != self._cameras[members[anchor]]]
            others = elsewhere if len(elsewhere) else others
        if not len(others):
            return np.full(self.instances, members[anchor])
        if len(others) >= self.instances:
            chosen = np.argsort(numbers[1 : 1 + len(others)], kind="stable")[: self.instances - 1]
        else:
            chosen = (numbers[1 : self.instances] % np.uint64(len(others))).astype(np.int64)
        return np.concatenate([members[anchor : anchor + 1], others[chosen]])
