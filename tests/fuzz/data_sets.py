"""Files of a data set of ours, sound and hostile: manifest, indexes, selections, removals, lists of crops."""

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import tempfile
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from datapipe.__main__ import main
from datapipe.core import cli
from datapipe.core.config import RemoveConfig, SelectConfig, ShardConfig, StorageConfig
from datapipe.ingest.pipeline import ingest
from datapipe.maintain.read_list import read_list
from datapipe.maintain.remove import remove
from datapipe.maintain.select import select
from tests.fuzz.archives import PIECE, ZEROS, many_zeros
from tests.fuzz.reader import Make, Reader, together
from tests.fuzz.sources import crops
from tests.fuzz.tables import LONG_MEMO

STORAGE = StorageConfig()


@cache
def _whole() -> dict[str, bytes]:
    """A data set of two shards, a selection of it, and a record of a removal: name -> content."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "in").mkdir()
        for number, data in enumerate(crops()):
            (folder / "in" / f"{number + 1:04d}_c1s1_{number:06d}_00.jpg").write_bytes(data)
        (folder / "in" / "bad.jpg").write_bytes(b"no image")
        (folder / "in" / "gone.jpg").write_bytes(crops()[0] + b"\0")
        (folder / "list.txt").write_text("gone.jpg\n")
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            config = ShardConfig(workers=1, samples_per_shard=4, max_bad=1)
            url = ingest([str(folder / "in")], str(folder / "set"), config, STORAGE).manifest.url
            remove(url, RemoveConfig(names=str(folder / "list.txt"), reason="a request"), STORAGE)
            select(url, SelectConfig(where="pid > 2"), STORAGE)
        paths = (path for path in (folder / "set").rglob("*") if path.is_file())
        return {str(path.relative_to(folder / "set")): path.read_bytes() for path in paths}


def make_set(folder: Path) -> None:
    for name, data in _whole().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def manifests(folder: Path) -> list[Path]:
    return sorted(folder.glob("manifest-v*.json"))


def resealed(folder: Path) -> None:
    """The manifests with the checksums of the indexes and selections that are there, and their own ids made again."""
    for path in manifests(folder):
        try:
            record = json.loads(path.read_bytes())
            for shard in record["shards"]:
                with contextlib.suppress(OSError, TypeError, ValueError):
                    shard["index_sha256"] = hashlib.sha256((folder / shard["index"]).read_bytes()).hexdigest()
            with contextlib.suppress(OSError, TypeError, ValueError):
                file = folder / record["selection"]["file"]
                record["selection"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
            sealed(record)
            path.write_text(json.dumps(record))
        except (ValueError, TypeError, KeyError, AttributeError):
            continue


def sealed(record: dict[str, Any]) -> None:
    """Make id, rows and bytes what the rest says."""
    selection = record["selection"]
    record["rows"] = selection["rows"] if selection else sum(shard["rows"] for shard in record["shards"])
    record["bytes"] = sum({shard["name"]: shard["bytes"] for shard in record["shards"]}.values())
    content = {key: value for key, value in record.items() if key not in ("id", "rows", "bytes", "made_by")}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    record["id"] = hashlib.sha256(text.encode()).hexdigest()


def forged(change: Callable[[dict[str, Any]], object], *, newest: bool = False) -> Make:
    """The data set with a change in its manifests, or in the newest alone, which then has the right id."""

    def make(folder: Path) -> None:
        make_set(folder)
        for path in manifests(folder)[-1 if newest else 0 :]:
            record = json.loads(path.read_text())
            change(record)
            sealed(record)
            path.write_text(json.dumps(record))

    return make


def look_through(folder: Path, out: Path) -> int:
    """All that reads a data set; what opens a version packs its indexes, where nobody has yet."""
    codes = [cli.run(main, ["verify", str(folder), "--decode", "all", "--workers", "1"])]
    for path in folder.glob("manifest-v0002*.json"):  # the one with all crops
        codes.append(cli.run(main, ["verify", str(path), "--workers", "1"]))
    codes.append(cli.run(main, ["stats", str(folder)]))
    codes.append(cli.run(main, ["preview", str(folder), "--out", str(out / "sheet.jpg"), "--count", "4"]))
    codes.append(cli.run(main, ["reshard", str(folder), "--out", str(out / "again"), "--workers", "1"]))
    if codes[0] == 0 and max(codes[-3:]) > 0:
        raise AssertionError(f"verify says good, and another command fails: {codes}")
    return max(codes)


def change(folder: Path, out: Path) -> int:
    """All that changes a data set."""
    (out / "names.txt").write_text("0003_c1s1_000002_00.jpg\n")
    words = ["remove", str(folder), "--names", str(out / "names.txt"), "--reason", "asked", "--workers", "1"]
    codes = [cli.run(main, words), cli.run(main, ["verify", str(folder), "--repair", "--workers", "1"])]
    codes.append(cli.run(main, ["select", str(folder), "--where", "height > 1"]))
    return max(codes)


def table(make: Callable[[pyarrow.Table], pyarrow.Table], pattern: str, **how: Any) -> Make:
    """The data set with another table in the files of a pattern, and their checksums."""

    def write(folder: Path) -> None:
        make_set(folder)
        for path in folder.glob(pattern):
            pyarrow.parquet.write_table(make(pyarrow.parquet.read_table(path)), path, **how)
        resealed(folder)

    return write


def column(name: str, values: Callable[[list[Any]], Iterable[Any]], kind: pyarrow.DataType | None = None) -> Make:
    """The indexes with other values in a column."""

    def make(table: pyarrow.Table) -> pyarrow.Table:
        place = table.schema.get_field_index(name)
        made = pyarrow.array(values(table[name].to_pylist()), kind or table.schema.field(name).type)
        return table.set_column(place, name, made)

    return _table_of_indexes(make)


def _table_of_indexes(make: Callable[[pyarrow.Table], pyarrow.Table]) -> Make:
    return table(make, "shards/*.parquet")


def rows(values: Callable[[np.ndarray], Any]) -> Make:
    """The selections with other rows; the manifest says what it said."""
    return table(lambda old: pyarrow.table({"row": values(old["row"].to_numpy())}), "selections/*.parquet")


def long_names(folder: Path) -> None:
    """An index of a few kB whose names are one of 100 MB, a thousand times."""

    def make(old: pyarrow.Table) -> pyarrow.Table:
        many = old.take(pyarrow.array(np.zeros(1_000, np.int64)))
        name = pyarrow.DictionaryArray.from_arrays(np.zeros(1_000, np.int32), ["n" * 30_000_000])
        return many.set_column(many.schema.get_field_index("name"), "name", name)

    table(make, "shards/*.parquet", compression="zstd", dictionary_pagesize_limit=1 << 30, store_schema=False)(folder)
    for path in manifests(folder):
        record = json.loads(path.read_text())
        for shard in record["shards"]:
            shard["rows"] = 1_000
        sealed(record)
        path.write_text(json.dumps(record))


def many_rows(folder: Path) -> None:
    """A selection of a few kB with 10^9 rows, as the manifest says."""
    make_set(folder)
    for path in folder.glob("selections/*.parquet"):
        zeros = pyarrow.array(np.zeros(200_000_000, np.int64))
        pyarrow.parquet.write_table(pyarrow.table({"row": zeros}), path, row_group_size=1 << 30)
    resealed(folder)


def deep(folder: Path) -> None:
    make_set(folder)
    manifests(folder)[-1].write_text("[" * 100_000)


def many_values(folder: Path) -> None:
    make_set(folder)
    manifests(folder)[-1].write_text("[" + "[]," * 20_000_000 + "[]]")


def holes(name: str) -> Make:
    """A file of 20 GB without content."""

    def make(folder: Path) -> None:
        make_set(folder)
        path = next(iter(sorted(folder.glob(name), reverse=True)))
        os.truncate(path, 20 << 30)

    return make


def set_shard(**values: Any) -> Callable[[dict[str, Any]], object]:
    return lambda record: record["shards"][0].update(values)


MANIFEST = Reader(
    "manifest", make_set, ("manifest-*.json",), look_through, resealed, writes=True,
    hostile={
        "no shards": forged(lambda record: record.update(shards=[], selection=None)),
        "no rows": forged(lambda record: [shard.update(rows=0) for shard in record["shards"]]),
        "rows without end": forged(set_shard(rows=10**15)),
        "rows beyond int64": forged(set_shard(rows=2**70)),
        "bytes beyond int64": forged(set_shard(bytes=2**70)),
        "more removed than there are": forged(lambda record: record.update(removed=99)),
        "version beyond all": forged(lambda record: record.update(version=2**70)),
        "a list": forged(lambda record: record.update(licence=["x"], notes=[["y"]], made_by=[])),
        "control characters": forged(lambda record: record.update(licence="\x1b[31mfree\x07", notes=["\x9b2J"])),
        "deep": deep, "20e6 values": many_values, "holes": holes("manifest-*.json"),
        "selection of more rows": forged(lambda record: record["selection"].update(rows=10**9), newest=True),
        "selection of fewer rows": forged(lambda record: record["selection"].update(rows=1), newest=True),
    },
    refused=frozenset({"no shards", "no rows", "rows without end", "rows beyond int64", "bytes beyond int64",
                       "more removed than there are", "selection of more rows", "selection of fewer rows"}),
)  # fmt: skip
INDEX = Reader(
    "index", make_set, ("shards/*.parquet",), look_through, resealed, writes=True,
    hostile={
        "long names": long_names,
        "offset beyond the tar": column("offset", lambda old: [2**60] * len(old)),
        "negative offset": column("offset", lambda old: [-512] * len(old)),
        "negative size": column("size", lambda old: [-1] * len(old)),
        "size of 2 GB": column("size", lambda old: [2**31 - 1] * len(old)),
        "text for numbers": column("offset", lambda old: ["x"] * len(old), pyarrow.string()),
        "nulls": column("size", lambda old: [None] * len(old)),
        "null keys": column("key", lambda old: [None] * len(old)),
        "null names": column("name", lambda old: [None] * len(old)),
        "null removed": column("removed", lambda old: [None] * len(old)),
        "short hashes": column("sha256", lambda old: [b"x"] * len(old), pyarrow.binary()),
        "control characters": column("name", lambda old: ["\x1b[2J\x07\nerror: x"] * len(old)),
        "equal keys": column("key", lambda old: [old[0]] * len(old)),
    },
    refused=frozenset({"long names", "offset beyond the tar", "negative offset", "negative size", "size of 2 GB",
                       "text for numbers", "nulls", "null keys", "null removed", "short hashes", "equal keys"}),
)  # fmt: skip
SELECTION = Reader(
    "selection", make_set, ("selections/*.parquet",), look_through, resealed, writes=True,
    hostile={
        "beyond the shards": rows(lambda old: old + 10**6),
        "negative": rows(lambda old: old - 10**6),
        "one more": rows(lambda old: np.append(old, old[-1] + 1)),
        "one fewer": rows(lambda old: old[:-1]),
        "one twice": rows(lambda old: np.repeat(old[:1], len(old))),
        "backwards": rows(lambda old: old[::-1].copy()),
        "nulls": rows(lambda old: [None] * len(old)),
        "text": rows(lambda old: ["x"] * len(old)),
        "fractions": rows(lambda old: old + 0.5),
        "none": rows(lambda old: old[:0]),
        "200e6 rows": many_rows,
    },
    refused=frozenset({"beyond the shards", "negative", "one more", "one fewer", "one twice", "backwards", "nulls",
                       "text", "fractions", "none", "200e6 rows"}),
)  # fmt: skip
TARS = Reader("shards", make_set, ("shards/*.tar", "packed-*.index", "quarantine.parquet", "requests/*"), look_through,
              writes=True)  # fmt: skip


def record(change: Callable[[dict[str, Any]], object]) -> Make:
    """The data set with a change in its record of a removal."""

    def make(folder: Path) -> None:
        make_set(folder)
        path = next(folder.glob("removals/*.json"))
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return make


REMOVALS = Reader(
    "removals", make_set, ("removals/*.json",), change, writes=True,
    hostile={
        "deep": record(lambda content: content.update(keys_sha256=json.loads("[" * 900 + "]" * 900))),
        "a file outside": record(lambda content: content.update(deleted=["../../outside.tar"])),
        "count of text": record(lambda content: content.update(count="\x1b[31m")),
        "no keys": record(lambda content: content.update(keys_sha256=None)),
        "lists for keys": record(lambda content: content.update(keys_sha256=[[], []])),
    },
    refused=frozenset({"a file outside", "count of text", "no keys", "lists for keys"}),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- lists


def make_lists(folder: Path) -> None:
    names = [f"a/{number:04d}.jpg" for number in range(30)]
    text = "\n".join(names).encode()
    (folder / "list.txt").write_bytes(text)
    (folder / "list.csv").write_bytes(b"pid,name\n" + b"\n".join(b"1," + name.encode() for name in names))
    (folder / "list.txt.gz").write_bytes(gzip.compress(text))
    (folder / "list.txt.bz2").write_bytes(bz2.compress(text))
    (folder / "list.txt.xz").write_bytes(lzma.compress(text))
    (folder / "list.pkl").write_bytes(pickle.dumps(names))
    (folder / "old.pkl").write_bytes(pickle.dumps(names, 0))
    pyarrow.parquet.write_table(pyarrow.table({"name": names}), folder / "list.parquet")


def look_lists(folder: Path, out: Path) -> int:
    """Every list in the folder."""

    def read(path: Path) -> int:
        return 0 if len(read_list(str(path), "name", STORAGE)) else 1

    return max(cli.run(lambda _, path=path: read(path), []) for path in sorted(folder.iterdir()))


def list_of(name: str, data: Callable[[], bytes]) -> Make:
    return lambda folder: (folder / name).write_bytes(data()) and None


def list_dictionary(folder: Path) -> None:
    value = pyarrow.DictionaryArray.from_arrays(np.zeros(20_000, np.int32), ["n" * 30_000_000])
    pyarrow.parquet.write_table(pyarrow.table({"name": value}), folder / "list.parquet", compression="zstd",
                                dictionary_pagesize_limit=1 << 30, store_schema=False)  # fmt: skip


LISTS = Reader(
    "pickles", make_lists, ("list*", "old.pkl"), look_lists,
    hostile={
        "gzip": list_of("x.txt", lambda: many_zeros("gz").replace(b"\0", b"\0")),
        "bzip2": list_of("x.txt", lambda: many_zeros("bz2")),
        "xz": list_of("x.txt", lambda: lzma.compress(bytes(PIECE), preset=0) * (ZEROS // PIECE)),
        "memo": list_of("x.pkl", lambda: LONG_MEMO),
        "many lists": list_of("x.pkl", lambda: b"\x80\x04](" + b"]" * 20_000_000 + b"e."),
        "many dictionaries": list_of("x.pkl", lambda: b"\x80\x04](" + b"}" * 20_000_000 + b"e."),
        "dictionary of parquet": list_dictionary,
        "a program": list_of("x.pkl", lambda: b"cos\nsystem\n(S'echo'\ntR."),
        "deep notes": together(list_of("x.txt", lambda: b"a"), list_of("x.txt.notes.json", lambda: b"[" * 99_999)),
    },
    refused=frozenset({"gzip", "bzip2", "xz", "memo", "many lists", "many dictionaries", "dictionary of parquet",
                       "a program"}),
)  # fmt: skip

ALL = (MANIFEST, INDEX, SELECTION, TARS, REMOVALS, LISTS)
