"""Which workers hang: the decision, from what ranks tell of themselves, and the blow."""

import contextlib
import os
import signal
from collections.abc import Sequence
from typing import Any, NamedTuple

from training.engine.host import Doing

ORDER: tuple[Doing, ...] = ("data", "forward", "backward")
"""How far in a step. From "backward" on a rank may be waiting for the others."""


class Pulse(NamedTuple):
    """How far a rank is, by its own words, and how long ago that was."""

    rank: int
    step: int
    """Steps done."""
    doing: Doing
    stood_s: float
    """Since it last came further."""
    silent_s: float
    """Since its process last said anything."""
    begun: bool
    """Has it made a step in this attempt?"""


class Hung(NamedTuple):
    """A rank that will not come further by itself."""

    rank: int
    reason: str


def hung(pulses: Sequence[Pulse], *, start_s: float, hang_s: float, silence_s: float) -> list[Hung]:
    """The ranks to end, worst first; none while all is well. `start_s`: patience until every rank has made a step.

    A process that is stopped falls silent, and is meant after `silence_s`; where all are silent it may be their
    listener that was away, and they have `hang_s`. A thread that is stuck does not silence its process: nobody comes
    further, as the others wait for it, and after `hang_s` those that are furthest behind are meant; all of them where
    they stand at the same place.
    """
    begun = bool(pulses) and all(pulse.begun for pulse in pulses)
    patience = hang_s if begun else start_s
    heard = any(pulse.silent_s <= silence_s for pulse in pulses)
    longest = min(silence_s, patience) if begun and heard else patience
    silent = [pulse for pulse in pulses if pulse.silent_s > longest]
    if silent:
        return [Hung(one.rank, f"no sign of life for {one.silent_s:.0f} s after step {one.step}") for one in silent]
    if not pulses or any(pulse.stood_s <= patience for pulse in pulses):
        return []
    least = min(map(_place, pulses))
    return [Hung(pulse.rank, f"stood still in step {pulse.step + 1} ({pulse.doing}) for {pulse.stood_s:.0f} s")
            for pulse in pulses if _place(pulse) == least]  # fmt: skip


def _place(pulse: Pulse) -> tuple[int, int]:
    return pulse.step, ORDER.index(pulse.doing)


def end_process(node: str, pid: int) -> Any:
    """SIGKILL a worker by its pid on its machine; returns at once."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(_kill).options(scheduling_strategy=there).remote(pid)


def _kill(pid: int) -> None:
    """Only a process that is Ray's: the number may have gone to another one."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        if file.read().startswith(b"ray::"):
            os.kill(pid, signal.SIGKILL)
