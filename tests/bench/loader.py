"""Decode and one random resized crop, through loaders: what does the machinery cost?"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torchvision.transforms as transforms
import webdataset
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder

from datapipe.core.config import StorageConfig
from datapipe.dataset.manifest import Manifest
from datapipe.views.decode import decode
from datapipe.views.render import make_views
from tests.bench.crops import ABOUT, KINDS, Crops, crops
from tests.bench.cut import cut, decoded_and_cut
from tests.bench.loading import loading
from tests.bench.measure import Clock, Rates, Work, rates, repeated, tree_cpu_s
from tests.bench.peers import LOADERS, Process, answer, tell
from tests.bench.reference import BICUBIC, normalised
from tests.bench.scale import Scale
from tests.bench.specs import GLOBAL, ONE_RATIO, ONE_SCALE, one_view
from tests.bench.table import Row, Table, Target, compare
from tests.support.golden import ROOT

BARE, BARE_LOOPS, VIEWS_ALONE = "no loader: a bare loop", "no loader: bare loops in threads", "make_views alone"
WEBDATASET, TORCHVISION = "webdataset, same decode", "PIL + torchvision ImageFolder"
APART = {"litdata": ("litdata, same decode", Target(1.35)), "mosaic": ("mosaic streaming, same decode", Target(2.2))}
"""Those in an environment of their own: name in it, name here, target."""
EPOCHS = 4
"""In a round of the fastest contenders."""
PIL_SHARE = 3
"""The slowest contender gets one of so many images."""


def loader(scale: Scale) -> Table:
    """Stream and Loader against no loader, against other loaders with the same decode, against the usual recipe."""
    rows = [row for kind in KINDS for row in _rows(kind, scale.workers or 1, _measured(crops(kind, scale), scale))]
    notes = (
        ABOUT,
        f"batches of {scale.batch}, shuffled, linear; threads of ours and worker processes of others: {scale.workers}",
        "ours reads each crop from its tar (stream.cache_mb = 0, as with a data set of LUPerson's size on a local "
        "disk) and checks it; the bare loop has the bytes in memory, draws boxes in plain Python and does nothing else",
        "bare loops in threads: as many such loops as the loader has threads; they share nothing but the interpreter",
        "ImageFolder: bicubic, ToTensor, Normalize; all files are in the page cache",
        "litdata: chunks of 64 MB, StreamingDataLoader; mosaic streaming: MDS shards, torch's DataLoader; "
        "workers stay; versions: tests/bench/loader_peers.txt",
    )
    if not _apart(scale):
        notes = (*notes[:-1], f"left out: litdata and mosaic streaming: {LOADERS.missing}")
    about = "decode and one 256x128 random resized crop"
    return Table("loader", about, "img/s per CPU-second", tuple(rows), notes)


def _measured(found: Crops, scale: Scale) -> Rates:
    torch.set_num_threads(1)
    clocks: dict[str, Clock] = {}
    with ExitStack() as stack:  # the others first: they fork, which is best done before there are threads
        works: dict[str, Work] = {
            WEBDATASET: stack.enter_context(_webdataset(found, scale)),
            TORCHVISION: stack.enter_context(_torchvision(found, scale)),
            BARE: repeated(_bare(found.jpegs, scale), EPOCHS),
            BARE_LOOPS: repeated(stack.enter_context(_bare_loops(found, scale)), EPOCHS),
            VIEWS_ALONE: repeated(_views_alone(found, scale), EPOCHS),
        }
        for peer in _apart(scale):
            process = stack.enter_context(_peer(peer, found, scale))
            works[APART[peer][0]] = partial(_epoch_of, process)
            clocks[APART[peer][0]] = partial(tree_cpu_s, process.pid)
        for threads in {1, scale.workers or 1}:
            ours = stack.enter_context(loading(found.dataset, StorageConfig(), scale, threads=threads))
            works[_name(threads)] = repeated(ours, EPOCHS)
        return rates(works, scale.rounds, clocks)


def _rows(kind: str, threads: int, found: Rates) -> list[Row]:
    def row(ours: str, against: str, target: Target | None = None) -> Row:
        return compare(found, f"{kind}: {ours}", ours, against, target)

    many = _name(threads)
    rows = [row(VIEWS_ALONE, BARE), row(_name(1), BARE, Target(0.9))]
    if threads > 1:
        rows += [row(many, BARE, Target(0.9)), row(many, BARE_LOOPS)]
    apart = [row(many, against, target) for against, target in APART.values() if against in found]
    return [*rows, row(many, WEBDATASET, Target(1.5)), *apart, row(many, TORCHVISION, Target(5))]


def _name(threads: int) -> str:
    return f"loader, {threads} thread{'s' if threads > 1 else ''}"


def _bare(jpegs: list[bytes], scale: Scale) -> Work:
    out = np.empty((scale.batch, *GLOBAL, 3), np.uint8)

    def work() -> int:
        for number, data in enumerate(jpegs):
            cut(decode(data), out[number % scale.batch])
        return len(jpegs)

    return work


@contextmanager
def _bare_loops(found: Crops, scale: Scale) -> Iterator[Work]:
    """As many loops as the loader has threads, which share nothing but the interpreter."""
    threads = scale.workers or 1
    loops = [_bare(found.jpegs[first::threads], scale) for first in range(threads)]
    with ThreadPoolExecutor(threads) as pool:
        yield lambda: sum(pool.map(lambda loop: loop(), loops))


def _views_alone(found: Crops, scale: Scale) -> Work:
    spec = one_view()
    out = {group.name: np.empty(spec.shape(group, scale.batch), np.uint8) for group in spec.groups}

    def work() -> int:
        for low in range(0, len(found.jpegs), scale.batch):
            part = found.jpegs[low : low + scale.batch]
            views = {name: stack[:, : len(part)] for name, stack in out.items()}
            make_views(part, spec, 0, np.arange(low, low + len(part)), views)
        return len(found.jpegs)

    return work


@contextmanager
def _webdataset(found: Crops, scale: Scale) -> Iterator[Work]:
    urls = [f"{found.dataset}/{shard.name}" for shard in Manifest.load(found.dataset).shards]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), empty_check=False)
        .shuffle(1000)
        .to_tuple("jpg")
        .map_tuple(decoded_and_cut)
        .batched(scale.batch)
    )
    yield _epoch(
        webdataset.WebLoader(dataset, batch_size=None, num_workers=scale.workers, persistent_workers=scale.workers > 0)
    )


@contextmanager
def _torchvision(found: Crops, scale: Scale) -> Iterator[Work]:
    cut = transforms.RandomResizedCrop(GLOBAL, ONE_SCALE, ONE_RATIO, interpolation=BICUBIC)
    files = ImageFolder(str(found.files), transforms.Compose([cut, normalised()]))
    part = Subset(files, range(0, len(files), PIL_SHARE))
    yield _epoch(
        DataLoader(
            part, batch_size=scale.batch, shuffle=True, num_workers=scale.workers, persistent_workers=scale.workers > 0
        )
    )


def _apart(scale: Scale) -> list[str]:
    return list(APART) if scale.loader_peers and LOADERS.ready() else []


@contextmanager
def _peer(name: str, found: Crops, scale: Scale) -> Iterator[Process]:
    """A library in its own environment, with the crops in its own format."""
    with TemporaryDirectory(prefix=f"{name}-", dir=scale.cache) as folder:
        words = (name, str(found.files), f"{folder}/data", str(scale.batch), str(scale.workers))
        with LOADERS.start(name, "-m", "tests.bench.loader_peer_process", *words, cwd=ROOT) as process:
            answer(process)  # ready
            yield process


def _epoch_of(process: Process) -> int:
    tell(process, "epoch")
    return int(answer(process))


def _epoch(batches: Any) -> Work:
    """The workers start in the round that is not counted and stay; each round is one epoch, from end to end."""
    return lambda: sum(len(batch[0]) for batch in batches)
