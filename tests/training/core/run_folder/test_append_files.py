"""Files that change all the time on an S3 server: who has something to add does not wait for it, nothing is lost."""

from collections import Counter
from threading import Condition

import pytest

from datapipe.core.config import StorageConfig
from datapipe.core.errors import StorageError
from tests.conftest import S3Server
from tests.support.faulty_proxy import FaultyProxy
from training.core.run_folder import append_files
from training.core.run_folder.run_folder import RunFolder

PATIENCE_S = 300
LINES = [f"line {number}" for number in range(50)]


class Asked(Counter[tuple[str, str]]):
    """Counts requests by method and name."""

    def __call__(self, method: str, path: str) -> None:
        self[method, path.rpartition("/")[2]] += 1


class Tried:
    """Counts attempts to write, and those of them that it passes on; refuses them while `down`."""

    def __init__(self) -> None:
        self.writes, self.passed, self.down = 0, 0, False
        self._more = Condition()

    def __call__(self, method: str, path: str) -> None:
        if method == "PUT":
            with self._more:
                self.writes += 1
                self.passed += not self.down
                refused = self.down
                self._more.notify_all()
            if refused:
                raise ConnectionAbortedError("down")

    def wait(self, *, writes: int = 0, passed: int = 0) -> None:
        """Return once there were so many."""
        with self._more:
            enough = self._more.wait_for(lambda: self.writes >= writes and self.passed >= passed, PATIENCE_S)
            assert enough, "nothing is written"


def _folder(s3: S3Server, proxy: FaultyProxy, bucket: str) -> RunFolder:
    return RunFolder(f"s3://{bucket}", StorageConfig(endpoint_url=proxy.endpoint, attempts=1, timeout_s=5))


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written at intervals."""
    monkeypatch.setattr(append_files, "FLUSH_S", 3_600.0)


@pytest.mark.usefixtures("by_hand")
def test_append__asks_the_store_once_and_writes_once(s3: S3Server) -> None:
    asked, bucket = Asked(), s3.bucket()
    with FaultyProxy(s3.endpoint, before=asked) as proxy:
        folder = _folder(s3, proxy, bucket)
        for number, line in enumerate(LINES):
            folder.append("log.txt", line)
            folder.write_soon("life.json", str(number))
        assert not asked
        folder.flush()
        folder.flush()
        assert asked == {("GET", "log.txt"): 1, ("PUT", "log.txt"): 1, ("PUT", "life.json"): 1}
        again = _folder(s3, proxy, bucket)
        again.append("log.txt", "afterwards")
        again.flush()
        again.flush()
        assert asked["GET", "log.txt"] == 2
        assert (again.read_text("log.txt") or "").splitlines() == [*LINES, "afterwards"]
        assert again.read_text("life.json") == "49"


@pytest.mark.usefixtures("by_hand")
def test_begin__is_written_without_delay_and_grows(s3: S3Server) -> None:
    tried, bucket = Tried(), s3.bucket()
    with FaultyProxy(s3.endpoint, before=tried) as proxy:
        folder = _folder(s3, proxy, bucket)
        folder.append("log.txt", "before")
        folder.begin("new.txt", "first")
        tried.wait(writes=2)
        folder.flush()  # has nothing to do but to wait for the thread
        assert s3.objects(bucket) == {"log.txt": b"before\n", "new.txt": b"first\n"} and tried.writes == 2
        folder.append("new.txt", "second")
        folder.flush()
        assert s3.objects(bucket)["new.txt"] == b"first\nsecond\n"


@pytest.mark.usefixtures("by_hand")
def test_append__goes_after_what_was_there_once_it_can_be_read(s3: S3Server) -> None:
    bucket = s3.bucket()
    RunFolder(f"s3://{bucket}", s3.storage).write("log.txt", "long ago\n")
    down = [True]

    def refuse(method: str, _: str) -> None:
        if method == "GET" and down[0]:
            raise ConnectionAbortedError("down")

    with FaultyProxy(s3.endpoint, before=refuse) as proxy:
        folder = _folder(s3, proxy, bucket)
        folder.append("log.txt", "one")
        with pytest.raises(StorageError):
            folder.flush()
        folder.append("log.txt", "two")
        down[0] = False
        folder.flush()
        assert s3.objects(bucket) == {"log.txt": b"long ago\none\ntwo\n"}


def test_write__takes_the_place_of_what_was_to_be_written(s3: S3Server) -> None:
    bucket = s3.bucket()
    folder = RunFolder(f"s3://{bucket}", s3.storage)
    folder.write_soon("environment.json", "before")
    folder.write("environment.json", "after")
    folder.flush()
    assert s3.objects(bucket) == {"environment.json": b"after"}


def test_append__is_written_by_itself_and_after_an_outage(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(append_files, "FLUSH_S", 0.05)
    monkeypatch.setattr(append_files, "REST", 0.0)
    tried, bucket = Tried(), s3.bucket()
    with FaultyProxy(s3.endpoint, before=tried) as proxy:
        folder = _folder(s3, proxy, bucket)
        folder.append("log.txt", "before")
        tried.wait(writes=1)
        folder.flush()  # returns when the thread has written; has nothing to write itself
        assert s3.objects(bucket) == {"log.txt": b"before\n"} and tried.writes == 1
        tried.down = True
        folder.append("log.txt", "meanwhile")  # neither waits nor fails
        tried.wait(writes=3)
        with pytest.raises(StorageError):
            folder.flush()
        tried.down = False
        tried.wait(passed=2)
        folder.flush()
        assert s3.objects(bucket) == {"log.txt": b"before\nmeanwhile\n"}
