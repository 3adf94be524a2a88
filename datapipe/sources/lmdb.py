"""LMDBs of encoded images, as LUPerson ships them: key "CC_cc_VVVV_NNNNNNNN" (country, city, video, image), raw JPEG.

keys.pkl, a list of the keys or a dict of "keys" and "pids", is read as data: no code in it is ever run. Pages are read
one by one (`LmdbFile`): an LMDB on an object store is fetched once into the temporary folder, and kept there.
"""

import fcntl
import hashlib
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError, StorageError
from datapipe.core.plain_pickle import NamesCodeError, load_plain
from datapipe.dataset.remarks import Remarks
from datapipe.sources.archive_parts import MOST_MEMBER_BYTES
from datapipe.sources.base import UNIT_CROPS, UNKNOWN, Crop
from datapipe.sources.labels import NotUnderstood, labelled, read_number
from datapipe.sources.lmdb_pages import LmdbFile
from datapipe.sources.location import Location, local_path, printable
from datapipe.storage import is_remote, open_object, open_store, split_url

log = logging.getLogger(__name__)
DATA, LOCK, KEYS = "data.mdb", "lock.mdb", "keys.pkl"
ENDINGS = (".mdb", ".lmdb")
LUPERSON_KEY = re.compile(r"(\d+_\d+_\d+)_\d+")
FETCH_BYTES = 16 << 20
MOST_KEYS_BYTES = 4 << 30
"""Of keys.pkl: that of LUPerson's 4 million images has 100 MB."""
KEYS_TIMES, KEYS_FREE = 16, 1 << 20
"""How many times a keys.pkl's own size (which counts as so many bytes at least) its keys may take: a pickle refers to a
text that it has again by two bytes."""
Batch = tuple[tuple[str, ...], tuple[int, ...], list[int]]
"""Keys of a unit, their persons or none, and bytes of the images."""


@dataclass(frozen=True)
class LmdbUnit:
    """Neighbouring keys."""

    keys: tuple[str, ...]
    pids: tuple[int, ...]
    """One per key, or none."""
    bytes: int
    digest: str


@dataclass(frozen=True)
class LmdbSource:
    """One LMDB. The keys are the names of its crops; their order is that of keys.pkl, or of the LMDB without one."""

    UNDERSTANDS = f"an LMDB of images: a folder with {DATA} and perhaps {KEYS}, or a file ({', '.join(ENDINGS)})"

    data: str
    """Url of the file."""
    keys: str
    """Url of keys.pkl; empty where there is none."""
    label: str
    storage: StorageConfig

    @classmethod
    def at(cls, place: Location) -> "LmdbSource | None":
        if not place.is_folder:
            urls = [url for url in place.names if url.lower().endswith(ENDINGS)]
        else:
            urls = [
                f"{place.folder}/{name}"
                for name in place.names
                if f"/{name}".endswith(f"/{DATA}") or (place.is_pattern and _is_lmdb(name))
            ]
        if len(urls) > 1:
            raise DataError(f"the source holds {len(urls)} LMDBs", where=place.url, hint="give each as its own source")
        return cls(urls[0], _find_keys(urls[0], place.storage), place.label, place.storage) if urls else None

    def units(self, remarks: Remarks | None = None) -> Iterator[LmdbUnit]:
        listed = read_keys(self.keys, self.storage, remarks) if self.keys else None
        batches = self._listed(*listed) if listed else self._stored()
        with self._opened() as file:
            most = file.total
        present = total = 0
        for keys, pids, sizes in batches:
            total += sum(size for size in sizes if size > 0)
            if total > most:
                raise DataError(
                    f"the images are said to take more than the {most:,} bytes of the LMDB",
                    where=self.keys or self.data,
                    hint=f"{KEYS} names keys several times, or the LMDB is damaged: copy them again",
                )
            digest = hashlib.sha256()
            for key, size in zip(keys, sizes, strict=True):
                digest.update(f"{key}\0{size}\0".encode("utf-8", "surrogateescape"))
            digest.update(repr(pids).encode())
            present += sum(size >= 0 for size in sizes)
            read = sum(min(size, MOST_MEMBER_BYTES) for size in sizes if size > 0)
            yield LmdbUnit(keys, pids, read, digest.hexdigest())
        if listed:
            self._compare(present, len(listed[0]))

    def read(self, unit: LmdbUnit, remarks: Remarks | None = None) -> Iterator[Crop]:
        pids = unit.pids or (UNKNOWN,) * len(unit.keys)
        with self._opened() as file:
            for key, pid in zip(unit.keys, pids, strict=True):
                value = file.find(_encoded(key))
                large = value is not None and value.size > MOST_MEMBER_BYTES
                data = b"" if value is None or large else file.read(value)
                video = match[1] if (match := LUPERSON_KEY.fullmatch(key)) else ""
                problem = "listed in keys.pkl, but not in the LMDB" if value is None else value.problem
                if large:
                    problem = f"larger than {MOST_MEMBER_BYTES:,} bytes"
                crop = labelled(self.label, key, data, problem=problem)
                yield crop._replace(pid=pid if unit.pids else crop.pid, video=video)

    def _listed(self, keys: list[str], pids: list[int]) -> Iterator[Batch]:
        """As keys.pkl has it; size -1 where a key is not in the LMDB."""
        for start in range(0, len(keys), UNIT_CROPS):
            part = slice(start, start + UNIT_CROPS)
            with self._opened() as file:
                values = (file.find(_encoded(key)) for key in keys[part])
                sizes = [-1 if value is None else value.size for value in values]
            yield tuple(keys[part]), tuple(pids[part]), sizes

    def _stored(self) -> Iterator[Batch]:
        """As the LMDB has it."""
        with self._opened() as file:
            items = ((key.decode("utf-8", "surrogateescape"), value.size) for key, value in file.items())
            while batch := list(islice(items, UNIT_CROPS)):
                yield tuple(key for key, _ in batch), (), [size for _, size in batch]

    def _compare(self, present: int, listed: int) -> None:
        if listed and not present:
            raise DataError(
                "the LMDB holds none of the keys in keys.pkl",
                where=self.keys,
                hint="it belongs to another LMDB; without it, all keys of the LMDB are read",
            )
        with self._opened() as file:
            stored = file.entries
        if stored > present:
            log.warning(
                "%s: %d of %d images are not in %s and are left out", self.data, stored - present, stored, self.keys
            )

    def _opened(self) -> LmdbFile:
        path = fetch(self.data, self.storage) if is_remote(self.data) else Path(local_path(self.data))
        return LmdbFile(str(path), where=self.data)


