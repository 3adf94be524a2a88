"""In Ray Train's controller: why workers ended, whether and when they begin again, and room made for a new size."""

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayActorError

from cluster.core.ray_internals import train_internals
from cluster.train.coordinator import Leaving, Situation, find_coordinator
from cluster.train.rendezvous import ask_workers
from cluster.train.room import give_back
from cluster.train.watch.restart_policy import Failure
from datapipe.core.errors import ClusterError, StorageError
from datapipe.core.progress import counted
from training.config.run_config import RunConfig
from training.core.run_folder import crash_log
from training.core.run_folder.run_folder import RunFolder

POLL_S = 0.2
ANSWER_S = 2.0
"""Seconds for a living worker to answer."""
WORDS_S = 10.0
"""Seconds for the last words of a dead process to arrive."""
MOST_CHARACTERS = 400
_Internals = train_internals()
GONE, MUTE = "its machine is gone", "does not answer"
_DEATHS = (
    (r"its node has died|node was terminated|node failure", GONE),
    (r"running low on memory", "Ray killed it for want of memory"),
    (r"exit code (\d+)", "its process ended with code {}"),
)
"""What Ray says of a dead worker, and what that means, the most telling first."""
_ABSENT = re.compile(r"ModuleNotFoundError: No module named '([\w.]+)'\Z")
_ADDRESS = re.compile(r"\bip=([\w.:]+)")
"""In what Ray says of a task that failed."""
MEANINGS = tuple(meaning for _, meaning in _DEATHS[:2])
_COLLATERAL = re.compile(r"watchdog|collective.*time|timed out|remote process|connection (closed|reset)|peer", re.I)
_OWN_FAULT = re.compile(r"CUDA error|CUDA_ERROR|Xid|\bECC\b|Segmentation fault|out of memory", re.I)
"""Last words of who died for want of another rank, and of who died of itself."""


class Over(Exception):
    """Ends Ray Train's run. What there is to say is on the coordinator."""


class RestartPolicy(_Internals.controller_callback):  # type: ignore[name-defined]
    """Ray Train restarts without end; this decides when it ends, and waits before it begins again."""

    def __init__(self, coordinator: str, config: RunConfig) -> None:
        self._name, self._config, self._run = coordinator, config.cluster, config

    @property
    def _coordinator(self) -> Any:
        return find_coordinator(self._name)

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        if isinstance(current_state, _Internals.resizing):
            self._make_room(current_state.scaling_decision.num_workers)
        elif isinstance(current_state, _Internals.restarting):
            self._judge(current_state.training_failed_error)
        elif isinstance(current_state, _Internals.rescheduling):
            self._judge(current_state.training_failed_error, came_up=False)

    def _make_room(self, workers: int) -> None:
        """Let the workers save before Ray ends them for a new size."""
        before = len(ray.get(self._coordinator.situation.remote()).places)
        reason = f"from {before} to {counted(workers, 'worker')}, as there is room" if workers > before else (
            f"from {before} to {counted(workers, 'worker')}, as there is no more room")  # fmt: skip
        ray.get(self._coordinator.leave.remote(reason))
        end = time.monotonic() + self._config.hang_timeout_s
        while time.monotonic() < end and not ray.get(self._coordinator.left.remote()):
            time.sleep(POLL_S)
        self._follow(Failure("resize", reason))

    def _judge(self, error: Exception, *, came_up: bool = True) -> None:
        cause = getattr(error, "controller_failure", error)
        situation = self._situation(cause)
        if situation.stopping or situation.over:
            raise Over
        if isinstance(cause, _Internals.no_room):
            return  # the driver sees to how long
        if not came_up and (lack := lacking(cause)) is not None:
            ray.get(self._coordinator.fail.remote(lack))
            raise Over
        dead = self._dead()
        failure = describe(cause, situation, dead, self._words(situation, dead))
        if not came_up:
            give_back()  # Ray Train keeps the room of a group that it could not start
        self._follow(failure)

    def _words(self, situation: Situation, dead: Mapping[int, str]) -> dict[int, list[str]]:
        """What the dead wrote on stderr before they died, as their children leave it in the run folder, which may take
        a moment. Of a machine that is gone nothing comes."""
        if situation.blame is not None and situation.blame.kind == "hang":
            return {}
        storage = replace(self._run.storage, give_up_s=WORDS_S, attempts=3)
        missing = {rank for rank, what in dead.items() if what not in (GONE, MUTE) and rank in situation.places}
        words_of_rank: dict[int, list[str]] = {}
        end = time.monotonic() + WORDS_S
        with contextlib.suppress(StorageError):
            while missing and time.monotonic() < end:
                time.sleep(POLL_S)
                for rank in sorted(missing):
                    log = RunFolder(self._run.out, storage).read_text(f"ranks/rank_{rank:02d}.log") or ""
                    words = crash_log.of_process(log, situation.places[rank].pid)
                    if words is not None:
                        missing.discard(rank)
                        words_of_rank[rank] = crash_log.relevant_lines(words)
        return words_of_rank

    def _situation(self, cause: Exception) -> Situation:
        """How all stands. Where workers left, one of them knows why, and may be about to say so."""
        failures = getattr(cause, "worker_failures", {}).values()
        left = any(isinstance(failure, Leaving) for failure in failures)
        end = time.monotonic() + ANSWER_S
        while True:
            situation: Situation = ray.get(self._coordinator.situation.remote())
            if situation.leaving or situation.stopping or not left or time.monotonic() > end:
                return situation
            time.sleep(POLL_S)

    def _follow(self, failure: Failure) -> None:
        decision = ray.get(self._coordinator.follow.remote(failure))
        if decision.give_up is not None:
            raise Over
        self._wait(decision.delay_s)

    def _dead(self) -> dict[int, str]:
        """The ranks whose processes are gone, and how they ended. Those that live fail for want of them, and often say
        so first."""
        rank_of_answer = ask_workers()
        ray.wait(list(rank_of_answer), num_returns=len(rank_of_answer), timeout=ANSWER_S) if rank_of_answer else None
        dead = {}
        for answer, rank in rank_of_answer.items():
            try:
                ray.get(answer, timeout=0)
            except (RayActorError, OutOfMemoryError) as death:  # the latter where Ray's memory monitor killed it
                dead[rank] = death_in_words(death)
            except GetTimeoutError:
                dead[rank] = MUTE
        return dead

    def _wait(self, delay_s: float) -> None:
        end = time.monotonic() + delay_s
        while time.monotonic() < end:
            if ray.get(self._coordinator.situation.remote()).stopping:
                raise Over
            time.sleep(POLL_S)


