"""What a data set is: a list of shards with their hashes, and for each crop a row in the shards' indexes.

The manifest is written last, so that its presence means the data set is complete; its id is a hash of its content, so
that a checkpoint can say which crops it has seen. Row r of all indexes in the order of the shards is sample id r.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version as library_version
from typing import Any

import pyarrow
import pyarrow.parquet

from datapipe.config import StorageConfig
from datapipe.errors import DataError, NotFoundError
from datapipe.storage import Store, open_store, split_url

FORMAT = 2
"""Layout of manifest and index; a reader refuses any other one."""
LIBRARIES = ("numpy", "pillow", "pyarrow", "simplejpeg", "webdataset")
INDEX_READS = 8
NAME = re.compile(r"manifest-v(\d{4,})\.json")

INDEX = pyarrow.schema([
    ("key", pyarrow.string()),  # 32 hex digits: hash of (source, name); the member of the tar is "<key>.jpg"
    ("offset", pyarrow.int64()),  # of the JPEG's first byte within the tar
    ("size", pyarrow.int32()),  # bytes of the JPEG
    ("height", pyarrow.int32()),
    ("width", pyarrow.int32()),
    ("sha256", pyarrow.binary(32)),  # of the JPEG
    ("xxh3", pyarrow.uint64()),  # of the JPEG; checked whenever the crop is read
    ("dhash", pyarrow.uint64()),  # difference hash of the upright image's luma, 64 bits
    ("source", pyarrow.string()),
    ("name", pyarrow.string()),  # original name within its source
    ("pid", pyarrow.int32()),  # as the source wrote it; -1: unknown, or junk in Market-1501
    ("camera", pyarrow.int16()),  # as the source wrote it, from 1; -1: unknown
    ("video", pyarrow.string()),  # name of the video within the source; empty where there is none
    ("track", pyarrow.int64()),  # unique within (source, video); -1: unknown
    ("frame", pyarrow.int64()),  # as the source numbers them; -1: unknown
    ("duplicate_of", pyarrow.string()),  # key of the first crop of the data set with the same bytes; null: none
    ("near_of", pyarrow.string()),  # key of the crop that this one is nearly equal to; null: none
    ("removed", pyarrow.bool_()),  # taken out: the row holds another crop of the shard in its place
])
"""Columns of a shard's index, one row per crop, in the order of the tar."""


@dataclass(frozen=True)
class Shard:
    """One tar and its index; names are relative to the manifest's folder."""

    name: str
    rows: int
    bytes: int
    sha256: str
    index: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """One version of a data set. Equal content has an equal `id`, wherever it lies and whoever made it."""

    shards: tuple[Shard, ...]
    name: str = ""
    plan: str = ""
    """Id of the plan that the shards were made from: all crops, their order and the cuts between shards."""
    parent: str = ""
    """Id of the manifest this one was derived from; empty for a first version."""
    licence: str = ""
    """What the images may be used for, as their owner put it."""
    quarantined: int = 0
    """Crops of the sources that were left out; see quarantine.parquet."""
    made_by: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries that decoded and wrote."""
    version: int = 1
    url: str = field(default="", compare=False)
    """The folder it was loaded from."""

    @property
    def rows(self) -> int:
        """Crops in all shards."""
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all tars."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def id(self) -> str:
        """sha256 (hex) of everything but the place and the libraries' versions."""
        content = self._content()
        del content["made_by"]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def file(self) -> str:
        """Its name within the folder."""
        return f"manifest-v{self.version:04d}.json"

    @staticmethod
    def load(url: str, storage: StorageConfig = StorageConfig()) -> "Manifest":  # noqa: B008  (frozen)
        """The newest manifest of a folder, or the one that the url names.

        Raises NotFoundError where there is none, DataError where it is damaged or of a newer format.
        """
        folder, file = split_url(url) if url.endswith(".json") else (url, "")
        store = open_store(folder, storage)
        file = file or _newest(store)
        try:
            text = store.read(file)
        except NotFoundError as error:
            raise NotFoundError("there is no such manifest", where=error.where,
                                hint="give the folder that `python -m datapipe shard` wrote (--out)") from error
        return _parse(text, store.address(file), folder)

    def save(self, store: Store) -> "Manifest":
        """Write it into the folder, once. A manifest of this version with other content raises DataError."""
        record = {**self._content(), "id": self.id, "rows": self.rows, "bytes": self.bytes}
        saved = dataclasses.replace(self, url=store.url)
        if not store.create(self.file, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()):
            found = Manifest.load(store.address(self.file), getattr(store, "config", StorageConfig()))
            if found.id != self.id:
                raise DataError("another data set is already there", where=store.address(self.file),
                                hint="choose another --out")
        return saved

    def table(self, columns: Sequence[str], storage: StorageConfig = StorageConfig()) -> pyarrow.Table:  # noqa: B008
        """These columns of all indexes, one row per sample id. Checks each index's hash; DataError names a bad one."""
        store = open_store(self.url, storage)
        with ThreadPoolExecutor(INDEX_READS) as pool:
            parts = list(pool.map(lambda shard: read_index(store, shard, columns), self.shards))
        return pyarrow.concat_tables(parts) if parts else INDEX.empty_table().select(list(columns))

    def _content(self) -> dict[str, Any]:
        shards = [dataclasses.asdict(shard) for shard in self.shards]
        return {"format": FORMAT, "name": self.name, "version": self.version, "parent": self.parent, "plan": self.plan,
                "licence": self.licence, "quarantined": self.quarantined, "made_by": self.made_by, "shards": shards}


