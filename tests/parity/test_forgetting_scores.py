import io

import numpy as np
import pytest
from PIL import Image

from tests.parity.test_backbones import build
from tests.support.golden import golden, group, tolerance
from training.evaluation.forgetting import best_first, forgetting_scores
from training.reid.embed import EmbedConfig, Network, embed_each


@pytest.mark.parametrize(("prefix", "target"), [("", "imagenet"), ("own_statistics/", "half")])
def test_cfs_scores__of_images_seen_by_both_networks(prefix: str, target: str) -> None:
    about, tensors = golden("cfs_scores")
    settings = about["hyper_parameters"]
    networks = []
    for name, statistics in (("source", "imagenet"), ("target", target)):
        mean, std = map(tuple, settings["statistics"][statistics])
        backbone = build(about, group(tensors, f"{name}/"))
        networks.append(Network(backbone, tuple(settings["img_size"]), EmbedConfig(mean=mean, std=std, batch=24)))
    images = dict(zip(settings["names"], tensors["pixels"].permute(0, 2, 3, 1).numpy(), strict=True))
    source, tuned = embed_each(networks, settings["names"], lambda name: png(images[name]))
    for ours, name in ((source["cls"], "features_source"), (tuned["cls"], "features_target")):
        assert np.abs(ours - tensors[prefix + name].numpy()).max() < 1e-5, name
    scores = forgetting_scores(source["cls"], tuned["cls"])
    assert np.abs(scores - tensors[f"{prefix}scores"].numpy()).max() < tolerance(about, "scores")
    order = best_first(scores)
    assert order.tolist() == tensors[f"{prefix}order"].tolist()
    listed = settings["lists"][prefix or "same_statistics"]
    assert [settings["names"][image] for image in order[:5]] == listed["first_five"]
    assert round(0.6 * len(order)) == listed["kept_at_.6"]


def test_cfs_scores__from_the_features_alone() -> None:
    about, tensors = golden("cfs_scores")
    scores = forgetting_scores(tensors["features_source"].numpy(), tensors["features_target"].numpy())
    assert np.abs(scores - tensors["scores"].numpy()).max() < tolerance(about, "scores")


def png(pixels: np.ndarray) -> bytes:
    """Encoded without loss."""
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(content, "PNG")
    return content.getvalue()
