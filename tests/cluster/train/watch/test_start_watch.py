"""A start that is slow, one that stands still, one that can never come to anything: decided from what is seen."""

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.train import rendezvous
from cluster.train.controller_callbacks import lacking
from cluster.train.room import _amounts, lacks
from cluster.train.watch.early_signs import Advance
from cluster.train.watch.hang_detection import Pulse, hung, slow_start
from cluster.train.watch.start_watch import EVERY_S, FIRST_S, GROWTH, HOPELESS_S, Seen, StartWatch
from datapipe.core.errors import ClusterError
from datapipe.core.progress import has_read, work_done
from datapipe.storage import open_store

START_S = 600.0
SHORT = Seen(None, shortage="2 of 1 CPU each are needed; the cluster has 1 CPU")
NEVER = Seen(None, shortage="2 of 64 CPU each are needed", hopeless="a worker needs 64 CPU")


def said(watch: StartWatch, *seen: tuple[float, Seen]) -> list[tuple[float, str]]:
    """(second, what was said or why it was given up) for what is seen at these seconds."""
    found = []
    for second, one in seen:
        verdict = watch.judge(one, second)
        if verdict.line or verdict.error:
            found.append((second, verdict.line or f"error: {verdict.error}"))
    return found


def every(step: float, until: float, seen: Seen) -> list[tuple[float, Seen]]:
    return [(second * step, seen) for second in range(int(until / step) + 1)]


def test_start_watch__what_is_waited_for_is_told_within_seconds_and_not_all_the_time() -> None:
    lines = said(StartWatch(START_S), *every(5, 100, SHORT))
    assert [second for second, _ in lines] == [FIRST_S, FIRST_S + EVERY_S, FIRST_S + 2 * EVERY_S, FIRST_S + 3 * EVERY_S]
    assert {line for _, line in lines} == {SHORT.shortage}


def test_start_watch__a_hopeless_start_ends_in_the_first_minute_with_its_reason() -> None:
    *lines, (second, error) = said(StartWatch(START_S), *every(5, 55, NEVER))
    assert lines[0] == (FIRST_S, NEVER.hopeless)
    assert HOPELESS_S < second < 60 and error.startswith("error: no room for workers, and there will be none: a worker")
    assert not said(StartWatch(START_S), *every(5, 40, NEVER))[-1][1].startswith("error")  # machines may be joining


def test_start_watch__room_that_may_still_come_is_waited_for() -> None:
    watch = StartWatch(START_S)
    assert not any(line.startswith("error") for _, line in said(watch, *every(5, START_S, SHORT)))
    assert said(watch, (START_S + 5, SHORT)) == [
        (START_S + 5, f"error: no room for workers in 10 min: {SHORT.shortage}")
    ]


def test_start_watch__a_slow_start_goes_on_for_as_long_as_it_comes_further() -> None:
    """Three times the patience, a little more read every 100 s; then nothing."""
    watch = StartWatch(START_S)
    further = [(100.0 * step, Seen({"a": 5 * GROWTH * step, "b": 7 * GROWTH})) for step in range(18)]
    assert not any(line.startswith("error") for _, line in said(watch, *further))
    last = further[-1]
    standing = [(last[0] + 100 * step, Seen({"a": 5 * GROWTH * 17 + step, "b": 7 * GROWTH})) for step in range(1, 8)]
    *lines, (second, error) = said(watch, *standing)
    assert (
        second - last[0] == 700
        and "have come no further for 11 min" in error
        and lines[0][1].startswith("there is room")
    )


def test_start_watch__room_that_was_lost_is_waited_for_anew() -> None:
    watch = StartWatch(START_S)
    assert not any("error" in line for _, line in said(watch, (0, SHORT), (500, Seen({"a": 0})), (1000, SHORT),
                                                       (1500, SHORT)))  # fmt: skip


