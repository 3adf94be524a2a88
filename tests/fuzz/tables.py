"""Parquet files, LMDBs and boxes beside videos as others make them, sound and hostile."""

import io
import pickle
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path

import av
import cv2
import lmdb
import numpy as np
import pyarrow
import pyarrow.parquet

from tests.fuzz.reader import Make, Reader
from tests.fuzz.sources import crops, encoded, picture, shard, written


def make_parquet(folder: Path) -> None:
    rows = [{"image": {"bytes": data, "path": f"{number}.jpg"}, "pid": number, "camera": 1}
            for number, data in enumerate(crops())]  # fmt: skip
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    table = pyarrow.table({"image": pyarrow.array([row["image"] for row in rows], kind),
                           "pid": [row["pid"] for row in rows], "camera": [1] * len(rows)})  # fmt: skip
    pyarrow.parquet.write_table(table, folder / "set.parquet", row_group_size=4)


def one_value(rows: int, size: int) -> Make:
    """A parquet file of many rows that are one value, which lies in its dictionary."""

    def make(folder: Path) -> None:
        values = pyarrow.DictionaryArray.from_arrays(
            pyarrow.array(np.zeros(rows, np.int32)), pyarrow.array([b"\xff\xd8\xff" + bytes(size)], pyarrow.binary())
        )
        names = pyarrow.array(np.arange(rows))
        pyarrow.parquet.write_table(pyarrow.table({"image": values, "id": names}), folder / "set.parquet",
                                    compression="zstd", dictionary_pagesize_limit=1 << 30,
                                    row_group_size=rows)  # fmt: skip

    return make


def large_page(folder: Path) -> None:
    value = pyarrow.array([bytes(400_000_000)], pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"image": value}), folder / "set.parquet", compression="zstd",
                                use_dictionary=False, write_statistics=False)  # fmt: skip


def empty_rows(folder: Path) -> None:
    table = pyarrow.table({"image": pyarrow.nulls(30_000_000, pyarrow.binary())})
    pyarrow.parquet.write_table(table, folder / "set.parquet", row_group_size=30_000_000)


def lying_footer(folder: Path) -> None:
    """The footer is said to take 2 GB."""
    make_parquet(folder)
    data = (folder / "set.parquet").read_bytes()
    (folder / "set.parquet").write_bytes(data[:-8] + (2**31 - 1).to_bytes(4, "little") + data[-4:])


