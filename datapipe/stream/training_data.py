"""What a run is trained on: one data set, or several that are mixed."""

from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from datapipe.core.config import StorageConfig, StreamConfig
from datapipe.core.errors import ConfigError, DataError
from datapipe.core.randomness import words
from datapipe.dataset.manifest import Manifest
from datapipe.sampling.epoch_order import Order, SampleOrder
from datapipe.sampling.mixture import MixedOrder, whole_weights
from datapipe.storage import is_remote
from datapipe.stream.mixed_stream import MixedStream
from datapipe.stream.reading_plan import ALONE, Readers, ReadingPlan, plan_reading, window_bytes
from datapipe.stream.stream import Stream


@dataclass(frozen=True)
class Data:
    """Data sets, and how often each comes: whole weights in proportion to that. One alone comes always."""

    sets: tuple[Manifest, ...]
    weights: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Crops of all data sets: the length of an epoch, unless the recipe states another one."""
        return sum(manifest.rows for manifest in self.sets)

    @property
    def id(self) -> str:
        """The ids of all manifests, in order."""
        return "+".join(manifest.id for manifest in self.sets)

    @property
    def replaces(self) -> tuple[str, ...]:
        """What `id` was with versions that these take the place of, row for row."""
        versions = [(manifest.id, *manifest.replaces) for manifest in self.sets]
        return tuple("+".join(ids) for ids in product(*versions))[1:]

    def order(self, seed: int, config: StreamConfig) -> SampleOrder:
        """Which sample comes when."""
        if len(self.sets) == 1:
            return Order(self.rows, seed, config.block, config.window)
        seeds = words(seed, "mix", np.arange(len(self.sets)), 1)[:, 0].tolist()  # else equal ones go in step
        parts = zip(self.sets, seeds, strict=True)
        orders = (Order(manifest.rows, own, config.block, config.window) for manifest, own in parts)
        return MixedOrder(tuple(orders), self.weights)

    def stream(self, storage: StorageConfig, config: StreamConfig, readers: Readers = ALONE) -> Stream | MixedStream:
        """The crops by sample id, for one of the `readers`; raises as `Stream` does. Data sets share the memory of
        `config.cache_mb` and the requests of `config.requests_per_s` equally, the disk by the size of their windows."""
        if len(self.sets) == 1:
            return Stream(self.sets[0], storage, config, readers)
        parts, beside = len(self.sets), self._beside(config)
        own = replace(config, cache_mb=config.cache_mb / parts, requests_per_s=config.requests_per_s / parts)
        opened = (Stream(manifest, storage, own, readers, beside=others)
                  for manifest, others in zip(self.sets, beside, strict=True))  # fmt: skip
        return MixedStream(list(opened))

    def reading(self, config: StreamConfig, machines: int = 1) -> list[ReadingPlan]:
        """How each data set is read by one of so many machines, as far as that is known before it is opened."""
        own = replace(config, cache_mb=config.cache_mb / len(self.sets))
        return [
            plan_reading(own, rows=one.rows, crop_bytes=_crop_bytes(one), remote=is_remote(one.url), machines=machines,
                         beside=others)
            for one, others in zip(self.sets, self._beside(config), strict=True)
        ]  # fmt: skip

    def _beside(self, config: StreamConfig) -> list[int]:
        """For each data set the bytes of a window of all others that share the disk with it."""
        windows = [window_bytes(config, rows=one.rows, crop_bytes=_crop_bytes(one)) if is_remote(one.url) else 0
                   for one in self.sets]  # fmt: skip
        return [sum(windows) - window for window in windows]


def _crop_bytes(manifest: Manifest) -> float:
    """Mean size of a crop, with its part of the tar."""
    return manifest.bytes / max(1, manifest.stored_rows)


def load_data(config: StreamConfig, storage: StorageConfig) -> Data:
    """The data sets that the settings name.

    Raises ConfigError where they name none or contradict each other, DataError where one is empty, and as
    `Manifest.load` does.
    """
    addresses = config.mix or ((config.manifest,) if config.manifest else ())
    _refuse_contradictions(config)
    if not addresses:
        raise ConfigError(
            "no data set is given",
            where="stream.manifest",
            hint="--stream.manifest FOLDER, as printed by `python -m datapipe shard`",
        )
    sets = tuple(Manifest.load(address, storage) for address in addresses)
    for manifest, address in zip(sets, addresses, strict=True):
        if manifest.rows == 0:
            raise DataError("the data set is empty", where=address, hint="shard some crops first")
    weights = config.weights or tuple(manifest.rows for manifest in sets)
    return Data(sets, whole_weights(weights, where="stream.weights"))


def _refuse_contradictions(config: StreamConfig) -> None:
    if config.mix and config.manifest:
        raise ConfigError(
            "one data set is given, and several",
            where="stream.manifest, stream.mix",
            hint='name all of them in stream.mix, and set stream.manifest to ""',
        )
    if config.weights and len(config.weights) != len(config.mix):
        raise ConfigError(
            f"{len(config.weights)} weights are given for {len(config.mix)} data sets",
            where="stream.weights, stream.mix",
            hint="one weight for each of stream.mix, or none",
        )
