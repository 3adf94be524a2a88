"""Features of the images of a training data set: those of `embed`, whatever the chunks, threads and ranks."""

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from datapipe.core.errors import DataError
from datapipe.core.randomness import Ints
from tests.training.reid.people import crop
from tests.training.reid.test_embed import Means
from training.core.world import World
from training.nn.identity.necks import NeckedBackbone, TokenNecks
from training.nn.vision_transformer import BackboneConfig, VisionTransformer
from training.reid.embed import EmbedConfig, Embedder, Form, embed, prepare
from training.reid.embed_stream import embed_stream

SIZE = (32, 16)
IMAGES = {f"{number}.jpg": crop(number, 1, 0) for number in range(11)}
CONFIG = EmbedConfig(batch=4, threads=3, interpolation="bicubic")


class Stream:
    """Rows of a data set, in memory."""

    def __init__(self, images: list[bytes]) -> None:
        self.images, self.rows = images, len(images)

    def fetch(self, samples: Ints) -> Any:
        return SimpleNamespace(rows=samples, data=[self.images[row] for row in samples])


class Ranks:
    """Worlds whose ranks are threads."""

    def __init__(self, size: int) -> None:
        self.size, self.given, self.barrier = size, [None] * size, threading.Barrier(size)

    def world(self, rank: int) -> Any:
        def all_gather(own: Any) -> list[Any]:
            self.given[rank] = own
            self.barrier.wait(60)
            return list(self.given)

        return SimpleNamespace(rank=rank, size=self.size, device=torch.device("cpu"), meet=lambda: None,
                               all_gather=all_gather)  # fmt: skip


def necked(dtype: torch.dtype = torch.float32) -> NeckedBackbone:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BackboneConfig(arch="custom", size=SIZE, patch=8, width=16, depth=1, heads=2, drop_path=0.5)
        backbone = VisionTransformer(config, parts=2)
        return NeckedBackbone(backbone, TokenNecks(16, 2, fusion="mean", neck="each", group=0)).to(dtype)


def embedded(network: Embedder, feature: str, world: Any = None) -> np.ndarray:
    stream = Stream(list(IMAGES.values()))
    return embed_stream(network, stream, feature, size=SIZE, world=world or World(), config=CONFIG)


@pytest.mark.parametrize("feature", ["neck", "cls", "cls+parts"])
def test_embed_stream__is_embed_bit_for_bit(feature: str) -> None:
    network = necked().train()
    expected = embed(network, list(IMAGES), IMAGES.__getitem__, size=SIZE, config=CONFIG)[feature]
    found = embedded(network, feature)
    assert np.array_equal(found, expected) and found.dtype == np.float32 and network.training


def test_embed_stream__keeps_double() -> None:
    found = embedded(necked(torch.float64), "neck")
    assert found.dtype == np.float64 and not np.array_equal(found, found.astype(np.float32))
    np.testing.assert_allclose(found, embedded(necked(), "neck"), atol=1e-5)


def test_embed_stream__a_network_without_necks_has_the_features_of_its_tokens() -> None:
    found = embedded(Means(), "cls_parts_mean")
    assert np.array_equal(found, embed(Means(), list(IMAGES), IMAGES.__getitem__, size=SIZE,
                                       config=CONFIG)["cls_parts_mean"])  # fmt: skip


@pytest.mark.parametrize("size", [2, 4])
def test_embed_stream__of_several_ranks_is_that_of_one(size: int) -> None:
    """Three chunks: the second of two ranks has fewer, the last of four none."""
    ranks, found = Ranks(size), [np.empty(0)] * size
    networks = [necked() for _ in range(size)]

    def work(rank: int) -> None:
        found[rank] = embedded(networks[rank], "neck", ranks.world(rank))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = embedded(necked(), "neck")
    assert all(np.array_equal(one, expected) for one in found)


def test_embed_stream__names_the_broken_row_and_puts_the_mode_back() -> None:
    network = necked().train()
    images = [*IMAGES.values()]
    images[9] = b"nothing"
    with pytest.raises(DataError, match="cannot be decoded") as caught:
        embed_stream(network, Stream(images), "neck", size=SIZE, world=World(), config=CONFIG)
    assert caught.value.where == "row 9" and network.training


@pytest.mark.parametrize(("batch", "threads", "ahead"), [(1, 1, 4), (1, 8, 9), (4, 2, 16)])
def test_prepare__reads_so_far_ahead_and_keeps_the_order(batch: int, threads: int, ahead: int) -> None:
    """Before the first batch is handed out four batches are taken up, or one item more than there are threads."""
    names, asked = list(IMAGES) * 4, 0

    def batches() -> Any:
        nonlocal asked
        for start in range(0, len(names), batch):
            asked += len(names[start : start + batch])
            yield names[start : start + batch]

    form: Form = (SIZE, "bilinear")
    found = prepare(batches(), lambda name: [(name, IMAGES[name])], [form], threads=threads)
    first = next(found)[form]
    assert asked == ahead
    whole = np.concatenate([first, *(one[form] for one in found)])
    alone = {name: next(prepare([[name]], lambda name: [(name, IMAGES[name])], [form], threads=1))[form]
             for name in IMAGES}  # fmt: skip
    assert np.array_equal(whole, np.concatenate([alone[name] for name in names]))
