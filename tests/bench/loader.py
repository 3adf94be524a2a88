"""Decode and one random resized crop, through loaders: what does the machinery cost?"""

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from math import exp, log, sqrt
from typing import Any

import cv2
import numpy as np
import torch
import torchvision.transforms as transforms
import webdataset
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

from datapipe.config import StorageConfig, StreamConfig
from datapipe.decoding import decode
from datapipe.loader import Loader
from datapipe.manifest import Manifest
from datapipe.order import Order
from datapipe.stream import Stream
from datapipe.views import make_views
from tests.bench.crops import ABOUT, KINDS, Crops, crops
from tests.bench.measure import Rates, Work, rates
from tests.bench.reference import BICUBIC, normalised
from tests.bench.scale import Scale
from tests.bench.specs import GLOBAL, ONE_RATIO, ONE_SCALE, one_view
from tests.bench.table import Row, Table, Target, compare

BARE, VIEWS_ALONE = "no loader: a bare loop", "make_views alone"
WEBDATASET, TORCHVISION = "webdataset, same decode", "PIL + torchvision ImageFolder"
PIL_SHARE = 3
"""The slowest contender gets one of so many images."""


def loader(scale: Scale) -> Table:
    """Stream and Loader against no loader, against webdataset with the same decode, against the usual recipe."""
    rows = [row for kind in KINDS for row in _rows(kind, scale.workers or 1, _measured(crops(kind, scale), scale))]
    notes = (
        ABOUT,
        f"batches of {scale.batch}, shuffled, linear; threads of ours and worker processes of others: {scale.workers}",
        "ours reads each crop from its tar (stream.cache_mb = 0, as with a data set of LUPerson's size on a local "
        "disk) and checks it; the bare loop has the bytes in memory, draws boxes in plain Python and does nothing else",
        "ImageFolder: bicubic, ToTensor, Normalize; all files are in the page cache",
        "left out: litdata and mosaic streaming, which need an environment of their own",
    )
    about = "decode and one 256x128 random resized crop"
    return Table("loader", about, "img/s per CPU-second", tuple(rows), notes)


def _measured(found: Crops, scale: Scale) -> Rates:
    torch.set_num_threads(1)
    with ExitStack() as stack:  # the others first: they fork, which is best done before there are threads
        works: dict[str, Work] = {
            WEBDATASET: stack.enter_context(_webdataset(found, scale)),
            TORCHVISION: stack.enter_context(_torchvision(found, scale)),
            BARE: _bare(found, scale),
            VIEWS_ALONE: _views_alone(found, scale),
        }
        for threads in {1, scale.workers or 1}:
            works[_name(threads)] = stack.enter_context(_ours(found, scale, threads))
        return rates(works, scale.rounds)


def _rows(kind: str, threads: int, found: Rates) -> list[Row]:
    def row(ours: str, against: str, target: Target | None = None) -> Row:
        return compare(found, f"{kind}: {ours}", ours, against, target)

    many = _name(threads)
    rows = [row(VIEWS_ALONE, BARE), row(_name(1), BARE, Target(0.9))]
    if threads > 1:
        rows.append(row(many, BARE, Target(0.9)))
    return [*rows, row(many, WEBDATASET, Target(1.5)), row(many, TORCHVISION, Target(5))]


def _name(threads: int) -> str:
    return f"loader, {threads} thread{'s' if threads > 1 else ''}"


@contextmanager
def _ours(found: Crops, scale: Scale, threads: int) -> Iterator[Work]:
    config = StreamConfig(manifest=found.dataset, threads=threads, cache_mb=0)
    stream = Stream(Manifest.load(found.dataset), StorageConfig(), config)
    order = Order(stream.rows, 0, config.block, config.window)
    begin = 0
    with Loader(stream, order, one_view(), seed=0, global_batch=scale.batch, rank=0, world=1, micro_batch=scale.batch,
                config=config) as batches:

        def work() -> int:
            nonlocal begin
            for batch in batches.after(begin, begin + stream.rows):
                begin = batch.after
            return stream.rows

        yield work
    stream.close()


def _bare(found: Crops, scale: Scale) -> Work:
    out = np.empty((scale.batch, *GLOBAL, 3), np.uint8)

    def work() -> int:
        for number, data in enumerate(found.jpegs):
            _cut(decode(data), out[number % scale.batch])
        return len(found.jpegs)

    return work


def _views_alone(found: Crops, scale: Scale) -> Work:
    spec = one_view()
    out = {group.name: np.empty(spec.shape(group, scale.batch), np.uint8) for group in spec.groups}

    def work() -> int:
        for low in range(0, len(found.jpegs), scale.batch):
            part = found.jpegs[low:low + scale.batch]
            views = {name: stack[:, :len(part)] for name, stack in out.items()}
            make_views(part, spec, 0, np.arange(low, low + len(part)), views)
        return len(found.jpegs)

    return work


@contextmanager
def _webdataset(found: Crops, scale: Scale) -> Iterator[Work]:
    urls = [f"{found.dataset}/{shard.name}" for shard in Manifest.load(found.dataset).shards]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
        .shuffle(1000).to_tuple("jpg").map_tuple(_decoded_and_cut).batched(scale.batch)
    )
    yield _epoch(webdataset.WebLoader(dataset, batch_size=None, num_workers=scale.workers,
                                      persistent_workers=scale.workers > 0))


@contextmanager
def _torchvision(found: Crops, scale: Scale) -> Iterator[Work]:
    cut = transforms.RandomResizedCrop(GLOBAL, ONE_SCALE, ONE_RATIO, interpolation=BICUBIC)
    files = ImageFolder(str(found.files), transforms.Compose([cut, normalised()]))
    part = Subset(files, range(0, len(files), PIL_SHARE))
    yield _epoch(DataLoader(part, batch_size=scale.batch, shuffle=True, num_workers=scale.workers,
                            persistent_workers=scale.workers > 0))


def _epoch(batches: Any) -> Work:
    """The workers start in the round that is not counted and stay; each round is one epoch, from end to end."""
    return lambda: sum(len(batch[0]) for batch in batches)


def _decoded_and_cut(data: bytes) -> np.ndarray:
    out = np.empty((*GLOBAL, 3), np.uint8)
    _cut(decode(data), out)
    return out


def _cut(image: np.ndarray, out: np.ndarray) -> None:
    """A random resized crop, resized as `datapipe.views` does it with "linear"."""
    top, left, height, width = _box(*image.shape[:2])
    shrinks = height > out.shape[0] and width > out.shape[1]
    cv2.resize(image[top:top + height, left:left + width], out.shape[1::-1], dst=out,
               interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


def _box(height: int, width: int) -> tuple[int, int, int, int]:
    """Torchvision's law in plain Python; the fall-back, which these proportions hardly need, is the whole image."""
    for _ in range(10):
        area = height * width * random.uniform(*ONE_SCALE)
        ratio = exp(random.uniform(log(ONE_RATIO[0]), log(ONE_RATIO[1])))
        tall, wide = round(sqrt(area / ratio)), round(sqrt(area * ratio))
        if 0 < tall <= height and 0 < wide <= width:
            return random.randint(0, height - tall), random.randint(0, width - wide), tall, wide
    return 0, 0, height, width