PARQUET = Reader(
    "parquet", make_parquet, ("set.parquet",), shard,
    hostile={
        "dictionary": one_value(2_000, 20_000_000),
        "large page": large_page,
        "30e6 empty rows": empty_rows,
        "footer of 2 GB": lying_footer,
    },
    refused=frozenset({"30e6 empty rows", "large page", "dictionary"}),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------- LMDB


def make_lmdb(folder: Path) -> None:
    keys = [f"1_1_{number // 2:04d}_{number:08d}" for number in range(len(crops()))]
    with lmdb.open(str(folder / "set"), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        for key, data in zip(keys, crops(), strict=True):
            transaction.put(key.encode(), data)
    (folder / "set" / "lock.mdb").unlink()
    data = (folder / "set" / "data.mdb").read_bytes()
    (folder / "set" / "data.mdb").write_bytes(
        data.rstrip(b"\0").ljust(-(-len(data.rstrip(b"\0")) // 4096) * 4096, b"\0")
    )
    (folder / "set" / "keys.pkl").write_bytes(pickle.dumps({"keys": keys, "pids": list(range(len(keys)))}))


def with_keys(pickled: Callable[[], bytes]) -> Make:
    """An LMDB with another keys.pkl."""

    def make(folder: Path) -> None:
        make_lmdb(folder)
        (folder / "set" / "keys.pkl").write_bytes(pickled())

    return make


def branches(folder: Path) -> None:
    """A tree whose branches lead to one empty leaf in 2^30 ways."""
    make_lmdb(folder)
    path = folder / "set" / "data.mdb"
    size, depth = 4096, 30
    data = bytearray(path.read_bytes()[: 2 * size])
    for number in range(2, 2 + depth):
        page = bytearray(size)
        nodes = [struct.pack("<4H", number + 1, 0, 0, len(key)) + key for key in (b"", b"m\0")]
        place = size
        starts = []
        for node in nodes:
            place -= len(node) + len(node) % 2
            page[place : place + len(node)] = node
            starts.append(place)
        page[:16] = struct.pack("<QHHHH", number, 0, 1, 16 + 2 * len(starts), place)
        page[16 : 16 + 2 * len(starts)] = struct.pack(f"<{len(starts)}H", *starts)
        data += page
    leaf = bytearray(size)
    leaf[:16] = struct.pack("<QHHHH", 2 + depth, 0, 2, 16, size)
    data += leaf
    for meta in (0, size):
        tree = meta + 40 + 48
        data[tree + 40 : tree + 48] = (2).to_bytes(8, "little")  # root
        data[tree + 32 : tree + 40] = (0).to_bytes(8, "little")  # entries
    path.write_bytes(bytes(data))
    (folder / "set" / "keys.pkl").unlink()


LONG_MEMO = b"\x80\x04]r" + (2**31 - 9).to_bytes(4, "little") + b"."
LMDB = Reader(
    "lmdb", make_lmdb, ("set/*",), shard,
    hostile={
        "memo": with_keys(lambda: LONG_MEMO),
        "memo in text": with_keys(lambda: b"(lp2000000000\n."),
        "many lists": with_keys(lambda: b"\x80\x04](" + b"]" * 20_000_000 + b"e."),
        "many sets": with_keys(lambda: b"\x80\x04](" + b"\x8f" * 10_000_000 + b"e."),
        "one key again and again": with_keys(
            lambda: b"\x80\x04](X" + (60_000).to_bytes(4, "little") + b"x" * 60_000 + b"2" * 2_000_000 + b"e."),
        "bytes of 4 GB": with_keys(lambda: b"\x80\x05\x96" + (1 << 32).to_bytes(8, "little") + b"."),
        "branches": branches,
    },
    refused=frozenset({"memo", "many lists", "many sets", "branches"}),
)  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- boxes


def make_mot(folder: Path) -> None:
    for number in range(1, 4):
        written(f"set/seq/img1/{number:06d}.jpg", encoded(picture(120, 160), "JPEG"))(folder)
    lines = [f"{number},{number % 2 + 1},10,10,40,80,1,1,1.0" for number in (1, 1, 2, 3)]
    written("set/seq/gt/gt.txt", "\n".join(lines).encode())(folder)


def mot(line: str) -> Make:
    def make(folder: Path) -> None:
        make_mot(folder)
        (folder / "set" / "seq" / "gt" / "gt.txt").write_text(f"1,1,10,10,40,80,1,1,1.0\n{line}\n")

    return make


@cache
def video() -> bytes:
    sink = io.BytesIO()
    with av.open(sink, "w", format="mp4") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        for number in range(4):
            pixels = cv2.resize(np.asarray(picture(6 + number, 8)), (160, 120))
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    return sink.getvalue()


def boxes(**columns: object) -> Make:
    def make(folder: Path) -> None:
        written("set/v.mp4", video())(folder)
        usual = {"frame": [0, 1, 2], "track": [1, 1, 2], "box": [[5.0, 5.0, 50.0, 90.0]] * 3}
        pyarrow.parquet.write_table(pyarrow.table({**usual, **columns}), folder / "set" / "v.parquet")

    return make


def many_boxes(folder: Path) -> None:
    rows = 60_000_000
    written("set/v.mp4", video())(folder)
    zeros = pyarrow.array(np.zeros(rows, np.int8))
    table = pyarrow.table({name: zeros for name in ("frame", "x1", "y1", "x2", "y2")})
    pyarrow.parquet.write_table(table, folder / "set" / "v.parquet", compression="zstd", row_group_size=rows)


MOT = Reader(
    "mot", make_mot, ("set/seq/gt/*", "set/seq/img1/*"), shard,
    hostile={
        "track beyond int64": mot("2,1e30,10,10,40,80,1,1,1.0"),
        "track that floats do not hold": mot("2,9007199254740993,10,10,40,80,1,1,1.0"),
        "frame beyond int64": mot("1e25,1,10,10,40,80,1,1,1.0"),
        "box beyond all": mot("2,1,-1e300,10,1e301,80,1,1,1.0"),
        "not a number": mot("2,1,nan,10,40,80,1,1,1.0"),
        "a long line": mot("2," * 3_000_000),
    },
    refused=frozenset({"track beyond int64", "frame beyond int64", "not a number", "track that floats do not hold"}),
)  # fmt: skip
BOXES = Reader(
    "boxes", boxes(), ("set/v.parquet", "set/v.mp4"), shard,
    hostile={
        "track beyond int64": boxes(track=pyarrow.array([1.0, 1e30, 2.0])),
        "frame beyond all": boxes(frame=pyarrow.array([0, 1, 2**62])),
        "60e6 rows": many_boxes,
        "nulls": boxes(track=pyarrow.array([1, None, 2]), frame=pyarrow.array([0, None, 1])),
        "lists of other lengths": boxes(box=pyarrow.array([[1.0], [1.0] * 7, None])),
    },
    refused=frozenset({"track beyond int64", "60e6 rows", "nulls", "lists of other lengths"}),
)  # fmt: skip


ALL = (PARQUET, LMDB, MOT, BOXES)
