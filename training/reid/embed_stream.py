"""All images of a training data set in, one feature vector per image out, divided among ranks.

Images are taken in chunks of fixed size, whatever the number of ranks, so that features do not depend on it.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from datapipe.core.config import Size
from datapipe.core.randomness import Ints
from training.core.world import World
from training.reid.embed import EmbedConfig, Embedder, Network, embed_batches


class Rows(Protocol):
    """A `datapipe.stream.stream.Stream`."""

    rows: int

    def fetch(self, samples: Ints) -> Any:
        """(rows, JPEG bytes of each)."""
        ...


def embed_stream(
    network: Embedder, stream: Rows, feature: str, *, size: Size, world: World, config: EmbedConfig,
    label: str = "embed",
) -> NDArray[np.floating[Any]]:  # fmt: skip
    """[rows, C]: the feature of every row, on every rank, as `features_of` gives it; no gradient, no drop path. All
    ranks call it together.

    `size`: (height, width) that images are resized to. Errors: as `Stream.fetch`; DataError that names a row which
    cannot be decoded, ConfigError where memory runs out.
    """
    chunks = np.array_split(np.arange(stream.rows), range(config.batch, stream.rows, config.batch))
    mine = chunks[world.rank :: world.size]

    def read(rows: Ints) -> Iterator[tuple[str, bytes]]:
        fetched = stream.fetch(rows)
        return ((f"row {row}", data) for row, data in zip(fetched.rows, fetched.data, strict=True))

    def keep(features: dict[str, Tensor]) -> NDArray[np.floating[Any]]:
        values: NDArray[np.floating[Any]] = features[feature].cpu().numpy()
        return values

    found = embed_batches(
        [Network(network, size, config)], [[rows] for rows in mine], read, keep, images=sum(map(len, mine)),
        device=world.device, label=label,
    )  # fmt: skip
    world.meet()  # others may have more to read
    parts = world.all_gather([values for (values,) in found])
    return np.concatenate([parts[number % world.size][number // world.size] for number in range(len(chunks))])
