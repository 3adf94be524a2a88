"""One writer a run folder: who has the lease, when another one may take it, and that the one before writes no more."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from datapipe.core.config import StorageConfig
from datapipe.core.errors import LeaseError, StorageError
from datapipe.storage import Store, open_store
from tests.conftest import S3Server
from tests.support.faulty_proxy import Faults, FaultyProxy
from tests.support.forked import call, forkserver
from training.core.run_folder import lease
from training.core.run_folder.lease import Follower, Lease, lease_on, refuse_held
from training.core.run_folder.lease_holder import Holder, boottime
from training.core.run_folder.run_folder import RunFolder
from training.core.run_folder.write_guard import GuardedStore

LONG_S = 1e6
"""Nobody waits for the end of such a lease."""
SHORT_S = 0.5
HERE = StorageConfig()
Folder = tuple[str, StorageConfig]


@pytest.fixture(params=["local", "s3", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    if request.param == "local":
        return str(tmp_path / "run"), HERE
    if request.param == "memory":
        return f"memory://{uuid4().hex}/run", HERE
    server: S3Server = request.getfixturevalue("s3")
    return f"s3://{server.bucket()}/run", server.storage


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "SETTLE_S", 0.1)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Any:
    """elsewhere(): a context in which this process claims to be one of the same pid on another machine, whose clock
    began at another time."""

    @contextlib.contextmanager
    def machine() -> Iterator[None]:
        genuine = Holder.here

        def there(place: str, **settings: Any) -> Holder:
            return replace(genuine(place, **settings), boot="other", host="other-host", claimed_s=1e9)

        with monkeypatch.context() as patched:
            patched.setattr(Holder, "here", there)
            yield

    return machine


def _silent(line: str) -> None:
    raise AssertionError(f"there was nothing to wait for: {line}")


def _killed(taken: Lease) -> None:
    """What is left of a holder that was killed: no more renewals, nothing given back."""
    taken._ended.set()
    taken._busy.acquire()


def _claim_of(url: str, storage: StorageConfig, **facts: Any) -> Holder:
    """A claim as another process would have left it."""
    store = open_store(url, storage)
    lease._make(url, store)
    holder = replace(Holder.here(lease._place(url, store), duration_s=LONG_S, has_workers=False), **facts)
    store.replace("lease/0000004.holder.json", holder.to_bytes())
    return holder


def _ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_lease__a_second_writer_is_refused_with_who_has_it(folder: Folder) -> None:
    with lease_on(*folder, LONG_S) as taken:
        assert taken.term == 1
        host, when = taken.holder.host, r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d UTC"
        wanted = rf"process {os.getpid()} on {host} \(.+\), since {when}"
        for attempt in (lambda: lease_on(*folder, show_line=_silent), lambda: refuse_held(*folder)):
            with pytest.raises(LeaseError, match=wanted):
                attempt()
        taken.check()
        taken.confirm()


@pytest.mark.slow
def test_lease__given_back_it_is_free_and_the_term_rises(folder: Folder) -> None:
    for term in (1, 2, 3):
        with lease_on(*folder, LONG_S, show_line=_silent) as taken:
            assert taken.term == term
            open_store(*folder).replace("log.txt", b"something was written")
        refuse_held(*folder)


def test_lease__without_anything_written_it_was_never_there(folder: Folder) -> None:
    with pytest.raises(ValueError, match="a mistake"), lease_on(*folder):
        raise ValueError("a mistake")
    if folder[0].startswith("/"):
        assert not Path(folder[0]).exists()
    else:
        assert not list(open_store(*folder).list())


@pytest.mark.parametrize("gone", ["dead", "number used again", "not waited for"])
def test_lease__on_the_same_machine_the_process_decides_at_once(folder: Folder, gone: str) -> None:
    child = None
    if gone == "dead":
        facts: dict[str, Any] = {"pid": _ended_process()}
    elif gone == "number used again":
        facts = {"started": "1"}
    else:
        child = subprocess.Popen([sys.executable, "-c", ""])
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        facts = {"pid": child.pid, "started": "12"}
    _claim_of(*folder, **facts)
    with lease_on(*folder, LONG_S, show_line=_silent) as taken:
        assert taken.term == 5
    if child is not None:
        child.wait()


def test_lease__a_stopped_process_of_the_same_machine_keeps_it_for_its_duration(folder: Folder) -> None:
    _claim_of(*folder, claimed_s=boottime() - LONG_S / 2)
    with pytest.raises(LeaseError):
        lease_on(*folder)
    _claim_of(*folder, claimed_s=boottime() - LONG_S - 1)
    with lease_on(*folder, show_line=_silent) as taken:
        assert taken.term == 5


@pytest.mark.slow
@pytest.mark.parametrize("facts", [{"boot": "another machine"}, {"namespaces": "pid:[1]"}, {"place": "a copy of it"},
                                   {"boot": "", "pid": 1}, None])  # fmt: skip
def test_lease__elsewhere_it_ends_when_nothing_changes_for_its_duration(
    folder: Folder, facts: dict[str, Any] | None
) -> None:
    """Whatever the pid means here, and whatever the clock there said. None: the claim is damaged."""
    dead = {} if facts is None else {"pid": _ended_process(), "claimed_s": 1e12, **facts}
    _claim_of(*folder, duration_s=SHORT_S, **dead)
    if facts is None:
        open_store(*folder).replace("lease/0000004.holder.json", b"{")
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease, "DURATION_S", SHORT_S)
        began = time.monotonic()
        with lease_on(*folder, LONG_S, show_line=said.append) as taken:
            assert taken.term == 5 and time.monotonic() - began >= SHORT_S
    assert len(said) == 1 and said[0].startswith("waiting up to ")


@pytest.mark.slow
def test_lease__elsewhere_a_renewal_tells_that_it_is_held(folder: Folder, elsewhere: Any) -> None:
    with elsewhere():
        taken = lease_on(*folder, 4.0)
    with taken, pytest.raises(LeaseError, match=f"process {os.getpid()} on other-host"):
        lease_on(*folder, show_line=lambda _: None)


def test_lease__elsewhere_it_is_free_as_soon_as_it_is_given_back(folder: Folder, elsewhere: Any) -> None:
    open_store(*folder).replace("log.txt", b"")
    with elsewhere():
        taken = lease_on(*folder, LONG_S)
    waits = threading.Event()
    threading.Thread(target=lambda: (waits.wait(), taken.release()), daemon=True).start()
    with lease_on(*folder, LONG_S, show_line=lambda _: waits.set()) as later:
        assert later.term == 2


def test_lease__of_many_at_the_same_moment_one_gets_it(folder: Folder) -> None:
    count, won, refused = 6, list[Lease](), list[LeaseError]()
    together = threading.Barrier(count)

    def start() -> None:
        together.wait()
        try:
            won.append(lease_on(*folder, 4.0))
        except LeaseError as error:
            refused.append(error)

    threads = [threading.Thread(target=start) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = []
    for one in won:  # a store without conditions may tell two: the earlier one finds out when it asks
        with contextlib.suppress(LeaseError):
            one.confirm()
            kept.append(one)
    assert len(kept) == 1 and len(won) + len(refused) == count
    assert len(won) == 1 or folder[0].startswith("memory")
    for one in won:
        one.release()


@pytest.mark.slow
def test_lost__nothing_is_written_any_more(folder: Folder, elsewhere: Any) -> None:
    """A holder that did not renew, as it was stopped, while another machine took over."""
    with elsewhere():
        stopped = lease_on(*folder, SHORT_S)
    stopped._ended.set()  # no thread renews it
    run = RunFolder(*folder, guard=stopped)
    run.write("log.txt", "mine\n")
    with lease_on(*folder, LONG_S, show_line=lambda _: None) as successor:
        before = _content(*folder)
        store = GuardedStore(open_store(*folder), stopped).at("checkpoints")
        for write in (
            lambda: run.write("log.txt", "late"),
            lambda: run.append("log.txt", "late"),
            lambda: store.replace("step_0000001/x", b"late"),
            lambda: store.put_if_absent("step_0000001/x", b"late"),
            lambda: run.store.delete("log.txt"),
            stopped.confirm,
        ):
            with pytest.raises(LeaseError, match=rf"taken over .*process {os.getpid()} on .*\(term 2, here 1\)"):
                write()
        stopped.release()
        after = _content(*folder)
        changing = "lease/0000002.renewed.json"  # the successor's own
        assert before | {changing: b""} == after | {changing: b""}
        successor.confirm()


def _content(url: str, storage: StorageConfig) -> dict[str, bytes]:
    store = open_store(url, storage)
    return {entry.name: store.read(entry.name) for entry in store.list()}


def test_lost__whoever_was_cut_off_goes_on_where_nobody_took_over(folder: Folder) -> None:
    with lease_on(*folder, SHORT_S) as taken:
        taken._ended.set()
        taken._valid_until = boottime() - 1
        taken.check()
        assert taken.lost is None and taken._valid_until > boottime()
        taken.release()


def test_lost__a_deleted_claim_is_renewed_and_terms_go_on_from_the_checkpoints(folder: Folder) -> None:
    store = open_store(*folder)
    store.replace("checkpoints/term_0000007.json", b"{}")
    with lease_on(*folder, LONG_S) as taken:
        assert taken.term == 8
        store.delete("lease/0000008.holder.json")
        taken._valid_until = -1.0
        taken.check()
        with pytest.raises(LeaseError):
            refuse_held(*folder)


@pytest.mark.slow
def test_lease__files_of_terms_long_over_are_deleted(folder: Folder) -> None:
    store = open_store(*folder)
    store.replace("log.txt", b"")
    for _ in range(4):
        lease_on(*folder, LONG_S, show_line=_silent).release()
    assert {entry.name[6:13] for entry in store.list("lease/")} == {"0000003", "0000004"}


@pytest.mark.slow
def test_follower__writes_until_somebody_takes_over_and_the_successor_waits_for_that(
    folder: Folder, elsewhere: Any
) -> None:
    with elsewhere():
        driver = lease_on(*folder, SHORT_S, has_workers=True)
    with Follower(*folder, driver.ticket) as worker:
        worker.check()
        _killed(driver)
        with lease_on(*folder, LONG_S, show_line=lambda _: None) as successor:
            successor.settle()
            assert boottime() >= successor.holder.claimed_s + lease.FOLLOWS * SHORT_S
            with pytest.raises(LeaseError, match="taken over"):
                worker.check()


def test_store_without_conditions__is_said_and_the_later_claim_counts(
    s3: S3Server, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = s3.bucket()
    with FaultyProxy(s3.endpoint, Faults(without=("If-None-Match",))) as proxy:
        storage = StorageConfig(endpoint_url=proxy.endpoint)
        with lease_on(f"s3://{bucket}/run", storage, LONG_S) as taken:
            assert ["does not enforce create-once" in line for line in caplog.messages] == [True]
            with pytest.raises(LeaseError, match="another process writes"):
                lease_on(f"s3://{bucket}/run", storage)
            other = replace(taken.holder, token="another", pid=77)
            open_store(f"s3://{bucket}/run", storage).replace("lease/0000001.holder.json", other.to_bytes())
            with pytest.raises(LeaseError, match="process 77 on"):
                taken.confirm()


@pytest.mark.slow
def test_storage_away__the_lease_outlives_it(s3: S3Server) -> None:
    """Its thread goes on trying; a write meets the store's own error."""
    url, away = f"s3://{s3.bucket()}/run", threading.Event()

    class Away(Exception):
        pass

    def before(method: str, path: str) -> None:
        if away.is_set():
            raise Away

    with FaultyProxy(s3.endpoint, before=before) as proxy:
        storage = StorageConfig(endpoint_url=proxy.endpoint, attempts=1, timeout_s=5)
        with lease_on(url, storage, SHORT_S) as taken:
            away.set()
            deadline = time.monotonic() + 60
            while boottime() < taken._valid_until:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            with pytest.raises(StorageError):
                taken.check()
            away.clear()
            while boottime() >= taken._valid_until:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            assert taken.lost is None


