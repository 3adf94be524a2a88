"""What a data set is: a list of shards with their hashes, and for each crop a row in the shards' indexes.

The manifest is written last, so that its presence means the data set is complete; its id is a hash of its content, so
that a checkpoint can say which crops it has seen. The rows of all indexes in the order of the shards, or of these the
selected ones, are the sample ids: 0, 1, 2 ...

    manifest-v0001.json            what `shard` or `reshard` wrote
    manifest-v0002-1a2b3c4d.json   derived from it by `select`, `remove` or `verify --repair`
    packed-v1-...index             what streaming needs of a version's indexes, in one file; derived, may be deleted
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version as library_version
from typing import Any

import numpy as np
import pyarrow

from datapipe.core.bounds.text_trees import parse_record
from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError, NotFoundError
from datapipe.core.progress import QUIET_S, Progress
from datapipe.dataset.index import INDEX, Shard, read_index
from datapipe.dataset.selection import Selection, read_selection
from datapipe.storage import Store, open_store, split_url, unsafe

MOST_BYTES = 256 << 20
"""Of a manifest: a shard takes 400 of them, so that this is room for some thousand million crops."""
MOST_SHARD_ROWS = 1 << 31
MOST_NUMBER = 1 << 53
"""Rows and bytes beyond any data set; sums of them still fit 64 bits."""
FORMAT = 2
"""Layout of manifest and index; a reader refuses any other one."""
LIBRARIES = ("numpy", "pillow", "pyarrow", "simplejpeg", "webdataset")
INDEX_READS = 8
NAME = re.compile(r"manifest-v(\d{4,})(?:-[0-9a-f]{8})?\.json")
ORDINAL = "shard"
"""A column that `Manifest.table` makes: int32, which of the manifest's shards holds the crop."""


