"""Is a data set still what was written? Hashes of manifest, tars and indexes, tar headers, every crop's checksum, and
what rows say of one another: keys, duplicates, removed crops, selections; and the packed index."""

import hashlib
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
import simplejpeg
import xxhash

from datapipe.core.config import Decode, StorageConfig
from datapipe.core.errors import DataError, NotFoundError
from datapipe.core.parallel import Workers
from datapipe.core.progress import Progress, counted
from datapipe.dataset.consistency import Finding, relation_findings
from datapipe.dataset.index import INDEX, MARKS, Shard, read_index
from datapipe.dataset.manifest import Manifest
from datapipe.dataset.packed_index import wrong_entries
from datapipe.dataset.perceptual_hash import difference_hash
from datapipe.dataset.quarantine import NAME as QUARANTINE
from datapipe.dataset.quarantine import read_quarantine
from datapipe.dataset.selection import read_selection
from datapipe.dataset.tar import BLOCK, END_BYTES, header
from datapipe.storage import Store, open_store

SAMPLE = 100
"""With "sample", one crop in so many is decoded, and one of each shard at least."""
MOST_PER_SHARD = 20
"""Findings listed one by one per shard; more are counted."""


class Verified(NamedTuple):
    """What was looked at, and what was wrong."""

    manifest: Manifest
    findings: list[Finding]
    decoded: int
    crops: int
    """Number of crops that were found in the indexes of all shards, selected or not; removed ones do not count."""


class _Checked(NamedTuple):
    findings: list[Finding]
    rows: pyarrow.Table
    """RELATED of the shard's own crops."""
    decoded: int


RELATED = ("key", "sha256", "dhash", *MARKS)
_NONE = INDEX.empty_table().select(RELATED)


def verify(url: str, decode: Decode, storage: StorageConfig, *, workers: int = 0) -> Verified:
    """Check a data set against its manifest. Reads every byte; holds one tar per worker in memory.

    Raises NotFoundError where there is no manifest and DataError where the manifest itself is damaged.
    """
    manifest = Manifest.load(url, storage)
    store = open_store(manifest.url, storage)
    findings: list[Finding] = []
    tables, decoded = [], 0
    tasks = ((store, shard, decode) for shard in manifest.shards)
    with Progress("verify", manifest.bytes) as progress, Workers(workers) as pool:
        results = pool.run(check_shard, tasks, count=len(manifest.shards))
        for shard, checked in zip(manifest.shards, results, strict=True):
            findings += checked.findings
            tables.append(checked.rows)
            decoded += checked.decoded
            progress.advance(
                shard.bytes,
                f"{len(tables)} of {counted(len(manifest.shards), 'shard')}, {counted(len(findings), 'finding')}",
            )
    live = sum(len(rows) for rows in tables)
    if not findings and live != manifest.stored_rows - manifest.removed:
        what = f"{manifest.removed:,} crops are said to be removed, and {manifest.stored_rows - live:,} are"
        findings.append(Finding(manifest.file, what))
    findings += relation_findings(pyarrow.concat_tables([_NONE, *tables]), manifest.file)
    findings += _selection_findings(store, manifest)
    findings += _packed_findings(manifest, storage)
    findings += _quarantine_findings(store)
    if not live:
        findings.append(Finding(manifest.file, "there is no crop in it"))
    return Verified(manifest, findings, decoded, live)


def check_shard(store: Store, shard: Shard, decode: Decode) -> _Checked:
    """All findings of one tar and its index."""
    try:
        rows = read_index(store, shard)
    except DataError as error:
        return _Checked([Finding(shard.index, error.what), *check_tar(store, shard)[0]], _NONE, 0)
    findings, tar = check_tar(store, shard)
    decoded = 0
    if tar is not None:
        broken = []
        for number, row in enumerate(rows.to_pylist()):
            looked = decode == "all" or (decode == "sample" and number % SAMPLE == 0)
            what = wrong(tar, row, decode=looked)
            decoded += looked
            if what:
                broken.append(Finding(f"{shard.name}: {row['key']}.jpg ({row['source']}: {row['name']})", what))
        findings += broken[:MOST_PER_SHARD]
        if len(broken) > MOST_PER_SHARD:
            findings.append(Finding(shard.name, f"and {len(broken) - MOST_PER_SHARD:,} more crops of this shard"))
    live = ~rows["removed"].to_numpy()
    findings += _stand_in_findings(shard, rows, live)
    return _Checked(findings, rows.select(RELATED).filter(pyarrow.array(live)), decoded)


