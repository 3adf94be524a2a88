"""Old checkpoints are deleted by a few requests, and no save, stop or end waits for that."""

from collections.abc import Iterator
from typing import NamedTuple

import pytest

from datapipe.core.config import StorageConfig
from datapipe.core.parallel import in_order
from datapipe.storage import Store, open_store
from tests.conftest import S3Server
from tests.support.faulty_proxy import FaultyProxy
from tests.support.watched_requests import WatchedRequests
from tests.training.checkpoint.toy import make_checkpoints, make_method, make_stepper, save
from training.checkpoint import MARKER, Checkpoints, complete, manager

MANY = 512
DELETES = "POST .*delete"


class Watched(NamedTuple):
    """A run's checkpoints, and what they ask of the store."""

    direct: Store
    through: Store
    watch: WatchedRequests


@pytest.fixture
def watched(s3: S3Server) -> Iterator[Watched]:
    watch = WatchedRequests()
    with FaultyProxy(s3.endpoint, before=watch) as proxy:
        direct = open_store(f"s3://{s3.bucket()}/run/checkpoints", s3.storage)
        yield Watched(direct, open_store(direct.url, StorageConfig(endpoint_url=proxy.endpoint, attempts=1)), watch)
        watch.release()


def _begin(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, 4 * step, make_stepper(make_method(seed=step)))


def _exists(checkpoints: Checkpoints, step: int) -> None:
    """Return once the save that was begun is a checkpoint, as the loop finds it step by step."""
    while step not in [found.step for found in checkpoints.newly_saved()]:
        checkpoints.apply_global_status(checkpoints.local_status())


def test_prune__takes_a_few_requests_for_512_parts(watched: Watched) -> None:
    checkpoints = make_checkpoints(watched.through, keep_every_steps=0)
    for step in (10, 20):
        save(checkpoints, step, make_stepper(make_method(seed=step)))
    left = [f"step_0000010/rank_{rank:05d}.aa-1.safetensors" for rank in range(MANY)]
    for _ in in_order(lambda name: watched.direct.replace(name, b"x"), left, threads=8):
        pass
    watched.watch.made.clear()
    save(checkpoints, 30, make_stepper(make_method(seed=30)))
    assert complete(watched.direct) == ["step_0000020", "step_0000030"]
    assert len([*watched.direct.list()]) == 2 * 2
    assert watched.watch.count("PUT") == 2, "a part and the marker"
    # folders; the beginnings of the two markers before; the files in the old folder and in the new one
    assert watched.watch.count("GET") == 5 and watched.watch.count("HEAD") == 0
    assert watched.watch.count("POST") == 2, "the marker first"
    assert len(watched.watch.made) == 9


def test_prune__no_save_waits_for_it(watched: Watched) -> None:
    checkpoints = make_checkpoints(watched.through, keep_every_steps=0)
    for step in (10, 20):
        save(checkpoints, step, make_stepper(make_method(seed=step)))
    watched.watch.hold(DELETES)
    _begin(checkpoints, 30)
    _exists(checkpoints, 30)
    watched.watch.await_held()
    _begin(checkpoints, 40)
    _exists(checkpoints, 40)
    assert complete(watched.direct) == [f"step_{step:07d}" for step in (10, 20, 30, 40)], "nothing is deleted yet"
    watched.watch.release()
    checkpoints.finish()
    assert complete(watched.direct) == ["step_0000030", "step_0000040"]


def test_prune__gives_way_to_a_save_but_not_to_each(watched: Watched) -> None:
    checkpoints = make_checkpoints(watched.through, keep_every_steps=0)
    for step in (10, 20):
        save(checkpoints, step, make_stepper(make_method(seed=step)))
    watched.watch.hold(DELETES)
    _begin(checkpoints, 30)
    _exists(checkpoints, 30)
    watched.watch.await_held()
    _begin(checkpoints, 40)  # the pruning after 30 ends after the request that is held: that for the marker of 10
    _exists(checkpoints, 40)
    _begin(checkpoints, 50)  # the one after 40 stays
    _exists(checkpoints, 50)
    watched.watch.release()
    checkpoints.finish()
    assert complete(watched.direct) == ["step_0000040", "step_0000050"]
    assert {entry.name.partition("/")[0] for entry in watched.direct.list()} == {"step_0000040", "step_0000050"}
    # the marker of 10; the marker of 20, the parts of both; the marker and the part of 30
    assert watched.watch.count("POST") == 5


def test_save__on_notice_is_two_requests_one_after_the_other(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's part and, when all are there, the marker; under a lease a third one, which asks who holds it. With any
    number of ranks: theirs go side by side, and what they tell one another does not go by this store."""
    monkeypatch.setattr(manager, "TIDY_S", 0.0)
    checkpoints = make_checkpoints(watched.through, keep_every_steps=0)
    watched.watch.hold("GET ")
    _begin(checkpoints, 10)
    checkpoints.finish(needed=True, hurry=True)
    assert complete(watched.direct) == ["step_0000010"]
    watched.watch.await_held()  # the pruning begins
    assert [method for method, _ in watched.watch.made] == ["PUT", "PUT", "GET"]


def test_prune__a_stop_does_not_wait_for_it(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manager, "TIDY_S", 0.0)
    checkpoints = make_checkpoints(watched.through, keep_every_steps=0)
    for step in (10, 20):
        save(checkpoints, step, make_stepper(make_method(seed=step)))
    watched.watch.hold(DELETES)
    watched.watch.made.clear()
    _begin(checkpoints, 30)
    checkpoints.finish(needed=True, hurry=True)
    assert [method for method, path in watched.watch.made if path.endswith((".safetensors", MARKER))][:2] == ["PUT"] * 2
    assert complete(watched.direct)[-1] == "step_0000030" and len(complete(watched.direct)) == 3
    watched.watch.release()
    later = make_checkpoints(watched.through, keep_every_steps=0)
    save(later, 40, make_stepper(make_method(seed=40)))
    assert complete(watched.direct) == ["step_0000030", "step_0000040"], "the next run deletes what was left"


def test_prune__a_marker_that_somebody_deleted_counts_for_nothing(watched: Watched) -> None:
    checkpoints = make_checkpoints(watched.direct, keep_every_steps=0)
    for step in (10, 20):
        save(checkpoints, step, make_stepper(make_method(seed=step)))
    watched.direct.delete(f"step_0000020/{MARKER}")
    save(checkpoints, 30, make_stepper(make_method(seed=30)))
    assert complete(watched.direct) == ["step_0000010", "step_0000030"]
    assert len([*watched.direct.list()]) == 2 * 2