@dataclass(frozen=True)
class Manifest:
    """One version of a data set. Equal content has an equal `id`, wherever it lies and whoever made it."""

    shards: tuple[Shard, ...]
    name: str = ""
    plan: str = ""
    """Id of the plan that the shards were made from: all crops, their order and the cuts between shards."""
    parent: str = ""
    """Id of the manifest this one was derived from; empty for a first version."""
    derived_by: str = ""
    """"select", "remove" or "repair"; empty for a first version."""
    replaces: tuple[str, ...] = ()
    """Ids of the versions it takes the place of, row for row: its ancestors by "remove" and "repair" alone. What was
    trained on them goes on with this one."""
    selection: Selection | None = None
    """Which rows of the shards belong to it; None: all of them."""
    removed: int = 0
    """Rows of the shards whose crop was taken out."""
    licence: str = ""
    """What the images may be used for, as their owner put it."""
    notes: tuple[str, ...] = ()
    """What was used to choose the crops and binds what is trained on them, a sentence each: labelled data, for one."""
    quarantined: int = 0
    """Crops of the sources that were left out; see quarantine.parquet."""
    made_by: dict[str, str] = field(default_factory=dict)
    """Versions of the libraries that decoded and wrote."""
    version: int = 1
    url: str = field(default="", compare=False)
    """The folder it was loaded from."""

    @property
    def rows(self) -> int:
        """Crops, those that are selected."""
        return self.selection.rows if self.selection else self.stored_rows

    @property
    def stored_rows(self) -> int:
        """Rows of all indexes, selected or not."""
        return sum(shard.rows for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Bytes of all tars."""
        return sum({shard.name: shard.bytes for shard in self.shards}.values())

    @cached_property
    def id(self) -> str:
        """sha256 (hex) of everything but the place and the libraries' versions."""
        content = self._content()
        del content["made_by"]
        return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()

    @property
    def file(self) -> str:
        """The manifest's file name within the folder. A derived version carries its id, so that none can take the
        place of another."""
        return f"manifest-v{self.version:04d}{f'-{self.id[:8]}' if self.derived_by else ''}.json"

    @staticmethod
    def load(url: str, storage: StorageConfig = StorageConfig()) -> "Manifest":  # noqa: B008  (frozen)
        """The newest manifest of a folder, or the one that the url names.

        Raises NotFoundError where there is none, DataError where it is damaged, of another format, or where crops were
        removed from it since: it then says which version takes its place.
        """
        folder, file = split_url(url) if url.endswith(".json") else (url, "")
        store = open_store(folder, storage)
        if not file:
            return Manifest.read(store, _newest(store))
        manifest = Manifest.read(store, file)
        successor = manifest.successor(store)
        if successor:
            raise DataError(
                f"crops were removed from this version: {successor.file} takes its place, row for row",
                where=store.address(file),
                hint=f"give {store.address(successor.file)}: what was trained on the old one accepts it",
            )
        return manifest

    @staticmethod
    def read(store: Store, file: str) -> "Manifest":
        """A manifest of this folder as it was written, whatever became of its shards; raises as `load` does."""
        try:
            text = store.read_small(file, MOST_BYTES, what="the manifest", hint=COPY_AGAIN)
        except NotFoundError as error:
            raise NotFoundError(
                "there is no such manifest",
                where=error.where,
                hint="give the folder that `python -m datapipe shard` wrote (--out)",
            ) from error
        return _parse(text, store.address(file), store.url)

    @staticmethod
    def versions(store: Store, *, after: int = 0) -> Iterator["Manifest"]:
        """All manifests of a folder whose version is higher than this, in the order of versions."""
        named = [(version, file) for version, file in manifest_files(store) if version > after]
        return (Manifest.read(store, file) for _, file in sorted(named))

    def successor(self, store: Store) -> "Manifest | None":
        """The newest version of this folder that takes its place; None where there is none."""
        identity, newest = self.id, None
        for other in Manifest.versions(store, after=self.version):
            if identity in other.replaces:
                newest = other
        return newest

    def save(self, store: Store) -> "Manifest":
        """Write it into the folder, once. A manifest of this version with other content raises DataError."""
        record = {**self._content(), "id": self.id, "rows": self.rows, "bytes": self.bytes}
        if not store.create(self.file, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()):
            existing = Manifest.read(store, self.file)
            if existing.id != self.id:
                raise DataError(
                    "another data set is already there", where=store.address(self.file), hint="choose another --out"
                )
        return dataclasses.replace(self, url=store.url)

    def derive(self, store: Store, derived_by: str, **changes: Any) -> "Manifest":
        """Save a version made from this one, with the next free number. A version equal but for the number is kept.

        "remove" and "repair" take the place of this one; "select" stands beside it.
        """
        others = list(Manifest.versions(store))
        replaces = () if derived_by == "select" else (*self.replaces, self.id)
        changes |= {"parent": self.id, "derived_by": derived_by, "replaces": replaces}
        for other in others:
            if dataclasses.replace(self, **changes, version=other.version).id == other.id:
                return other
        newest = max(other.version for other in others)
        return dataclasses.replace(self, **changes, version=newest + 1).save(store)

    def table(self, columns: Sequence[str], storage: StorageConfig = StorageConfig()) -> pyarrow.Table:  # noqa: B008
        """These columns of all indexes, one row per sample id; ORDINAL ("shard") says which shard holds the crop.

        Reads the indexes that hold selected rows, and checks their hashes; DataError names a bad one.
        """
        reads = self._reads(columns, storage).values()
        with (
            Progress("read indexes", len(reads), unit="shards", quiet_s=QUIET_S) as progress,
            ThreadPoolExecutor(INDEX_READS) as pool,
        ):
            parts = list(progress.over(pool.map(lambda read: read(), reads), lambda _: 1))
        return pyarrow.concat_tables(parts) if parts else _SCHEMA.empty_table().select(list(columns))

    def tables(
        self,
        columns: Sequence[str],
        storage: StorageConfig = StorageConfig(),  # noqa: B008  (frozen)
    ) -> Iterator[tuple[int, pyarrow.Table]]:
        """Read the index shard by shard, one in memory at a time: (number of the shard, its rows)."""
        return ((ordinal, read()) for ordinal, read in self._reads(columns, storage).items())

    def _reads(self, columns: Sequence[str], storage: StorageConfig) -> dict[int, Callable[[], pyarrow.Table]]:
        """For each shard that holds rows, what reads them."""
        store = open_store(self.url, storage)
        return {
            ordinal: partial(_part, store, self.shards[ordinal], ordinal, columns, rows)
            for ordinal, rows in self.rows_of_shards(storage).items()
        }

    def rows_of_shards(
        self,
        storage: StorageConfig = StorageConfig(),  # noqa: B008  (frozen)
    ) -> dict[int, np.ndarray | None]:
        """For each shard that holds rows of this version, by its number: which of the shard's own rows they are, int64,
        ascending; None: all of them."""
        starts = np.cumsum([0, *(shard.rows for shard in self.shards)])
        rows = self.selected(storage) if self.selection else None
        places = starts if rows is None else np.searchsorted(rows, starts)
        return {
            ordinal: None if rows is None else rows[places[ordinal] : places[ordinal + 1]] - starts[ordinal]
            for ordinal in np.flatnonzero(np.diff(places)).tolist()
        }

    def selected(self, storage: StorageConfig = StorageConfig()) -> np.ndarray:  # noqa: B008
        """int64 [rows]: for each sample id its row among those of all shards. Raises DataError that names the file."""
        if self.selection is None:
            return np.arange(self.stored_rows)
        return read_selection(open_store(self.url, storage), self.selection, self.stored_rows)

    def _content(self) -> dict[str, Any]:
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "url"}
        selection = dataclasses.asdict(self.selection) if self.selection else None
        shards = [dataclasses.asdict(shard) for shard in self.shards]
        if self.notes:
            content["notes"] = list(self.notes)
        else:
            del content["notes"]  # as in manifests from before there were any: their ids stay
        return {**content, "format": FORMAT, "replaces": list(self.replaces), "selection": selection, "shards": shards}


