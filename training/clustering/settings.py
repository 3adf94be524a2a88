"""Settings of clustering: how unlabelled images are grouped into pseudo identities."""

from pydantic import Field

from datapipe.core.settings import settings


@settings
class ClusteringConfig:
    """DBSCAN on the k-reciprocal Jaccard distance, as in Cluster Contrast (arXiv 2103.11568)."""

    k1: int = Field(default=30, ge=1)
    """Nearest images (the image itself is the first) among which reciprocal neighbours are looked for. 30:
    cluster-contrast (examples/cluster_contrast_train_usl.py)."""
    k2: int = Field(default=6, ge=1)
    """Nearest images (the image itself is the first) over which memberships are averaged; 1: not at all. 6:
    cluster-contrast (examples/cluster_contrast_train_usl.py)."""
    eps: float = Field(default=0.6, gt=0, lt=1)
    """Largest Jaccard distance of two images that are neighbours. TransReID-SSL and PASS: .6 for Market-1501, .7 for
    MSMT17; too large and people flow together, too small and clusters break up into outliers."""
    min_samples: int = Field(default=4, ge=1)
    """Neighbours, the image itself included, that make an image a core of a cluster. 4: cluster-contrast
    (examples/cluster_contrast_train_usl.py)."""