@pytest.mark.parametrize(("wanted", "said"), [
    ({"CPU": 8}, ""),
    ({"CPU": 8, "GPU": 1}, "a worker needs 8 CPU, 1 GPU, and no machine of the cluster has more than 16 CPU, 1 GPU"),
    ({"CPU": 64}, "a worker needs 64 CPU, and no machine of the cluster has more than 16 CPU"),
])  # fmt: skip
def test_lacks__on_machines_that_have_it_but_not_together(wanted: dict[str, float], said: str) -> None:
    nodes: list[dict[str, Any]] = [
        {"Alive": True, "Resources": {"CPU": 16.0}}, {"Alive": True, "Resources": {"CPU": 4.0, "GPU": 1.0}},
        {"Alive": False, "Resources": {"CPU": 128.0, "GPU": 8.0}},
    ]  # fmt: skip
    assert lacks(nodes, wanted) == said


def test_lacking__names_package_and_machine() -> None:
    told = "ray::RayTrainWorker.init_train_context() (pid=41, ip=10.0.0.7, actor_id=3f)\n" \
           "ModuleNotFoundError: No module named 'cluster'"  # fmt: skip
    error = RuntimeError("At least one of the worker actors failed to initialize.")
    error.__cause__ = ValueError(told)
    found = lacking(error)
    assert found is not None and "no Python package cluster" in found.what and found.where == "machine 10.0.0.7"
    assert lacking(RuntimeError("out of memory")) is None
    optional = RuntimeError(f"{told}\n\nDuring handling of the above exception:\nRuntimeError: connection reset")
    assert lacking(optional) is None


def test_amounts__grow_with_what_a_starting_process_reads_or_holds(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(30_000_000))
    reads = "import sys; input(); held = open(sys.argv[1], 'rb').read(); print('read', flush=True); input()"
    line = ["ray::RayTrainWorker", "-c", reads, str(tmp_path / "large")]
    with subprocess.Popen(line, executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None
        before = _amounts()
        process.stdin.write(b"\n")
        process.stdin.flush()
        process.stdout.readline()
        assert _amounts() - before > 30_000_000
        process.stdin.write(b"\n")


def test_reach__says_who_does_not_reach_whom(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        monkeypatch.setattr(rendezvous, "REACH_S", 0.2)
        with pytest.raises(ClusterError, match=f"does not reach 127.0.0.1:{port}, where the ranks meet: .*refused"):
            rendezvous._reach("127.0.0.1", port)
        listening.listen()
        rendezvous._reach("127.0.0.1", port)


def test_hung__a_start_that_imports_or_reads_is_slow_and_said_to_be() -> None:
    starting = [Pulse(rank, 0, "data", stood, 0.5, False, so_far="2,001 modules imported, 9.0 MB read")
                for rank, stood in enumerate((40.0, 55.0))]  # fmt: skip
    assert hung(starting, start_s=600, hang_s=180, silence_s=60) == []
    line = slow_start(starting, {}, after_s=30)
    so_far = "(2,001 modules imported, 9.0 MB read)"
    assert line == f"rank 1 has come no further with its start for 55 s {so_far}; so have 1 others"
    assert slow_start(starting, {}, after_s=60) == ""
    standing = [pulse._replace(stood_s=601.0) for pulse in starting]
    assert "2,001 modules imported" in hung(standing, start_s=600, hang_s=180, silence_s=60)[0].reason
    assert slow_start([pulse._replace(begun=True) for pulse in standing], {}, after_s=30) == ""


def test_advance__counts_what_stores_bring_and_what_is_imported(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(str(tmp_path))
    store.replace("index", bytes(70_000))
    advance, before = Advance(), work_done()
    clock = iter(range(0, 1_000, 10))
    monkeypatch.setattr("cluster.train.watch.early_signs.time.monotonic", lambda: next(clock))
    first = advance.look()[1]
    assert advance.look()[1] == first + 10  # nothing was done
    store.read("index", start=5, size=50_000)
    done, stood_s = advance.look()
    assert done.read == before.read + 50_000 and stood_s == 10
    has_read(1)
    monkeypatch.setitem(__import__("sys").modules, "a_new_module", object())
    assert advance.look()[0] == (before.modules + 1, before.read + 50_001)