_SCHEMA = INDEX.append(pyarrow.field(ORDINAL, pyarrow.int32()))


def _part(store: Store, shard: Shard, ordinal: int, columns: Sequence[str], chosen: np.ndarray | None) -> pyarrow.Table:
    """The columns of one shard: all rows, or those that are chosen."""
    table = read_index(store, shard, [name for name in columns if name != ORDINAL])
    if chosen is not None and len(chosen) < shard.rows:
        table = table.take(chosen)
    if ORDINAL not in columns:
        return table
    held = pyarrow.array(np.full(len(table), ordinal, np.int32))
    return table.append_column(ORDINAL, held).select(list(columns))


def manifest_files(store: Store) -> list[tuple[int, str]]:
    """(version, file) of every manifest of a folder. Raises NotFoundError where there is no folder."""
    matches = (NAME.fullmatch(entry.name) for entry in store.list("manifest-v"))
    return [(int(match[1]), match[0]) for match in matches if match]


def load_unselected(url: str, storage: StorageConfig) -> Manifest:
    """The newest version of a folder that is no selection, or the version that the url names."""
    newest = Manifest.load(url, storage)
    if url.endswith(".json") or not newest.selection:
        return newest
    versions = Manifest.versions(open_store(url, storage))
    return [version for version in versions if not version.selection][-1]


def has_manifest(store: Store) -> bool:
    """Whether a folder holds a complete data set: a first version, or one derived from it."""
    try:
        return bool(manifest_files(store))
    except NotFoundError:
        return False


COPY_AGAIN = "copy the file again; where there is no copy, `python -m datapipe shard` makes the data set anew"


def libraries() -> dict[str, str]:
    """Versions of the libraries that decide the bytes of shards and indexes."""
    return {name: library_version(name) for name in LIBRARIES}


def _newest(store: Store) -> str:
    try:
        files = manifest_files(store)
        if files:
            return _highest(store, files)
        begun = next(store.list("shards/"), None)
    except NotFoundError as error:
        raise NotFoundError(
            "the data set does not exist",
            where=store.url,
            hint="make it with `python -m datapipe shard SOURCE --out " + store.url + "`",
        ) from error
    if begun:
        raise DataError(
            "the data set is not complete: it has shards but no manifest",
            where=store.url,
            hint="run the same `python -m datapipe shard` command again; it goes on where it stopped",
        )
    raise NotFoundError(
        "there is no data set here: no manifest-v0001.json",
        where=store.url,
        hint="give the folder that `python -m datapipe shard` wrote (--out)",
    )


def _highest(store: Store, versions: list[tuple[int, str]]) -> str:
    newest = max(version for version, _ in versions)
    files = sorted(file for version, file in versions if version == newest)
    if len(files) > 1:
        raise DataError(
            f"two commands made a version {newest} at once: {' and '.join(files)}",
            where=store.url,
            hint="give the file of the one that is meant, or delete the other",
        )
    return files[0]