def describe(
    error: Exception,
    situation: Situation,
    dead: Mapping[int, str],
    words: Mapping[int, Sequence[str]] = {},  # noqa: B006
) -> Failure:
    """Who is to blame, in words: whoever hung, else whose process died, else who said first that it failed.

    `dead`: rank -> how its process ended; `words`: rank -> the most telling of its last words.
    """
    if situation.leaving:
        return Failure("preemption", situation.leaving)
    blame = situation.blame
    if blame is not None and (blame.kind in ("hang", "start") or not dead):
        return blame
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    if not dead and not failures:
        return Failure("start", f"workers did not come up: {_first_line(error)}")
    failed_ranks = _first_dead(dead, words) if dead else [min(failures)]
    rank = failed_ranks[0]
    what = dead[rank] if dead else _first_line(failures[rank])
    last_words = f"; its last words: {' / '.join(words[rank])[:MOST_CHARACTERS]}" if words.get(rank) else ""
    place = situation.places.get(rank)
    where = f" on {place.name}" if place else ""
    nodes = {situation.places[one].node for one in failed_ranks if one in situation.places}
    node = nodes.pop() if len(nodes) == 1 else ""  # several machines: none of them is known to have failed
    return Failure("crash", f"rank {rank}{where}: {what}{last_words}", node, rank)


def lacking(error: BaseException) -> ClusterError | None:
    """What to tell where workers did not come up as a package is absent on their machine; None: it was not that."""
    told = [str(error)]
    while error.__cause__ is not None:
        error = error.__cause__
        told.append(str(error))
    absent = next(filter(None, (_ABSENT.search(text.rstrip()) for text in told)), None)
    if absent is None:
        return None
    where = _ADDRESS.search("\n".join(told))
    return ClusterError(
        f"a machine of the cluster has no Python package {absent[1]}, or another version of it",
        where=f"machine {where[1]}" if where else "",
        hint="install the same everywhere, or bring it along: cluster/docs/machines.md; `python -m cluster submit` "
             "brings our own code",
    )  # fmt: skip


def _first_dead(dead: Mapping[int, str], words: Mapping[int, Sequence[str]]) -> list[int]:
    """The ranks that may have died first. With NCCL the others' watchdogs end their processes soon after, saying so."""

    def order(rank: int) -> tuple[int, bool]:
        text = " ".join(words.get(rank, ()))
        how = MEANINGS.index(dead[rank]) if dead[rank] in MEANINGS else len(MEANINGS)
        return how, bool(_COLLATERAL.search(text)) and not _OWN_FAULT.search(text)

    least = min(map(order, dead))
    return sorted(rank for rank in dead if order(rank) == least)


def death_in_words(death: Exception) -> str:
    """How a worker's process came to its end."""
    for pattern, meaning in _DEATHS:
        if matched := re.search(pattern, str(death), re.IGNORECASE):
            return meaning.format(*matched.groups())
    return "its process died"


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
