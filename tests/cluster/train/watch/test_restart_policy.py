"""When workers are ended and started anew, decided from what is known: no Ray, no processes."""

from typing import Any

import pytest

from cluster.train.controller_callbacks import death_in_words, describe
from cluster.train.coordinator import Coordinator, Situation, WorkerLocation
from cluster.train.watch.hang_detection import Pulse, accusation, hung
from cluster.train.watch.restart_policy import BAD_NODE_FAILURES, LONGEST_DELAY_S, Failure, Restarts
from training.config.cluster import ClusterConfig

CRASH = Failure("crash", "rank 1 on a: its process died", "a", 1)


def _pulse(rank: int, step: int, doing: Any = "backward", stood: float = 0.0, silent: float = 0.0, begun: bool = True,
           marks: int = 0) -> Pulse:  # fmt: skip
    return Pulse(rank, step, doing, stood, silent, begun, marks)


@pytest.mark.parametrize(("pulses", "ended"), [
    ([], []),
    ([_pulse(0, 7, stood=99), _pulse(1, 7)], []),  # one still moves
    ([_pulse(0, 7, stood=9), _pulse(1, 7, stood=9)], []),
    ([_pulse(0, 7, stood=5, silent=1), _pulse(1, 7, stood=5, silent=5)], [1]),  # stopped: it says nothing
    ([_pulse(0, 7, stood=5, silent=5), _pulse(1, 7, stood=5, silent=5)], []),  # nobody listened
    ([_pulse(0, 7, stood=12, silent=11), _pulse(1, 7, stood=12, silent=12)], [0, 1]),
    ([_pulse(0, 0, stood=5, silent=5, begun=False), _pulse(1, 0, stood=5)], []),  # imports silence, too
    ([_pulse(0, 7, stood=11), _pulse(1, 7, "forward", stood=11)], [1]),  # stuck: the furthest behind
    ([_pulse(0, 7, "data", stood=11), _pulse(1, 6, stood=11)], [1]),
    ([_pulse(0, 7, stood=11), _pulse(1, 7, stood=11)], [0, 1]),  # nobody knows: all
    ([_pulse(0, 7, stood=11, marks=4), _pulse(1, 7, stood=11, marks=2)], [1]),  # an earlier micro-batch
    ([_pulse(0, 0, stood=99, begun=False), _pulse(1, 0, stood=99, begun=False)], []),  # imports take long
    ([_pulse(0, 0, stood=101, begun=False), _pulse(1, 1, stood=101)], [0]),
])  # fmt: skip
def test_hung__who_is_ended(pulses: list[Pulse], ended: list[int]) -> None:
    found = hung(pulses, start_s=100, hang_s=10, silence_s=4)
    assert [one.rank for one in found] == ended and all(one.reason for one in found)


PLACES = {rank: WorkerLocation(rank, node * 16, f"10.0.0.{rank}", 100 + rank) for rank, node in enumerate("aabc")}


@pytest.mark.parametrize(("behind", "node", "said"), [
    ([3], "c", "rank 3 on 10.0.0.3 (node cccccccc): stood still in step 8 (forward) for 11 s"),
    ([0, 1], "a", "(forward) for 11 s; so did ranks 1"),
    ([1, 2], "", "rank 1 on 10.0.0.1"),  # on two machines: which of them is at fault is not known
    ([0, 1, 2, 3], "", "all ranks stand at step 8 (forward) for 11 s; nobody is behind"),
])  # fmt: skip
def test_hung__a_machine_is_charged_with_what_is_its_own(behind: list[int], node: str, said: str) -> None:
    pulses = [_pulse(rank, 7, "forward" if rank in behind else "backward", stood=11) for rank in PLACES]
    found = hung(pulses, start_s=100, hang_s=10, silence_s=4)
    assert [one.rank for one in found] == behind
    failure = accusation(found, PLACES)
    assert failure.kind == "hang" and failure.node == node[:1] * 16 and said in failure.reason