def _parse(text: bytes, where: str, folder: str) -> Manifest:
    try:
        record = parse_record(text)
        format_version = record["format"]
        if format_version != FORMAT:
            age = "a newer" if format_version > FORMAT else "an older"
            raise DataError(
                f"the manifest has format {format_version}, this version reads format {FORMAT}",
                where=where,
                hint=f"use {age} version of this project, or make the data set again from its crops",
            )
        plain = {field.name: record[field.name] for field in dataclasses.fields(Manifest) if field.name in _PLAIN}
        selection = Selection(**record["selection"]) if record["selection"] else None
        manifest = Manifest(
            shards=tuple(Shard(**shard) for shard in record["shards"]),
            selection=selection,
            replaces=tuple(record["replaces"]),
            notes=tuple(record.get("notes", ())),
            url=folder,
            **plain,
        )
        stated = (record["id"], record["rows"], record["bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"the manifest cannot be read: {error!r}", where=where, hint=COPY_AGAIN) from error
    _refuse_unsafe(manifest, where)
    if stated != (manifest.id, manifest.rows, manifest.bytes):
        raise DataError(
            "the manifest's content does not match its own id: it was changed or damaged", where=where, hint=COPY_AGAIN
        )
    return manifest


SHA256 = re.compile(r"[0-9a-f]{64}")


def _refuse_unsafe(manifest: Manifest, where: str) -> None:
    """Raises DataError where a file that the manifest names does not lie in its folder, whoever wrote it: what is named
    there is read, written anew and deleted. Checksums name files as well, those of the cache on a node."""
    for entry, name, ending in _named(manifest):
        why = unsafe(name) or ("" if name.endswith(ending) else f"it does not end in {ending}")
        if why:
            raise DataError(
                f"the manifest names a file that cannot be its own: {why}",
                where=f"{where}: {entry} {name!r}",
                hint="do not use this data set before you know who wrote that; " + COPY_AGAIN,
            )
    for entry, value in _checksums(manifest):
        if not isinstance(value, str) or not SHA256.fullmatch(value):
            raise DataError("the manifest holds a checksum that is none", where=f"{where}: {entry} {value!r}",
                            hint=COPY_AGAIN)  # fmt: skip
    counts = [
        manifest.version,
        manifest.removed,
        manifest.quarantined,
        *(number for shard in manifest.shards for number in (shard.rows, shard.bytes)),
    ]
    counts += [manifest.selection.rows] if manifest.selection else []
    if any(type(number) is not int or not 0 <= number < MOST_NUMBER for number in counts) or any(
        shard.rows > MOST_SHARD_ROWS for shard in manifest.shards
    ):
        raise DataError("the manifest holds a number of rows, bytes or its version that is none", where=where,
                        hint=COPY_AGAIN)  # fmt: skip
    if not manifest.shards or not manifest.stored_rows:
        raise DataError("the manifest lists no crops: it has no shards, or they have no rows", where=where,
                        hint=COPY_AGAIN)  # fmt: skip
    if manifest.selection and manifest.selection.rows > manifest.stored_rows or manifest.removed > manifest.stored_rows:
        raise DataError(f"the manifest selects or removes more than the {manifest.stored_rows:,} rows of its shards",
                        where=where, hint=COPY_AGAIN)  # fmt: skip
    texts = [manifest.name, manifest.plan, manifest.parent, manifest.derived_by, manifest.licence, *manifest.notes,
             *manifest.replaces]  # fmt: skip
    if not all(isinstance(text, str) for text in texts) or not isinstance(manifest.made_by, dict):
        raise DataError("the manifest holds something else where text has to be", where=where, hint=COPY_AGAIN)


def _named(manifest: Manifest) -> Iterator[tuple[str, str, str]]:
    """(entry, name, how it has to end) of every file that a manifest names."""
    for number, shard in enumerate(manifest.shards):
        yield f"shards[{number}].name", shard.name, ".tar"
        yield f"shards[{number}].index", shard.index, ".parquet"
    if manifest.selection:
        yield "selection.file", manifest.selection.file, ".parquet"


def _checksums(manifest: Manifest) -> Iterator[tuple[str, str]]:
    for number, shard in enumerate(manifest.shards):
        yield f"shards[{number}].sha256", shard.sha256
        yield f"shards[{number}].index_sha256", shard.index_sha256
    if manifest.selection:
        yield "selection.sha256", manifest.selection.sha256


_PLAIN = {field.name for field in dataclasses.fields(Manifest)} - {"shards", "selection", "replaces", "notes", "url"}
