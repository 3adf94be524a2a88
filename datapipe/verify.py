"""Is a data set still what was written? Hashes of manifest, tars and indexes, tar headers, every crop's checksum."""

import hashlib
import tarfile
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import pyarrow
import pyarrow.compute
import simplejpeg
import xxhash

from datapipe.config import StorageConfig
from datapipe.errors import DataError, NotFoundError
from datapipe.manifest import Manifest, Shard, read_index
from datapipe.plan_shards import BLOCK, END_BYTES
from datapipe.progress import Progress
from datapipe.shard import header
from datapipe.storage import Store, open_store
from datapipe.workers import Workers

Decode = Literal["none", "sample", "all"]
SAMPLE = 100
"""With "sample", one crop in so many is decoded, and one of each shard at least."""
MOST_PER_SHARD = 20
"""Findings listed one by one per shard; more are counted."""


class Finding(NamedTuple):
    """Something wrong: where it is, down to the crop, and what it is."""

    where: str
    what: str


class Verified(NamedTuple):
    """What was looked at, and what was wrong."""

    manifest: Manifest
    findings: list[Finding]
    decoded: int


class _Checked(NamedTuple):
    findings: list[Finding]
    keys: pyarrow.Array
    decoded: int


def verify(url: str, decode: Decode, storage: StorageConfig, *, workers: int = 0) -> Verified:
    """Check a data set against its manifest. Reads every byte; holds one tar per worker in memory.

    Raises NotFoundError where there is no manifest and DataError where the manifest itself is damaged.
    """
    manifest = Manifest.load(url, storage)
    store = open_store(manifest.url, storage)
    findings: list[Finding] = []
    keys, decoded = [], 0
    tasks = ((store, shard, decode) for shard in manifest.shards)
    with Progress("verify", manifest.bytes) as progress, Workers(workers) as pool:
        results = pool.run(check_shard, tasks, count=len(manifest.shards))
        for shard, checked in zip(manifest.shards, results, strict=True):
            findings += checked.findings
            keys.append(checked.keys)
            decoded += checked.decoded
            progress.advance(shard.bytes, f"{len(keys)} of {len(manifest.shards)} shards, {len(findings)} findings")
    return Verified(manifest, findings + list(_repeated(manifest, keys)), decoded)


def check_shard(store: Store, shard: Shard, decode: Decode) -> _Checked:
    """All findings of one tar and its index."""
    none = pyarrow.array([], pyarrow.string())
    try:
        rows = read_index(store, shard)
    except DataError as error:
        return _Checked([Finding(shard.index, error.what), *_check_tar(store, shard)[0]], none, 0)
    findings, tar = _check_tar(store, shard)
    decoded = 0
    if tar is not None:
        broken = []
        for number, row in enumerate(rows.to_pylist()):
            looked = decode == "all" or (decode == "sample" and number % SAMPLE == 0)
            what = _wrong(tar, row, decode=looked)
            decoded += looked
            if what:
                broken.append(Finding(f"{shard.name}: {row['key']}.jpg ({row['source']}: {row['name']})", what))
        findings += broken[:MOST_PER_SHARD]
        if len(broken) > MOST_PER_SHARD:
            findings.append(Finding(shard.name, f"and {len(broken) - MOST_PER_SHARD:,} more crops of this shard"))
    return _Checked(findings, rows["key"].combine_chunks(), decoded)


def _check_tar(store: Store, shard: Shard) -> tuple[list[Finding], bytes | None]:
    try:
        tar = store.read(shard.name)
    except NotFoundError:
        return [Finding(shard.name, "the tar is missing")], None
    findings = []
    if len(tar) != shard.bytes:
        findings.append(Finding(shard.name, f"the tar has {len(tar):,} bytes, the manifest says {shard.bytes:,}"))
    elif hashlib.sha256(tar).hexdigest() != shard.sha256:
        findings.append(Finding(shard.name, "the tar's bytes are not those that were written (sha256)"))
    if tar[-END_BYTES:].strip(b"\0"):
        findings.append(Finding(shard.name, "the tar's end is missing"))
    return findings, tar


def _wrong(tar: bytes, row: dict[str, Any], *, decode: bool) -> str:
    """What is wrong with one crop; empty if nothing is."""
    start, size = row["offset"], row["size"]
    data = memoryview(tar)[start:start + size]
    if start < BLOCK or len(data) != size:
        return f"its bytes [{start:,}, {start + size:,}) are not in the tar"
    found = tar[start - BLOCK:start]
    if found != header(row["key"], size):
        return f"the header before it {_describe(found)}, the index says {row['key']}.jpg with {size:,} bytes"
    if xxhash.xxh3_64_intdigest(data) != row["xxh3"]:
        return "its bytes changed (xxh3)"
    return _undecodable(bytes(data), row) if decode else ""


def _undecodable(data: bytes, row: dict[str, Any]) -> str:
    if hashlib.sha256(data).digest() != row["sha256"]:
        return "its bytes changed (sha256)"
    try:
        height, width = simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True).shape[:2]
    except ValueError as error:
        return f"it cannot be decoded: {error}"
    if (height, width) != (row["height"], row["width"]):
        return f"it is {height}x{width} pixels, the index says {row['height']}x{row['width']}"
    return ""


def _describe(block: bytes) -> str:
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"is no tar header ({error})"
    return f"is for {member.name} with {member.size:,} bytes"


def _repeated(manifest: Manifest, keys: list[pyarrow.Array]) -> Iterator[Finding]:
    if not keys:
        return
    counts = pyarrow.compute.value_counts(pyarrow.chunked_array(keys))
    for count in counts.filter(pyarrow.compute.greater(counts.field("counts"), 1)).to_pylist()[:MOST_PER_SHARD]:
        yield Finding(manifest.file, f"the key {count['values']} occurs {count['counts']} times")