def test_hung__where_all_stand_alike_no_machine_is_taken_out() -> None:
    restarts = Restarts(ClusterConfig(max_failures=8), "")
    alike = hung([_pulse(rank, 7, stood=11) for rank in PLACES], start_s=100, hang_s=10, silence_s=4)
    silent = hung([_pulse(rank, 7, stood=12, silent=12) for rank in PLACES], start_s=100, hang_s=10, silence_s=4)
    for found in (alike, silent):
        failure = accusation(found, PLACES)
        assert failure.node == "" and failure.rank is None
        decisions = [restarts.decide(failure, saved=0, nodes=3) for _ in range(BAD_NODE_FAILURES)]
        assert all(one.give_up is None for one in decisions)


def test_restarts__wait_longer_each_time_and_end() -> None:
    restarts = Restarts(ClusterConfig(max_failures=9, restart_delay_s=2.0), "runs/one")
    decisions = [restarts.decide(CRASH, saved=0, nodes=1) for _ in range(10)]
    assert [one.delay_s for one in decisions[:8]] == [0, 2, 4, 8, 16, 32, 64, LONGEST_DELAY_S]
    assert all(one.give_up is None for one in decisions[:9]) and decisions[9].give_up is not None
    said = str(decisions[9].give_up)
    assert "10 times in a row" in said and CRASH.reason in said and "runs/one" in said


def test_restarts__a_new_checkpoint_breaks_the_row() -> None:
    restarts = Restarts(ClusterConfig(max_failures=1), "")
    for saved in (10, 20, 30, 40):
        assert restarts.decide(CRASH, saved=saved, nodes=1) == (1, 0.0, None)
    assert restarts.decide(Failure("resize", "from 2 to 4"), saved=40, nodes=1) == (1, 0.0, None)
    assert restarts.decide(CRASH, saved=40, nodes=1).row == 2


@pytest.mark.parametrize(("names", "nodes", "named"), [("aaa", 2, True), ("aaa", 1, False), ("aba", 2, False)])
def test_restarts__a_bad_machine_is_named_soon(names: str, nodes: int, named: bool) -> None:
    restarts = Restarts(ClusterConfig(max_failures=8), "")
    assert len(names) == BAD_NODE_FAILURES
    for name in names:
        last = restarts.decide(Failure("crash", "dead", name, 0), saved=0, nodes=nodes)
    assert (last.give_up is not None) == named
    assert not named or "machine a" in str(last.give_up)


def test_coordinator__counts_failures_over_a_controllers_death() -> None:
    coordinator = Coordinator(20, Restarts(ClusterConfig(max_failures=2), "runs/one"))
    coordinator.open()
    assert coordinator.follow(CRASH).row == 1
    coordinator.abandon()
    assert coordinator.follow(Failure("controller", "it died")) == (2, 2.0, None)
    assert coordinator.enter()[1] == "restarted: it died"
    assert coordinator.follow(CRASH).give_up is not None and coordinator.situation().over
    assert coordinator.enter()[2] is False
    assert [(note["kind"], note["in_a_row"], note["gave_up"]) for note in coordinator.take().restarts] == [
        ("crash", 1, False), ("controller", 2, False), ("crash", 3, True)]  # fmt: skip


def test_coordinator__tells_a_group_that_was_given_up_to_end() -> None:
    coordinator = Coordinator(0, Restarts(ClusterConfig(), ""))
    coordinator.open()
    group, *_ = coordinator.enter()
    assert coordinator.beat(group, _pulse(0, 7)) == "go" and coordinator.take().pulses
    coordinator.abandon()
    assert coordinator.beat(group, _pulse(0, 8)) == "end" and not coordinator.take().pulses
    coordinator.open()
    assert (
        coordinator.beat(group, _pulse(0, 9)) == "end"
        and coordinator.beat(coordinator.enter()[0], _pulse(0, 7)) == "go"
    )