def read_keys(url: str, storage: StorageConfig, remarks: Remarks | None = None) -> tuple[list[str], list[int]]:
    """(keys, persons) of a keys.pkl; no persons where it is a plain list. Raises DataError for anything else. What
    stands beside these in it is counted in `remarks`."""
    folder, name = split_url(url)
    pickled = open_store(folder, storage).read_small(name, MOST_KEYS_BYTES, what=KEYS)
    try:
        unpickled = load_plain(pickled)
    except NamesCodeError as error:
        raise DataError(
            f"{KEYS} asks for code to be run ({error}); only lists, dicts, text and numbers are read",
            where=url,
            hint="do not unpickle it; without it, all keys of the LMDB are read",
        ) from error
    except Exception as error:  # damaged pickles raise nearly anything
        raise DataError(
            f"{KEYS} is no pickle, or a damaged one: {error!r}",
            where=url,
            hint="copy it again; without it, all keys of the LMDB are read",
        ) from error
    keys: Any
    pids: Any
    keys, pids = (unpickled.get("keys"), unpickled.get("pids", [])) if isinstance(unpickled, dict) else (unpickled, [])
    if _is_list(keys, str | bytes) and sum(map(len, keys)) > KEYS_TIMES * max(len(pickled), KEYS_FREE):
        raise DataError(f"{KEYS} holds the same long keys many times", where=url,
                        hint="without it, all keys of the LMDB are read")  # fmt: skip
    pids = _pids(pids)
    if not _is_list(keys, str | bytes) or pids is None or len(pids) not in (0, len(keys)):
        raise DataError(
            f'{KEYS} holds no list of keys, nor a dict of "keys" and as many "pids" of at most 32 bits',
            where=url,
            hint="without it, all keys of the LMDB are read",
        )
    if isinstance(unpickled, dict) and remarks is not None:
        for beside in unpickled.keys() - {"keys", "pids"}:
            remarks.unread_labels[f"{printable(str(beside))} in {KEYS}"] += len(keys)
    return [key if isinstance(key, str) else key.decode("utf-8", "surrogateescape") for key in keys], list(pids)


def fetch(url: str, storage: StorageConfig) -> Path:
    """A copy of an object on this machine; made once, whole, however many processes ask for it."""
    folder, name = split_url(url)
    store = open_store(folder, storage)
    size = store.size(name)
    key = hashlib.sha256(f"{url}\0{size}\0{storage.endpoint_url}".encode()).hexdigest()[:16]
    copy = Path(tempfile.gettempdir()) / f"datapipe-lmdb-{os.getuid()}-{key}.mdb"
    if copy.exists():
        return copy
    with open(copy.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not copy.exists():
            free = shutil.disk_usage(copy.parent).free
            if free < size:
                raise StorageError(
                    f"the LMDB takes {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free in the temporary folder",
                    where=str(copy.parent),
                    hint="make room, or set TMPDIR to another folder",
                )
            part = copy.with_suffix(".part")
            with open_object(store, name) as source, open(part, "wb") as target:
                shutil.copyfileobj(source, target, FETCH_BYTES)
            os.replace(part, copy)
    return copy


def _find_keys(data: str, storage: StorageConfig) -> str:
    """keys.pkl in the folder of the LMDB, or, as the converter leaves it, beside that folder."""
    folder, _ = split_url(data)
    above, _ = split_url(folder if is_remote(folder) else os.path.abspath(local_path(folder)))
    folders = [folder, above] if is_remote(above) == is_remote(folder) else [folder]  # nothing is above a bucket
    return next((f"{place}/{KEYS}" for place in folders if open_store(place, storage).exists(KEYS)), "")


def _is_lmdb(name: str) -> bool:
    return name.lower().endswith(ENDINGS) and not f"/{name}".endswith(f"/{LOCK}")


def _is_list(value: Any, kind: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, kind) for item in value)


def _pids(value: Any) -> list[int] | None:
    """Persons as whole numbers, UNKNOWN where one is missing; None where they are none."""
    try:
        numbers = [read_number("pid", pid) for pid in value] if isinstance(value, list | tuple) else None
    except NotUnderstood:
        return None
    return None if numbers is None else [UNKNOWN if number is None else number for number in numbers]


def _encoded(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")
