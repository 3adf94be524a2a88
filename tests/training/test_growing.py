"""Files that change all the time on an S3 server: who has something to add does not wait for it, nothing is lost."""

import time
from collections import Counter
from collections.abc import Callable

import pytest

from datapipe.config import StorageConfig
from datapipe.errors import StorageError
from tests.conftest import S3Server
from tests.faulty_proxy import ALWAYS, Faults, FaultyProxy
from training import growing
from training.run_folder import RunFolder

LINES = [f"line {number}" for number in range(50)]
DOWN = Faults(rate=1.0, kinds=("500",), most=ALWAYS)


class Asked(Counter[tuple[str, str]]):
    """Counts requests by method and name."""

    def __call__(self, method: str, path: str) -> None:
        self[method, path.rpartition("/")[2]] += 1


def _folder(s3: S3Server, proxy: FaultyProxy, bucket: str) -> RunFolder:
    return RunFolder(f"s3://{bucket}", StorageConfig(endpoint_url=proxy.endpoint, attempts=1, timeout_s=5))


def test_append__asks_the_store_once_and_writes_once(s3: S3Server) -> None:
    asked, bucket = Asked(), s3.bucket()
    with FaultyProxy(s3.endpoint, before=asked) as proxy:
        folder = _folder(s3, proxy, bucket)
        for number, line in enumerate(LINES):
            folder.append("log.txt", line)
            folder.write_soon("life.json", str(number))
        assert asked == {("GET", "log.txt"): 1}
        folder.begin("new.txt", "first")
        assert s3.objects(bucket) == {"new.txt": b"first\n"}
        folder.append("new.txt", "second")
        folder.flush()
        folder.flush()
        once = {("GET", "log.txt"): 1, ("PUT", "log.txt"): 1, ("PUT", "life.json"): 1}
        assert asked == once | {("PUT", "new.txt"): 2} and s3.objects(bucket)["new.txt"] == b"first\nsecond\n"
        again = _folder(s3, proxy, bucket)
        again.append("log.txt", "afterwards")
        again.flush()
        assert (again.read_text("log.txt") or "").splitlines() == [*LINES, "afterwards"]
        assert again.read_text("life.json") == "49"


def test_append__is_written_by_itself_and_after_an_outage(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(growing, "FLUSH_S", 0.05)
    monkeypatch.setattr(growing, "REST", 0.0)
    bucket = s3.bucket()
    with FaultyProxy(s3.endpoint) as proxy:
        folder = _folder(s3, proxy, bucket)
        folder.append("log.txt", "before")
        _until(lambda: s3.objects(bucket).get("log.txt") == b"before\n")
        proxy.faults = DOWN
        folder.append("log.txt", "meanwhile")  # neither waits nor fails
        _until(lambda: proxy.met["500"] > 3)
        with pytest.raises(StorageError):
            folder.flush()
        proxy.faults = Faults()
        _until(lambda: s3.objects(bucket)["log.txt"] == b"before\nmeanwhile\n")


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.02)
