"""A small data set for tests of the stream and all behind it: real shards, indexes and manifest, quickly made."""

import tarfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import xxhash

from datapipe.dataset.manifest import INDEX, Manifest, Shard
from datapipe.storage import open_store


@dataclass
class CropSet:
    """The data set in `folder` and the bytes of its crops, by row. Row i has identity i // 2 and camera i % 3 + 1."""

    folder: Path
    manifest: Manifest
    jpegs: list[bytes]

    def damage(self, row: int) -> None:
        """Flip bits in the middle of a crop on disk."""
        path = self.folder / self._shard(row).name
        content = path.read_bytes()
        middle = content.index(self.jpegs[row]) + len(self.jpegs[row]) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 0xFF]) + content[middle + 1 :])

    def cut(self, row: int) -> None:
        """End the shard in the middle of this crop."""
        path = self.folder / self._shard(row).name
        content = path.read_bytes()
        path.write_bytes(content[: content.index(self.jpegs[row]) + len(self.jpegs[row]) // 2])

    def _shard(self, row: int) -> Shard:
        first = np.cumsum([shard.rows for shard in self.manifest.shards])
        return self.manifest.shards[int(np.searchsorted(first, row, side="right"))]


def jpegs(count: int, seed: int = 0) -> Iterator[bytes]:
    """Smooth coloured pictures of people's proportions; no two are equal."""
    random = np.random.default_rng(seed)
    for _ in range(count):
        height, width = int(random.integers(60, 140)), int(random.integers(24, 70))
        coarse = random.integers(0, 256, (6, 4, 3), dtype=np.uint8)
        picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        yield cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def write(folder: Path, count: int, *, per_shard: int = 10, seed: int = 0, no_images: Collection[int] = ()) -> CropSet:
    """`count` crops in tars of `per_shard`. Rows in `no_images` hold other bytes, with their right checksum."""
    crops = [b"not an image" if row in no_images else data for row, data in enumerate(jpegs(count, seed))]
    store = open_store(str(folder))
    shards = []
    for low in range(0, count, per_shard):
        name = f"shard-{low // per_shard:03d}"
        rows = range(low, min(low + per_shard, count))
        tar, index = _shard(rows, crops)
        store.create(f"{name}.tar", tar)
        store.create(f"{name}.parquet", index)
        shards.append(
            Shard(
                f"{name}.tar",
                len(rows),
                len(tar),
                sha256(tar).hexdigest(),
                f"{name}.parquet",
                sha256(index).hexdigest(),
            )
        )
    return CropSet(folder, Manifest(tuple(shards), name="crops").save(store), crops)


def _shard(rows: range, crops: list[bytes]) -> tuple[bytes, bytes]:
    tar, records = BytesIO(), []
    with tarfile.open(fileobj=tar, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for row in rows:
            data = crops[row]
            member = tarfile.TarInfo(f"{row:032x}.jpg")
            member.size = len(data)
            archive.addfile(member, BytesIO(data))
            records.append(
                {
                    "key": f"{row:032x}",
                    "offset": archive.offset - -(-len(data) // 512) * 512,
                    "size": len(data),
                    "height": 0,
                    "width": 0,
                    "sha256": sha256(data).digest(),
                    "xxh3": xxhash.xxh3_64_intdigest(data),
                    "source": "test",
                    "name": str(row),
                    "pid": row // 2,
                    "camera": row % 3 + 1,
                    "dhash": 0,
                    "video": "",
                    "track": -1,
                    "frame": -1,
                    "removed": False,
                }
            )
    index = BytesIO()
    pyarrow.parquet.write_table(pa.Table.from_pylist(records, INDEX), index)
    return tar.getvalue(), index.getvalue()
