"""From the wish for workers to workers that have met: what is waited for, in words, and when it is hopeless."""

from collections.abc import Mapping
from typing import NamedTuple

from datapipe.core.progress import counted, duration

FIRST_S = 5.0
"""Seconds after which the first line says what is waited for."""
EVERY_S = 30.0
"""Seconds between lines."""
HOPELESS_S = 45.0
"""Seconds that machines may take to join where none that is there could hold a worker, and nothing brings others."""
GROWTH = 1_000_000
"""Bytes read or held that count as progress of a machine: less may come of a process that only waits."""


class Seen(NamedTuple):
    """How a start stands."""

    held: Mapping[str, int] | None
    """Machine -> bytes that its starting processes have read and hold. None: there is no room yet."""
    shortage: str = ""
    """Without room: what is needed, and what there is."""
    hopeless: str = ""
    """Without room: why there can never be any as the cluster is; empty: there can."""


class Verdict(NamedTuple):
    """What follows."""

    line: str = ""
    """For the person who watches; empty: nothing new."""
    error: str = ""
    """Why this start has to be given up; empty: it has not."""


class StartWatch:
    """Tells a start that is slow from one that stands still, or can never come to anything. No clock of its own."""

    def __init__(self, start_s: float) -> None:
        """`start_s`: patience, with room that is not there, and with processes that do not come further."""
        self._start_s = start_s
        self.reset()

    def reset(self) -> None:
        """Workers are up, or new ones are to be started."""
        self._began: float | None = None
        self._since = 0.0
        self._told: float | None = None
        self._before: dict[str, int] | None = None

    def judge(self, seen: Seen, now: float) -> Verdict:
        """To be asked every few seconds. `now`: seconds of any clock."""
        if self._began is None:
            self._began = self._since = now
        if self._came_further(seen):
            self._since = now
        stood_s = now - self._since
        if seen.held is None:
            return self._without_room(seen, now, stood_s)
        machines = counted(len(seen.held), "machine")
        if stood_s > self._start_s:
            return Verdict(error=f"the processes of workers on {machines} have come no further for "
                                 f"{duration(stood_s)}, before anything of this run was asked of them")  # fmt: skip
        total = sum(seen.held.values()) / 1e6
        so_far = f" ({total:,.0f} MB read or held so far)" if total else ""
        return self._line(f"there is room; processes start on {machines}{so_far}", now)

    def _came_further(self, seen: Seen) -> bool:
        """Notes the amounts that count from now on."""
        if seen.held is None:
            lost, self._before = self._before is not None, None
            return lost
        if self._before is None:
            self._before = dict(seen.held)
            return True
        grown = {node for node, amount in seen.held.items() if amount > self._before.get(node, 0) + GROWTH}
        self._before |= {node: seen.held[node] for node in grown}
        return bool(grown)

    def _without_room(self, seen: Seen, now: float, stood_s: float) -> Verdict:
        if seen.hopeless and stood_s > min(HOPELESS_S, self._start_s):
            return Verdict(error=f"no room for workers, and there will be none: {seen.hopeless}")
        if stood_s > self._start_s:
            return Verdict(error=f"no room for workers in {duration(stood_s)}: {seen.shortage}")
        return self._line(seen.hopeless or seen.shortage, now)

    def _line(self, words: str, now: float) -> Verdict:
        assert self._began is not None
        if now - self._began < FIRST_S or (self._told is not None and now - self._told < EVERY_S):
            return Verdict()
        self._told = now
        return Verdict(line=words)
