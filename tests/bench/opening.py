"""Opening a large data set: from its manifest to the first sample that could be asked for.

First with no packed index, which is made of all indexes; then as it is opened ever after.
"""

import os
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow
import pyarrow.parquet

from datapipe.dataset.index import INDEX, Shard
from datapipe.dataset.manifest import FORMAT, Manifest
from datapipe.dataset.tar import layout
from datapipe.storage import open_store
from tests.bench.measure import Spread
from tests.bench.scale import Scale
from tests.bench.table import Row, Table, Target

PER_SHARD = 10_000
WHAT = ("seconds", "CPU seconds", "MB of private memory over `import torch`")
OPEN = """
import re, sys, time
import torch
def private():
    lines = open("/proc/self/smaps_rollup").read()
    return sum(int(size) for size in re.findall(r"^Private_\w+: +(\d+) kB", lines, re.M)) / 1024
before = private()
import datapipe.stream.loader
from datapipe.core.config import StorageConfig, StreamConfig
from datapipe.dataset.manifest import Manifest
from datapipe.stream.stream import Stream
began, cpu = time.monotonic(), time.process_time()
stream = Stream(Manifest.load(sys.argv[1]), StorageConfig(), StreamConfig(cache_dir=sys.argv[2]))
print(time.monotonic() - began, time.process_time() - cpu, private() - before)
"""
"""Run in a process of its own, whose memory is its own."""


def opening(scale: Scale) -> Table:
    """Seconds and megabytes until a stream over very many crops is open."""
    folder = _data_set(scale)
    first, later = [], []
    for _ in range(scale.rounds):
        with TemporaryDirectory(dir=scale.cache) as cache:
            for packed in folder.glob("packed-*"):
                packed.unlink()
            first.append(_opened(folder, cache))
            later.append(_opened(folder, cache))
    rows = tuple(
        Row(f"{which}: {what}", Spread.of(column), target=Target(most, at_least=False) if most else None)
        for which, figures, targets in (("first, packs", first, (0, 0, 0)), ("later", later, (2, 0, 100)))
        for what, column, most in zip(WHAT, zip(*figures, strict=True), targets, strict=True)
    )
    about = f"{scale.opened_rows:_} crops in shards of {PER_SHARD:_}, on a local disk".replace("_", " ")
    return Table("opening", about, "see the row", rows)


def _opened(folder: Path, cache: str) -> list[float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", OPEN, str(folder), cache], capture_output=True, text=True, check=True,
                          env=environment)  # fmt: skip
    return [float(word) for word in done.stdout.split()]


def _data_set(scale: Scale) -> Path:
    """Indexes and a manifest as ingestion writes them, without the tars; made once."""
    folder = scale.cache / f"indexes-{scale.opened_rows}-v{FORMAT}"
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        data_set(part, scale.opened_rows)
        try:
            part.rename(folder)
        except OSError:  # another run was quicker
            rmtree(part)
    return folder


def data_set(folder: Path, rows: int, *, kinds: int = 0) -> None:
    """Write indexes of made-up crops and a manifest. `kinds`: so many indexes, each under many names; 0: all differ."""
    store, random = open_store(str(folder)), np.random.default_rng(0)
    shards, made = list[Shard](), list[Shard]()
    for number, low in enumerate(range(0, rows, PER_SHARD)):
        count, name = min(PER_SHARD, rows - low), f"shards/{number:06d}"
        tar = sha256(name.encode()).hexdigest()
        if kinds and len(made) == kinds and count == PER_SHARD:
            like = made[number % kinds]
            os.link(folder / like.index, folder / f"{name}.parquet")
            shards.append(replace(like, name=f"{name}.tar", sha256=tar, index=f"{name}.parquet"))
            continue
        data, end = _index(random, number, count)
        store.replace(f"{name}.parquet", data)
        made.append(Shard(f"{name}.tar", count, end, tar, f"{name}.parquet", sha256(data).hexdigest()))
        shards.append(made[-1])
    Manifest(tuple(shards), name="made").save(store)


def _index(random: np.random.Generator, number: int, rows: int) -> tuple[bytes, int]:
    """An index of made-up crops, and the size of its tar."""
    size = np.exp(random.normal(8.1, 0.45, rows)).astype(np.int32)
    offset, end = layout(size)
    hashes = random.bytes(32 * rows)
    digests = [hashes[low : low + 32] for low in range(0, 32 * rows, 32)]
    words = random.integers(0, 2**64, (2, rows), np.uint64)
    people = random.integers(0, 200_000, rows)
    columns = {
        "key": [digest[:16].hex() for digest in digests], "offset": offset, "size": size,
        "height": random.integers(80, 260, rows), "width": random.integers(30, 110, rows), "sha256": digests,
        "xxh3": words[0], "dhash": words[1], "source": ["made"] * rows,
        "name": [f"{person:06d}/{number:04d}_{row:05d}.jpg" for row, person in enumerate(people.tolist())],
        "pid": people, "camera": np.full(rows, -1), "video": [""] * rows, "track": np.full(rows, -1),
        "frame": np.full(rows, -1), "duplicate_of": [None] * rows, "near_of": [None] * rows,
        "removed": np.zeros(rows, bool),
    }  # fmt: skip
    table = pyarrow.table([pyarrow.array(columns[field.name], field.type) for field in INDEX], schema=INDEX)
    sink = BytesIO()
    pyarrow.parquet.write_table(table, sink, compression="zstd")
    return sink.getvalue(), end
