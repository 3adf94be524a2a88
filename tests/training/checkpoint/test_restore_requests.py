"""What a restore asks of an object store: side by side, each byte once for a machine, and no more than is needed."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from datapipe.core.config import StorageConfig
from datapipe.storage import Store, open_store
from tests.conftest import S3Server
from tests.support.faulty_proxy import FaultyProxy
from tests.support.ranks import run_ranks
from tests.support.watched_requests import WatchedRequests
from tests.training.checkpoint.test_lineage import Term
from tests.training.checkpoint.toy import (
    ABOUT,
    make_checkpoints,
    make_method,
    make_step,
    make_stepper,
    same,
    save,
    saved,
)
from training.checkpoint import MARKER, Reader, read_marker, reader
from training.checkpoint.announcements import Announcement
from training.checkpoint.async_save import write_marker, write_part
from training.checkpoint.machine_blocks import shared_blocks
from training.checkpoint.snapshot import Snapshots
from training.core.run_folder.write_guard import FREE
from training.core.world import World
from training.engine.plain import PlainStepper
from training.engine.state_fragments import divide

PARTS = 3 * reader.IN_FLIGHT
NAME = "step_0000010"


def _stepper(seed: int) -> PlainStepper:
    """After a step: with moments."""
    stepper = make_stepper(make_method(seed=seed))
    make_step(stepper, seed)
    return stepper


def _write(store: Store, world: int) -> PlainStepper:
    """A checkpoint of so many ranks; the state in it."""
    stepper, parts = _stepper(7), list[Announcement]()
    for rank in range(world):
        snapshot = Snapshots(torch.device("cpu")).take(divide(stepper.pieces(stepper.steps()), rank, world))
        parts.append(write_part(store, NAME, rank, "aa-1", snapshot))
    about = {**ABOUT, "step": 10, "samples": 40, "steps": stepper.steps(), "world": world, "term": 0}
    write_marker(store, parts, about, FREE)
    return stepper


def _held(stepper: PlainStepper) -> dict[str, torch.Tensor]:
    return {piece.key: piece.values.clone() for piece in stepper.pieces(stepper.steps())}


@pytest.fixture
def store(s3: S3Server) -> Store:
    return open_store(f"s3://{s3.bucket()}/run/checkpoints", s3.storage)


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The machine's temporary folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path


def _through(store: Store, endpoint: str) -> Store:
    return open_store(store.url, StorageConfig(endpoint_url=endpoint, attempts=1))


def _kinds(store: Store) -> list[set[str]]:
    """What each part holds: parameters, moments, or both."""
    files = read_marker(store, NAME).files
    return [{key_kind(fragment.key) for fragment in file.fragments} for file in files]


def key_kind(key: str) -> str:
    return "model" if key.startswith("model/") else "moments"


def test_restore__reads_parts_side_by_side(s3: S3Server, store: Store) -> None:
    wanted, watch, stepper = _held(_write(store, PARTS)), WatchedRequests(), _stepper(1)
    watch.meet("GET .*safetensors", reader.IN_FLIGHT)
    with FaultyProxy(s3.endpoint, before=watch) as proxy:
        assert make_checkpoints(_through(store, proxy.endpoint)).restore(stepper) == (40, NAME)
    assert same(wanted, _held(stepper))
    assert watch.most_in_flight == reader.IN_FLIGHT
    stretches = sum(map(len, _kinds(store)))  # parameters first, then moments
    assert watch.count("GET", "safetensors") == stretches <= PARTS + 1
    assert watch.count("GET", MARKER) == watch.count("GET", "list-type") == 1
    assert len(watch.made) == stretches + 2, "nothing else"


def test_restore__reads_what_a_rank_needs_and_no_more(s3: S3Server, store: Store) -> None:
    """Of eight parts one where there are eight ranks again, and those that overlap where there are fewer."""
    wanted = _write(store, 8)
    state = {piece.key: piece for piece in wanted.pieces(wanted.steps())}
    for world, most in ((8, 1), (4, 2), (3, 4)):
        stepper, watch = _stepper(1), WatchedRequests()
        for piece in stepper.pieces(stepper.steps()):
            piece.values.zero_()
        mine = divide(stepper.pieces(stepper.steps()), 1, world)
        with FaultyProxy(s3.endpoint, before=watch) as proxy:
            Reader(_through(store, proxy.endpoint), NAME, read_marker(store, NAME)).fill(mine)
        assert 1 <= len(watch.made) <= most, world
        for piece in mine:
            assert torch.equal(piece.values, state[piece.key].values[piece.start : piece.end])


def _restore(world: World, url: str, storage: StorageConfig, folder: str) -> dict[str, torch.Tensor]:
    tempfile.tempdir = folder
    stepper = _stepper(world.rank)
    checkpoints = make_checkpoints(open_store(url, storage), world=world)
    assert checkpoints.restore(stepper) == (40, NAME)
    assert checkpoints.restore(stepper) == (40, NAME), "nothing is left of the first time"
    return _held(stepper)


@pytest.mark.slow
def test_restore__each_byte_once_for_the_ranks_of_a_machine(s3: S3Server, store: Store, tmp_path: Path) -> None:
    wanted = _held(_write(store, 8))
    with FaultyProxy(s3.endpoint) as proxy:
        storage = StorageConfig(endpoint_url=proxy.endpoint, attempts=1)
        found = run_ranks(2, _restore, store.url, storage, str(tmp_path))
    assert all(same(wanted, state) for state in found)
    reads = {request: times for request, times in proxy.seen.items() if "safetensors" in request}
    stretches = sum(map(len, _kinds(store)))
    assert len(reads) == stretches and set(reads.values()) == {2}, "once for each of the two times"
    markers = [times for request, times in proxy.seen.items() if MARKER in request]
    assert markers == [2], "for all ranks"
    (folder,) = tmp_path.glob("checkpoint-blocks-*")
    assert {path.name for path in folder.iterdir()} <= {"lock", "turns"}, "nothing stays on the machine's disk"


def test_blocks__damage_on_the_machine_is_not_damage_of_the_checkpoint(store: Store, scratch: Path) -> None:
    wanted = _held(_write(store, 2))
    marker = read_marker(store, NAME)
    for damage in (b"", b"short", None):
        shared = shared_blocks(store, marker, World(0, 2, 0, 2))
        assert shared is not None
        Reader(store, NAME, marker, shared=shared).fill(_stepper(1).pieces({}))
        held = [path for path in scratch.glob("checkpoint-blocks-*/*") if path.is_file() and path.name != "lock"]
        assert held
        for path in held:
            path.write_bytes(bytes(path.stat().st_size) if damage is None else damage)
        stepper = _stepper(2)
        Reader(store, NAME, marker, shared=shared).fill(stepper.pieces(stepper.steps()))
        assert same(wanted, _held(stepper))
        shared.drop()


def test_blocks__a_machine_without_room_reads_each_rank_by_itself(store: Store, scratch: Path) -> None:
    wanted, stepper = _held(_write(store, 2)), _stepper(1)
    (path,) = [scratch / "blocked"]
    path.write_bytes(b"")
    tempfile.tempdir = str(path)  # a file, not a folder
    marker = read_marker(store, NAME)
    assert shared_blocks(store, marker, World(0, 2, 0, 2)) is None
    Reader(store, NAME, marker, shared=None).fill(stepper.pieces(stepper.steps()))
    assert same(wanted, _held(stepper))


def test_restore__the_beginning_of_a_term_is_that_of_the_checkpoint_that_was_loaded(store: Store) -> None:
    """It is noted while the newest is loaded, which then turns out to be damaged."""
    saved(store, 10, 20)
    part = f"step_0000020/{read_marker(store, 'step_0000020').files[0].name}"
    store.replace(part, store.read(part)[:-9])
    writer = make_checkpoints(store, guard=Term(2))
    assert writer.restore(make_stepper(make_method())) == (40, NAME) and not writer.spoiled
    assert store.read("term_0000002.json") == b'{"terms": [[2, 10]]}'
    other = make_checkpoints(store, guard=Term(2))  # workers that were started anew
    save(writer, 30, make_stepper(make_method()))
    assert other.restore(make_stepper(make_method()))[1] == "step_0000030"
    assert store.read("term_0000002.json") == b'{"terms": [[2, 10]]}'


def test_restore__says_that_the_state_is_spoiled_where_all_are_damaged(store: Store) -> None:
    saved(store, 10, 20)
    for name in (NAME, "step_0000020"):
        part = f"{name}/{read_marker(store, name).files[0].name}"
        store.replace(part, store.read(part)[:-9])
    checkpoints = make_checkpoints(store)
    assert checkpoints.restore(make_stepper(make_method())) == (0, None) and checkpoints.spoiled
    save(checkpoints, 20, make_stepper(make_method()))
    assert checkpoints.restore(make_stepper(make_method()))[1] == "step_0000020" and not checkpoints.spoiled