def _situation(**known: Any) -> Situation:
    places = {rank: WorkerLocation(rank, f"{rank}" * 16, "10.0.0.1", 100 + rank) for rank in (0, 1)}
    return Situation(**{"stopping": False, "over": False, "leaving": "", "blame": None, "places": places, "step": 9,
                        "saved": 6, **known})  # fmt: skip


class Failed(Exception):
    def __init__(self, failures: dict[int, Exception]) -> None:
        self.worker_failures = failures


def test_describe__the_dead_are_to_blame_not_those_that_miss_them() -> None:
    collateral = Failure("crash", "rank 0 on ...: RuntimeError: Connection closed by peer", "0" * 16, 0)
    error = Failed({0: RuntimeError("Connection closed by peer")})
    found = describe(error, _situation(blame=collateral), {1: "its process died"})
    assert found == Failure("crash", "rank 1 on 10.0.0.1 (node 11111111): its process died", "1" * 16, 1)
    assert describe(error, _situation(blame=collateral), {}) == collateral
    hang = Failure("hang", "rank 1", "1" * 16, 1)
    assert describe(error, _situation(blame=hang), {1: "its process died"}) == hang
    assert describe(error, _situation(leaving="spot"), {}).kind == "preemption"
    assert describe(error, _situation(), {}).reason.endswith("Connection closed by peer")
    assert describe(RuntimeError("no"), _situation(), {}).kind == "start"


WATCHDOG = ["what(): [Rank 0] Watchdog caught collective operation timeout", "Fatal Python error: Aborted"]
FAULTY = ["CUDA error: uncorrectable ECC error encountered", "Fatal Python error: Aborted"]


@pytest.mark.parametrize(("dead", "words", "rank", "node"), [
    ({0: "its process died", 1: "its process died"}, {0: WATCHDOG, 1: FAULTY}, 1, "1"),
    ({0: "its process died", 1: "its process died"}, {0: WATCHDOG, 1: WATCHDOG}, 0, ""),  # collateral, both
    ({0: "its process died", 1: "its machine is gone"}, {0: WATCHDOG}, 1, "1"),
    ({0: "its process died"}, {}, 0, "0"),
])  # fmt: skip
def test_describe__of_several_dead_the_one_that_died_of_itself(dead: Any, words: Any, rank: int, node: str) -> None:
    found = describe(Failed({}), _situation(), dead, words)
    assert (found.rank, found.node) == (rank, node * 16)
    assert all(line in found.reason for line in words.get(rank, ()))


@pytest.mark.parametrize(("said", "meant"), [
    ("The actor died because its node has died. Node Id: 3f", "its machine is gone"),
    ("Worker unexpectedly exits with a connection error code 2. (1) killed by OOM killer", "its process died"),
    ("Task was killed due to the node running low on memory.", "Ray killed it for want of memory"),
    ("Worker exits with an exit code 143.", "its process ended with code 143"),
])  # fmt: skip
def test_death__in_words(said: str, meant: str) -> None:
    assert death_in_words(RuntimeError(said)) == meant


def test_coordinator__who_lives_on_in_a_group_that_is_being_ended_never_counts_as_hung() -> None:
    """With NCCL those that waited for a dead rank wait on, and nobody else is left to compare them with."""
    coordinator = Coordinator(0, Restarts(ClusterConfig(), ""))
    coordinator.open()
    group, _, _ = coordinator.enter()
    for rank in range(2):
        coordinator.beat(group, _pulse(rank, 3, stood=99))
    assert len(coordinator.take().pulses) == 2
    coordinator.close()
    assert coordinator.beat(group, _pulse(1, 3, stood=100)) == "go"
    assert not coordinator.take().pulses and coordinator.left()
    coordinator.open()
    group, _, _ = coordinator.enter()
    coordinator.beat(group, _pulse(1, 3))
    assert [pulse.rank for pulse in coordinator.take().pulses] == [1]