def read_index(store: Store, shard: Shard, columns: Sequence[str] | None = None) -> pyarrow.Table:
    """A shard's index, verified against the manifest. Raises DataError that names it."""
    where = store.address(shard.index)
    try:
        data = store.read(shard.index)
    except NotFoundError as error:
        raise DataError("an index of the data set is missing", where=where, hint=_REPAIR) from error
    if hashlib.sha256(data).hexdigest() != shard.index_sha256:
        raise DataError("an index of the data set is not the one that was written", where=where, hint=_REPAIR)
    try:
        wanted = None if columns is None else list(columns)
        table = pyarrow.parquet.read_table(pyarrow.BufferReader(data), columns=wanted)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"an index of the data set cannot be read: {error}", where=where, hint=_REPAIR) from error
    if table.num_rows != shard.rows:
        raise DataError(f"an index has {table.num_rows} rows, the manifest says {shard.rows}", where=where,
                        hint=_REPAIR)
    return table


_REPAIR = "`python -m datapipe verify` lists what is wrong; copy the data set again or shard it anew"


def libraries() -> dict[str, str]:
    """Versions of the libraries that decide the bytes of shards and indexes."""
    return {name: library_version(name) for name in LIBRARIES}


def _newest(store: Store) -> str:
    try:
        found = [entry.name for entry in store.list("manifest-v") if NAME.fullmatch(entry.name)]
        if found:
            return max(found, key=lambda name: int(NAME.fullmatch(name)[1]))  # type: ignore[index]
        begun = next(store.list("shards/"), None)
    except NotFoundError as error:
        raise NotFoundError("the data set does not exist", where=store.url,
                            hint="make it with `python -m datapipe shard SOURCE --out " + store.url + "`") from error
    if begun:
        raise DataError("the data set is not complete: it has shards but no manifest", where=store.url,
                        hint="run the same `python -m datapipe shard` command again; it goes on where it stopped")
    raise NotFoundError("there is no data set here: no manifest-v0001.json", where=store.url,
                        hint="give the folder that `python -m datapipe shard` wrote (--out)")


def _parse(text: bytes, where: str, folder: str) -> Manifest:
    try:
        record = json.loads(text)
        found = record["format"]
        if found != FORMAT:
            age = "a newer" if found > FORMAT else "an older"
            raise DataError(f"the manifest has format {found}, this version reads format {FORMAT}", where=where,
                            hint=f"use {age} version of this project, or make the data set again from its crops")
        manifest = Manifest(
            shards=tuple(Shard(**shard) for shard in record["shards"]), url=folder,
            **{key: record[key] for key in ("name", "plan", "parent", "licence", "quarantined", "made_by", "version")})
        stated = (record["id"], record["rows"], record["bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"the manifest cannot be read: {error!r}", where=where, hint=_REPAIR) from error
    if stated != (manifest.id, manifest.rows, manifest.bytes):
        raise DataError("the manifest's content does not match its own id: it was changed or damaged", where=where,
                        hint=_REPAIR)
    return manifest