def _write_lines(url: str, storage: StorageConfig, told: str) -> None:
    """A writer that stops itself, until it is refused; its last words go into `told`."""
    try:
        with lease_on(url, storage, 1.0) as taken:
            run = RunFolder(url, storage, taken)
            run.append("log.txt", "line")
            run.flush()
            run.write("state.txt", "mine")
            os.kill(os.getpid(), signal.SIGSTOP)
            run.write("state.txt", "late")
    except LeaseError as error:
        Path(told).write_text(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_stopped__past_its_lease_a_process_ends_before_it_writes(kind: str, tmp_path: Path, s3: S3Server) -> None:
    """A real process: stopped while another command takes over, and woken."""
    url = str(tmp_path / "run") if kind == "local" else f"s3://{s3.bucket()}/run"
    told = tmp_path / "told"
    process = forkserver().Process(target=call, args=(dict(os.environ), _write_lines, url, s3.storage, str(told)))
    process.start()
    store = open_store(url, s3.storage)
    _until(lambda: store.exists("state.txt"))
    with _as_soon_as_free(url, s3.storage) as taken:
        assert taken.term == 2
        store.replace("state.txt", b"the successor's")
        log = _log(store)
        os.kill(process.pid or 0, signal.SIGCONT)
        process.join(120)
        assert process.exitcode == 0 and "taken over" in told.read_text()
        assert store.read("state.txt") == b"the successor's" and _log(store) == log
        assert json.loads(store.read("lease/0000001.renewed.json"))["released"] is False


def _log(store: Store) -> bytes:
    return store.read("log.txt") if store.exists("log.txt") else b""


@pytest.mark.slow
def test_killed__the_next_one_starts_at_once(tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    arguments = (dict(os.environ), _write_lines, url, HERE, str(tmp_path / "told"))
    process = forkserver().Process(target=call, args=arguments)
    process.start()
    _until(lambda: (tmp_path / "run" / "state.txt").exists())
    process.kill()
    process.join(60)
    with lease_on(url, HERE, show_line=_silent) as taken:
        assert taken.term == 2


def _until(holds: Any) -> None:
    deadline = time.monotonic() + 120
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _as_soon_as_free(url: str, storage: StorageConfig) -> Lease:
    deadline = time.monotonic() + 120
    while True:
        try:
            return lease_on(url, storage, LONG_S, show_line=_silent)
        except LeaseError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
