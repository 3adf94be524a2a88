"""Settings of evaluation: how a labelled data set is taken, how features are scored on it, when a run scores itself."""

from typing import Literal

from pydantic import Field

from datapipe.core.settings import settings

RANDOM = "random"
"""In place of weights: none; a backbone as it is drawn."""


@settings
class RerankConfig:
    k1: int = Field(default=20, ge=1)
    """Neighbours among which reciprocal ones are looked for."""
    k2: int = Field(default=6, ge=1)
    """Neighbours (the image itself is the first) over which memberships are averaged; 1: not at all."""
    weight: float = Field(default=0.3, ge=0, le=1)
    """Share of the original distance in the final one (lambda in the paper); the rest is the Jaccard distance."""


@settings
class ScoringConfig:
    data_name: str = ""
    """What the data set is: market1501, dukemtmc, occluded_duke, msmt17, msmt17_v2, cuhk03_detected, cuhk03_labeled,
    occluded_reid, partial_reid, p_dukemtmc, or "own" for images of one's own in the layout of Market-1501. Empty: it is
    recognised."""
    allow_partial: bool = False
    """Go on where images of a published data set are missing, or where train and test overlap. It is logged, and said
    beside the scores."""
    rerank: bool = False
    """Score every feature once more, re-ranked by k-reciprocal encoding. Minutes for MSMT17."""
    reranking: RerankConfig = RerankConfig()
    """How. Published scores are without it."""
    embed_batch: int = Field(default=64, ge=1, repr=False)
    """Images embedded at once. Lower it when memory runs out; features stay the same up to rounding."""
    trapezoid: bool = False
    """Report the mAP of the official Market-1501 code too (trapezoids; about a point lower), as `trapezoid_mAP`. Tables
    of the literature have the other one."""


@settings
class EvaluationConfig:
    """Scores of the run's own weights, by retrieval, while it goes on."""

    data: str = ""
    """Test set, as `python -m training evaluate --data` takes it. Empty: none."""
    every_epochs: float = Field(default=0.0, ge=0)
    """Epochs between scores; the end is always scored. 0: only the end."""
    quote: Literal["last", "best"] = "last"
    """Which score is the run's result. The best of several on a test set was chosen on the test set, and is reported
    as that."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How test images are resized. TransReID bilinear, HAP bicubic."""
    scoring: ScoringConfig = ScoringConfig()
    """What the test set is, and how features are scored on it."""
