"""Opening a large data set: from its manifest to the first sample that could be asked for."""

import os
import subprocess
import sys
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from shutil import rmtree

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
OPEN = """
import resource, sys, time
import torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
import datapipe.stream.loader
from datapipe.core.config import StorageConfig, StreamConfig
from datapipe.dataset.manifest import Manifest
from datapipe.stream.stream import Stream
began, cpu = time.monotonic(), time.process_time()
stream = Stream(Manifest.load(sys.argv[1]), StorageConfig(), StreamConfig())
print(time.monotonic() - began, time.process_time() - cpu,
      (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
"""Run in a process of its own: peak memory never falls."""


def opening(scale: Scale) -> Table:
    """Seconds and megabytes until a stream over very many crops is open."""
    folder = _data_set(scale)
    figures = np.array([_opened(folder) for _ in range(scale.rounds)])
    seconds, cpu, megabytes = (Spread.of(column.tolist()) for column in figures.T)
    rows = (
        Row("seconds", seconds, target=Target(2, at_least=False)),
        Row("CPU seconds", cpu),
        Row("MB of peak memory over `import torch`", megabytes, target=Target(400, at_least=False)),
    )
    about = f"{scale.opened_rows:_} crops in shards of {PER_SHARD:_}, on a local disk".replace("_", " ")
    return Table("opening", about, "see the row", rows)


def _opened(folder: Path) -> list[float]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", OPEN, str(folder)], capture_output=True, text=True, check=True,
                          env=environment)  # fmt: skip
    return [float(word) for word in done.stdout.split()]


def _data_set(scale: Scale) -> Path:
    """Indexes and a manifest as ingestion writes them, without the tars; made once."""
    folder = scale.cache / f"indexes-{scale.opened_rows}-v{FORMAT}"
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        store, random = open_store(str(part)), np.random.default_rng(0)
        shards = []
        for number, low in enumerate(range(0, scale.opened_rows, PER_SHARD)):
            rows, name = min(PER_SHARD, scale.opened_rows - low), f"shards/{number:06d}"
            data, end = _index(random, number, rows)
            store.replace(f"{name}.parquet", data)
            tar = sha256(name.encode()).hexdigest()
            shards.append(Shard(f"{name}.tar", rows, end, tar, f"{name}.parquet", sha256(data).hexdigest()))
        Manifest(tuple(shards), name="made").save(store)
        try:
            part.rename(folder)
        except OSError:  # another run was quicker
            rmtree(part)
    return folder


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
