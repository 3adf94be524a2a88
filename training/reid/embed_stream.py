"""All images of a training data set in, one feature vector per image out, divided among ranks.

Images are taken in chunks of fixed size, whatever the number of ranks, so that features do not depend on it.
"""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from datapipe.core.config import Size
from datapipe.core.progress import QUIET_S, Progress
from datapipe.core.randomness import Ints
from training.core.out_of_memory import scoring_memory
from training.core.precision import at_least_float32
from training.core.world import World
from training.reid.embed import AHEAD, EmbedConfig, decode, normalise, resize


class Rows(Protocol):
    """A `datapipe.stream.stream.Stream`."""

    rows: int

    def fetch(self, samples: Ints) -> Any:
        """(rows, JPEG bytes of each)."""
        ...


class Embedder(Protocol):
    """A network with features by name."""

    training: bool

    def named_features(self, images: Tensor) -> dict[str, Tensor]: ...  # images [B, 3, H, W], normalised -> [B, C] each

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def train(self, mode: bool = True) -> object: ...


def embed_stream(
    network: Embedder, stream: Rows, feature: str, *, size: Size, world: World, config: EmbedConfig,
    label: str = "embed",
) -> NDArray[np.floating[Any]]:  # fmt: skip
    """[rows, C]: the feature of every row, on every rank; no gradient, no drop path. All ranks call it together.

    `size`: (height, width) that images are resized to. Errors: as `Stream.fetch`; DataError that names a row which
    cannot be decoded, ConfigError where memory runs out.
    """
    chunks = np.array_split(np.arange(stream.rows), range(config.batch, stream.rows, config.batch))
    mine = chunks[world.rank :: world.size]
    dtype = next(iter(network.parameters())).dtype
    was_training = network.training
    network.train(False)
    try:
        with (
            scoring_memory(config.batch, world.device),
            Progress(label, sum(map(len, mine)), unit="images", quiet_s=QUIET_S) as progress,
        ):
            own = [
                _features(network, feature, normalise(pixels, dtype, world.device, config))
                for pixels in progress.over(_pixels(stream, mine, size, config), len)
            ]
    finally:
        network.train(was_training)
    world.meet()  # others may have more to read
    parts = world.all_gather(own)
    return np.concatenate([parts[number % world.size][number // world.size] for number in range(len(chunks))])


@torch.inference_mode()
def _features(network: Embedder, feature: str, images: Tensor) -> NDArray[np.floating[Any]]:
    values: NDArray[np.floating[Any]] = at_least_float32(network.named_features(images)[feature]).cpu().numpy()
    return values


def _pixels(stream: Rows, chunks: list[Ints], size: Size, config: EmbedConfig) -> Iterator[NDArray[np.uint8]]:
    """uint8 [B, H, W, 3], chunk by chunk; a few are prepared ahead."""

    def prepare(rows: Ints) -> NDArray[np.uint8]:
        fetched = stream.fetch(rows)
        images = (decode(data, f"row {row}") for row, data in zip(fetched.rows, fetched.data, strict=True))
        return np.stack([resize(image, size, config.interpolation) for image in images])

    waiting: deque[Future[NDArray[np.uint8]]] = deque()
    with ThreadPoolExecutor(max_workers=config.threads) as pool:
        try:
            for rows in chunks:
                waiting.append(pool.submit(prepare, rows))
                if len(waiting) > max(AHEAD, config.threads):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
