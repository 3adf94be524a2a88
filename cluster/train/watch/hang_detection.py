"""Decides from heartbeats which workers hang, and kills them."""

import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from cluster.train.watch.restart_policy import Failure
from training.core.host import Doing

ORDER: tuple[Doing, ...] = ("data", "forward", "backward")
"""How far in a step. From "backward" on a rank may be waiting for the others."""


class Pulse(NamedTuple):
    """How far a rank is, by its own words, and how long ago that was."""

    rank: int
    step: int
    """Steps done."""
    doing: Doing
    stood_s: float
    """Since it last came further; before the first step also since it last imported or read anything."""
    silent_s: float
    """Since its process last said anything."""
    begun: bool
    """Has it made a step in this attempt?"""
    marks: int = 0
    """Places passed in this step."""
    so_far: str = ""
    """Before the first step: what it has imported and read."""

    @property
    def place(self) -> tuple[int, int, int]:
        """How far it is, to be compared with the others."""
        return self.step, self.marks, ORDER.index(self.doing)


class Hung(NamedTuple):
    """A rank that will not come further by itself."""

    rank: int
    reason: str
    behind: bool = True
    """False: it stands where all stand, and nothing tells which of them is to blame."""


def hung(pulses: Sequence[Pulse], *, start_s: float, hang_s: float, silence_s: float) -> list[Hung]:
    """The ranks to end, worst first; none while all is well. `start_s`: patience until every rank has made a step, with
    ranks that neither come further nor import or read anything: a slow start is none that hangs.

    A process that is stopped falls silent, and is meant after `silence_s`; where all are silent it may be their
    listener that was away, and they have `hang_s`. A thread or a GPU that is stuck does not silence its process: nobody
    comes further, as the others wait for it, and after `hang_s` those that are furthest behind are meant. Where all
    stand at the same place all are ended, and none of them is to blame.
    """
    begun = bool(pulses) and all(pulse.begun for pulse in pulses)
    patience = hang_s if begun else start_s
    heard = any(pulse.silent_s <= silence_s for pulse in pulses)
    longest = min(silence_s, patience) if begun and heard else patience
    silent = [pulse for pulse in pulses if pulse.silent_s > longest]
    if silent:
        some = len(silent) < len(pulses) or len(pulses) == 1
        return [Hung(one.rank, f"no sign of life for {one.silent_s:.0f} s after step {one.step}", some)
                for one in silent]  # fmt: skip
    if not pulses or any(pulse.stood_s <= patience for pulse in pulses):
        return []
    least = min(pulse.place for pulse in pulses)
    behind = [pulse for pulse in pulses if pulse.place == least]
    if len(behind) == len(pulses) > 1:
        one = min(pulses, key=lambda pulse: pulse.stood_s)
        what = f"all ranks stand at step {one.step + 1} ({_doing(one)}) for {one.stood_s:.0f} s; nobody is behind"
        return [Hung(pulse.rank, what, behind=False) for pulse in pulses]
    return [Hung(pulse.rank, f"stood still in step {pulse.step + 1} ({_doing(pulse)}) for {pulse.stood_s:.0f} s")
            for pulse in behind]  # fmt: skip


def _doing(pulse: Pulse) -> str:
    return f"starting: {pulse.so_far}" if pulse.so_far else pulse.doing


def slow_start(pulses: Sequence[Pulse], places: Mapping[int, Any], *, after_s: float) -> str:
    """A line on the rank that has stood still for longest before its first step, for more than `after_s`; empty: none
    has. Told long before it counts as hung."""
    waiting = [pulse for pulse in pulses if not pulse.begun and pulse.so_far and pulse.stood_s > after_s]
    if not waiting:
        return ""
    worst = max(waiting, key=lambda pulse: pulse.stood_s)
    where = f" on {places[worst.rank].name}" if worst.rank in places else ""
    others = f"; so have {len(waiting) - 1} others" if len(waiting) > 1 else ""
    return (f"rank {worst.rank}{where} has come no further with its start for {worst.stood_s:.0f} s "
            f"({worst.so_far}){others}")  # fmt: skip


def accusation(hanging: Sequence[Hung], places: Mapping[int, Any]) -> Failure:
    """What a hang is put down to. A machine is named where all ranks that are behind are on it, and others are not
    behind: what is counted against a machine must be its own."""
    first = hanging[0]
    if not first.behind:
        return Failure("hang", first.reason)
    known = [places[one.rank] for one in hanging if one.rank in places]
    nodes = {place.node for place in known}
    where = f" on {places[first.rank].name}" if first.rank in places else ""
    also = f"; so did ranks {', '.join(str(one.rank) for one in hanging[1:])}" if hanging[1:] else ""
    return Failure("hang", f"rank {first.rank}{where}: {first.reason}{also}", nodes.pop() if len(nodes) == 1 else "",
                   first.rank)  # fmt: skip


def end_process(node: str, pid: int) -> Any:
    """SIGKILL a worker by its pid on its machine; returns at once."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    on_node = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0, max_retries=0)(_kill).options(scheduling_strategy=on_node).remote(pid)


def _kill(pid: int) -> None:
    """Only a process that is Ray's: the number may have gone to another one."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        if file.read().startswith(b"ray::"):
            os.kill(pid, signal.SIGKILL)
