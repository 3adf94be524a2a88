"""Object storage against a local disk: what does it cost the client to bring the crops from there?"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from time import process_time

import boto3
import obstore
from obstore.store import S3Store

from datapipe.core.config import ShardConfig, StorageConfig, StreamConfig
from datapipe.dataset.manifest import Manifest
from datapipe.ingest.pipeline import ingest
from datapipe.storage import open_store
from tests.bench.crops import ABOUT, KINDS, Crops, crops
from tests.bench.loading import loading
from tests.bench.measure import Rates, Spread, Work, rates, ratio, repeated
from tests.bench.scale import Scale
from tests.bench.table import Row, Table, Target

EPOCHS = 4
"""In a round."""
LOCAL, BLOCKS, SINGLY = "local disk", "S3, blocks kept on disk", "S3, crop by crop"
OURS, OBSTORE, BOTO3 = "our store", "obstore by itself", "boto3 by itself"
SERVER = """
import logging, sys
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(*server.get_host_and_port(), flush=True)
sys.stdin.read()
"""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1"}


def streaming(scale: Scale) -> Table:
    """The loader on the same data set from a local disk and from an S3 server on this machine."""
    rows = []
    for kind in KINDS:
        found = crops(kind, scale)
        rows += [*_rows(kind, _measured(found, scale)), *_reading(kind, found, scale)]
    notes = (
        ABOUT,
        f"decode and one 256x128 random resized crop, batches of {scale.batch}, 1 thread; only the client's CPU time",
        "one shard, blocks of 256 crops; each epoch begins with an empty cache, so every block is fetched, checked, "
        "written, and read crop by crop",
        "blocks alone: ranges of 256 crops one after the other, as bytes in memory",
    )
    return Table("streaming", "from S3 against local disk", "img/s per CPU-second", tuple(rows), notes)


def _measured(found: Crops, scale: Scale) -> Rates:
    local = _in_one_shard(found)
    with ExitStack() as stack:
        url, storage = stack.enter_context(_served(local))
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=scale.cache))
        blocks = stack.enter_context(loading(url, storage, scale, cache_dir=folder))
        works = {
            LOCAL: repeated(stack.enter_context(loading(str(local), StorageConfig(), scale)), EPOCHS),
            BLOCKS: repeated(lambda: _from_empty(Path(folder), blocks), EPOCHS),
            SINGLY: stack.enter_context(loading(url, storage, scale, cache_gb=0)),
        }
        return rates(works, scale.rounds, dict.fromkeys(works, process_time))


def _rows(kind: str, found: Rates) -> list[Row]:
    def row(what: str, target: Target | None = None) -> Row:
        return Row(f"{kind}: CPU time per image, {what}", Spread.of(found[what]), LOCAL, Spread.of(found[LOCAL]),
                   ratio(found[LOCAL], found[what]), target)  # fmt: skip

    return [row(BLOCKS, Target(1.15, at_least=False)), row(SINGLY)]


def _reading(kind: str, found: Crops, scale: Scale) -> list[Row]:
    """Blocks and nothing else, by our store and by well-kept clients; in a thread, as the loader reads them."""
    local = _in_one_shard(found)
    with _served(local) as (url, storage), ThreadPoolExecutor(1) as thread:
        (shard,) = Manifest.load(str(local)).shards
        size = min(StreamConfig().block, shard.rows // 3) * shard.bytes // shard.rows
        starts = range(0, shard.bytes - size, size)
        ours = open_store(url, storage)
        client = boto3.client("s3", endpoint_url=storage.endpoint_url)
        bucket = S3Store("bench", endpoint=storage.endpoint_url, client_options={"allow_http": True},
                         access_key_id=CREDENTIALS["AWS_ACCESS_KEY_ID"], region=CREDENTIALS["AWS_DEFAULT_REGION"],
                         secret_access_key=CREDENTIALS["AWS_SECRET_ACCESS_KEY"])  # fmt: skip

        def by_obstore(start: int) -> bytes:
            return obstore.get_range(bucket, f"set/{shard.name}", start=start, length=size).to_bytes()

        def by_boto3(start: int) -> bytes:
            wanted = f"bytes={start}-{start + size - 1}"
            answer: bytes = client.get_object(Bucket="bench", Key=f"set/{shard.name}", Range=wanted)["Body"].read()
            return answer

        def by_us(start: int) -> bytes:
            return ours.read(shard.name, start=start, size=size)

        def all_blocks(read: Callable[[int], bytes]) -> Work:
            return lambda: thread.submit(lambda: sum(len(read(start)) for start in starts)).result()

        assert by_obstore(size) == by_us(size) == by_boto3(size)
        works = {OURS: all_blocks(by_us), OBSTORE: all_blocks(by_obstore), BOTO3: all_blocks(by_boto3)}
        rated = rates(works, scale.rounds, dict.fromkeys(works, process_time))
    rated = {name: [figure / 1e6 for figure in figures] for name, figures in rated.items()}
    return [
        Row(f"{kind}: MB per CPU-second, blocks alone", Spread.of(rated[OURS]), peer, Spread.of(rated[peer]),
            ratio(rated[OURS], rated[peer]), None)
        for peer in (OBSTORE, BOTO3)
    ]  # fmt: skip


def _from_empty(folder: Path, work: Work) -> int:
    for path in folder.glob("*-*"):
        path.unlink()
    return work()


def _in_one_shard(found: Crops) -> Path:
    """The crops as they are sharded by default, which makes blocks whole; once."""
    folder = found.folder / "one_shard"
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
        with redirect_stderr(StringIO()):
            ingest([str(found.files)], str(part), ShardConfig(workers=1), StorageConfig())
        part.rename(folder)
    return folder


@contextmanager
def _served(folder: Path) -> Iterator[tuple[str, StorageConfig]]:
    """The data set in a bucket of a server process."""
    os.environ.update(CREDENTIALS)
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        storage = StorageConfig(endpoint_url="http://{}:{}".format(*server.stdout.readline().split()))
        client = boto3.client("s3", endpoint_url=storage.endpoint_url)
        client.create_bucket(Bucket="bench")
        for path in folder.rglob("*"):
            if path.is_file():
                client.upload_file(str(path), "bench", f"set/{path.relative_to(folder)}")
        yield "s3://bench/set", storage
    finally:
        server.kill()
        server.wait()
