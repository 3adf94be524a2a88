"""Files -> tars by libraries that check nothing, against ours, which decodes and hashes every crop on the way."""

import tarfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, redirect_stderr
from functools import partial
from io import StringIO
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time

from datapipe.core.config import ShardConfig, StorageConfig
from datapipe.ingest.pipeline import ingest
from tests.bench.crops import ABOUT, KINDS, Crops, crops
from tests.bench.measure import Work, rates, tree_cpu_s
from tests.bench.peers import HERE, INGEST, Process, answer, tell
from tests.bench.scale import Scale
from tests.bench.table import Row, Table, Target, compare

OURS = "ingestion"
AGAINST = {"img2dataset": ("img2dataset, leanest", Target(2)),
           "img2dataset_defaults": ("img2dataset, defaults", None),
           "ray_data": ("Ray Data's write_webdataset", Target(1.4))}  # fmt: skip


def ingest_peers(scale: Scale) -> Table:
    """The whole of `python -m datapipe shard` in one process, and other libraries' way from files to tars."""
    with ExitStack() as stack:
        peers = {name: stack.enter_context(INGEST.start(name, str(HERE / "peer_process.py"), name)) for name in AGAINST}
        rows = tuple(row for kind in KINDS for row in _rows(crops(kind, scale), scale, peers))
    notes = (
        ABOUT,
        "ingestion: strict decode, hashes of every crop, spool, tar, index, manifest; one process",
        "img2dataset: its reader, downloader and writer in one process, file:// urls, nothing encoded, sha256; "
        "leanest: one thread, nothing decoded, no EXIF; defaults: 256 threads, each image decoded once, EXIF",
        "Ray Data: read_binary_files -> write_webdataset(encoder=None), all its processes counted; all of them warm",
        "that the tars hold exactly the files' bytes is checked for each; versions: tests/bench/peers.txt",
    )
    return Table("ingest_peers", f"{scale.crops} files of each kind", "img/s per CPU-second", rows, notes)


def _rows(found: Crops, scale: Scale, peers: dict[str, Process]) -> Iterator[Row]:
    with TemporaryDirectory(prefix="peers-", dir=found.folder.parent) as outputs:
        works, clocks = {OURS: _work(partial(_ingest, found), found, Path(outputs, OURS))}, {OURS: process_time}
        for name, process in peers.items():
            title, _ = AGAINST[name]
            works[title] = _work(partial(_ask, process, found.files), found, Path(outputs, name))
            clocks[title] = partial(tree_cpu_s, process.pid)
        measured = rates(works, scale.rounds, clocks)
    for title, target in AGAINST.values():
        yield compare(measured, f"{found.kind}: {OURS}", OURS, title, target)


def _work(write: Callable[[Path], int], found: Crops, folder: Path) -> Work:
    """Each time into a folder of its own; looks at what came out the first time, which is not counted."""
    runs = count()

    def work() -> int:
        out = folder / str(next(runs))
        done = write(out)
        if out.name == "0":
            _check(out, found)
        return done

    return work


def _ingest(found: Crops, out: Path) -> int:
    with redirect_stderr(StringIO()):
        return ingest([str(found.files)], str(out), ShardConfig(workers=1), StorageConfig()).manifest.rows


def _ask(process: Process, files: Path, out: Path) -> int:
    """Have the files written as tars into the new folder `out`; how many there were."""
    tell(process, f"{files}\t{out}")
    return int(answer(process))


def _check(out: Path, found: Crops) -> None:
    written = []
    for path in out.rglob("*.tar"):
        with tarfile.open(path) as tar:
            members = filter(None, (tar.extractfile(member) for member in tar if member.name.endswith(".jpg")))
            written += [member.read() for member in members]
    if sorted(written) != sorted(found.jpegs):
        raise RuntimeError(f"{out} does not hold the bytes of the files")
