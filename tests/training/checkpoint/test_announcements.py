"""Parts announced by their writers, through the store of torch in which ranks meet."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
from torch import distributed

from datapipe.core.config import StorageConfig
from datapipe.core.errors import StorageError
from datapipe.storage import open_store
from tests.conftest import S3Server
from tests.support.faulty_proxy import FaultyProxy
from tests.support.watched_requests import WatchedRequests
from tests.training.checkpoint.toy import ABOUT, make_method, make_stepper
from training.checkpoint import announcements, read_marker
from training.checkpoint.announcements import Announcement, Announcements
from training.checkpoint.async_save import part_name, write_marker
from training.checkpoint.snapshot import Snapshots
from training.core.run_folder.lease import lease_on
from training.core.run_folder.write_guard import GuardedStore
from training.core.world import World
from training.engine.state_fragments import Piece, divide

MANY = 512


@pytest.fixture
def meeting() -> Iterator[distributed.Store]:
    """The store of a run's ranks, with one client."""
    yield distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@cache
def _pieces() -> list[Piece]:
    """Some of a toy's state."""
    return make_stepper(make_method()).pieces({})[:30]


def _part(rank: int, size: int, save: str) -> Announcement:
    """What a rank of so many writes of it."""
    snapshot = Snapshots(World().device).take(divide(_pieces(), rank, size))
    return Announcement(snapshot.file(part_name(rank, save)), snapshot.tensors)


def test_marker__of_512_parts_takes_one_request(s3: S3Server, meeting: distributed.Store) -> None:
    """And one that asks who holds the lease: no part is listed, looked for or read."""
    watch, url = WatchedRequests(), f"s3://{s3.bucket()}/run"
    parts = [_part(rank, MANY, "save") for rank in range(MANY)]
    for rank in reversed(range(MANY)):
        ranks = Announcements(World(rank, MANY), meeting)
        ranks.announce("save", parts[rank])
    with (
        lease_on(url, s3.storage, 3_600.0) as guard,
        FaultyProxy(s3.endpoint, before=watch) as proxy,
    ):
        through = open_store(f"{url}/checkpoints", StorageConfig(endpoint_url=proxy.endpoint, attempts=1))
        about = {**ABOUT, "step": 10, "samples": 40, "steps": {}, "world": MANY, "term": guard.term}
        written = write_marker(GuardedStore(through, guard), ranks.of_all("save"), about, guard)
    assert [(method, path.rpartition("/")[2]) for method, path in watch.made] == [("PUT", "checkpoint.json")]
    marker = read_marker(open_store(f"{url}/checkpoints", s3.storage), "step_0000010")
    assert marker == written and list(marker.files) == [part.file for part in parts]


def test_of_all__one_rank_needs_no_store() -> None:
    alone, part = Announcements(World()), _part(0, 1, "a")
    alone.announce("a", part)
    assert alone.of_all("a") == [part]
    with pytest.raises(StorageError, match="rank 0 has not announced its part"):
        alone.of_all("b")


def test_of_all__large_ones_go_in_pieces(meeting: distributed.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(announcements, "MOST_BYTES", 100)
    parts = [_part(rank, 2, "a") for rank in range(2)]
    ranks = [Announcements(World(rank, 2), meeting) for rank in range(2)]
    for rank in range(2):
        ranks[rank].announce("a", parts[rank])
    assert meeting.check([f"{announcements.KEY}/1/5"]) and ranks[0].of_all("a") == parts


def test_of_all__names_a_rank_that_is_missing_and_does_not_wait(meeting: distributed.Store) -> None:
    ranks = [Announcements(World(rank, 4), meeting) for rank in range(4)]
    for rank in (0, 1, 3):
        ranks[rank].announce("a", _part(rank, 4, "a"))
    with pytest.raises(StorageError, match="rank 2 has not announced its part"):
        ranks[0].of_all("a")


def test_of_all__not_of_another_save(meeting: distributed.Store) -> None:
    """A place is used again: what a rank said of the save before is not its part of this one."""
    ranks = [Announcements(World(rank, 2), meeting) for rank in range(2)]
    parts = [_part(rank, 2, "a") for rank in range(2)]
    for rank in range(2):
        ranks[rank].announce("a", parts[rank])
    ranks[0].announce("b", parts[0])
    with pytest.raises(StorageError, match="rank 1 has not announced"):
        ranks[0].of_all("b")
    later = parts[1]._replace(file=replace(parts[1].file, name=part_name(1, "b")))
    ranks[1].announce("b", later)
    assert ranks[0].of_all("b") == [parts[0], later]