def _stand_in_findings(shard: Shard, rows: pyarrow.Table, live: np.ndarray) -> list[Finding]:
    """Rows of removed crops have to be copies of the next crop of the shard that is there."""
    present = np.flatnonzero(live)
    removed = np.flatnonzero(~live)
    if not len(present) or not len(removed):
        return []  # a shard without crops of its own refers to another one: headers and checksums were compared
    expected = rows.take(present[np.searchsorted(present, removed) % len(present)]).drop_columns(["removed"])
    if rows.take(removed).drop_columns(["removed"]).equals(expected):
        return []
    return [Finding(shard.index, "a row of a removed crop is not a copy of the next one")]


def _selection_findings(store: Store, manifest: Manifest) -> Iterator[Finding]:
    if not manifest.selection:
        return
    try:
        rows = read_selection(store, manifest.selection, manifest.stored_rows)
    except DataError as error:
        yield Finding(manifest.selection.file, error.what)
        return
    if not len(rows):
        yield Finding(manifest.selection.file, "it selects no crops")


def _quarantine_findings(store: Store) -> Iterator[Finding]:
    """The list of what was left out can be read; there need not be one."""
    try:
        read_quarantine(store)
    except DataError as error:
        yield Finding(QUARANTINE, error.what)


def _packed_findings(manifest: Manifest, storage: StorageConfig) -> list[Finding]:
    """A packed index has to be what the indexes say; there need not be one."""
    try:
        wrong = wrong_entries(manifest, storage)
    except DataError:
        return []  # the index that it would be compared with is a finding by itself
    what = "it is not what the indexes say: delete it, or `verify --repair` makes it anew"
    return [Finding(name, what) for name in wrong]


def check_tar(store: Store, shard: Shard) -> tuple[list[Finding], bytes | None]:
    """(what is wrong with the tar as a whole, its bytes if there are any)."""
    try:
        tar = store.read(shard.name, start=0, size=shard.bytes + 1)  # of a longer one, no more is needed
    except NotFoundError:
        return [Finding(shard.name, "the tar is missing")], None
    findings = []
    if len(tar) != shard.bytes:
        size = store.size(shard.name)
        findings.append(Finding(shard.name, f"the tar has {size:,} bytes, the manifest says {shard.bytes:,}"))
    elif hashlib.sha256(tar).hexdigest() != shard.sha256:
        findings.append(Finding(shard.name, "the tar's bytes are not those that were written (sha256)"))
    if tar[-END_BYTES:].strip(b"\0"):
        findings.append(Finding(shard.name, "the tar's end is missing"))
    return findings, tar


def wrong(tar: bytes, row: dict[str, Any], *, decode: bool) -> str:
    """What is wrong with one crop; empty if nothing is."""
    start, size = row["offset"], row["size"]
    data = memoryview(tar)[start : start + size]
    if start < BLOCK or len(data) != size:
        return f"its bytes [{start:,}, {start + size:,}) are not in the tar"
    stored = tar[start - BLOCK : start]
    if stored != header(row["key"], size):
        return f"the header before it {_describe(stored)}, the index says {row['key']}.jpg with {size:,} bytes"
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
    if difference_hash(data) != row["dhash"]:
        return "its perceptual hash is not that of the index"
    return ""


def _describe(block: bytes) -> str:
    try:
        member = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return f"is no tar header ({error})"
    return f"is for {member.name} with {member.size:,} bytes"
