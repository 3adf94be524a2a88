"""Files that stay open: never other bytes than those under the name, never more of them than allowed."""

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from datapipe.core.errors import NotFoundError
from datapipe.storage.local import OpenFilesStore


@pytest.fixture
def store(tmp_path: Path) -> OpenFilesStore:
    for number in range(20):
        (tmp_path / f"{number}.tar").write_bytes(bytes([number]) * 1000)
    return OpenFilesStore(str(tmp_path))


def open_files(folder: Path) -> int:
    links = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return sum(link.startswith(str(folder)) for link in links)


def test_read__gives_ranges_and_less_at_the_end(store: OpenFilesStore) -> None:
    for _ in range(2):
        assert store.read("3.tar", start=10, size=5) == bytes([3]) * 5
        assert store.read("3.tar", start=990, size=50) == bytes([3]) * 10
        assert store.read("3.tar", start=2000, size=50) == b""
    assert store.read("4.tar") == bytes([4]) * 1000
    assert pickle.loads(pickle.dumps(store)).read("5.tar", start=0, size=1) == b"\5"


def test_read__a_deleted_file_is_gone_and_a_replaced_one_is_read_anew(store: OpenFilesStore, tmp_path: Path) -> None:
    for name in ("0.tar", "1.tar"):
        store.read(name, start=0, size=1)
    (tmp_path / "0.tar").unlink()
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").rename(tmp_path / "1.tar")
    with pytest.raises(NotFoundError, match="does not exist") as caught:
        store.read("0.tar", start=0, size=1)
    assert caught.value.where.endswith("0.tar")
    assert store.read("1.tar", start=0, size=3) == b"new"


def test_read__keeps_few_files_open_while_many_threads_read(store: OpenFilesStore, tmp_path: Path) -> None:
    store._most = 3
    with ThreadPoolExecutor(8) as pool:
        numbers = [number % 20 for number in range(4_000)]
        found = pool.map(lambda number: store.read(f"{number}.tar", start=number, size=7), numbers)
        assert list(found) == [bytes([number]) * 7 for number in numbers]
    assert open_files(tmp_path) == 3
    store.close()
    assert open_files(tmp_path) == 0
