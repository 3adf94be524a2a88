"""When workers are started anew, after how long, and when a run gives up: decisions, and nothing else."""

from typing import Literal, NamedTuple

from datapipe.core.errors import ClusterError
from training.config.cluster import ClusterConfig

Kind = Literal["crash", "hang", "start", "preemption", "resize", "controller", "driver"]
"""Why workers were started anew. "start": they did not come up; "controller": Ray Train's, which they live by, died;
"driver": the command itself was run again."""

HISTORY = "restarts.jsonl"
"""In the run folder: each restart of the workers and of the driver with its reason, and how each driver ended."""
END = "end"
"""The kind of a record that tells how a driver ended: complete, stopped, failed."""
LONGEST_DELAY_S = 120.0
BAD_NODE_FAILURES = 3
"""Failures in a row on one machine of several after which it is the machine's fault."""


class Failure(NamedTuple):
    """An end of the workers that the run survives."""

    kind: Kind
    reason: str
    """One line for a person, with rank and machine where they are known."""
    node: str = ""
    """Id of the machine that is to blame; empty where none is."""
    rank: int | None = None


class Decision(NamedTuple):
    """What follows a failure."""

    row: int
    """Failures in a row without a new checkpoint between them, this one included."""
    delay_s: float
    give_up: ClusterError | None = None


class Restarts:
    """Counts failures in a row. A new checkpoint between two of them breaks the row: the run gets on."""

    def __init__(self, config: ClusterConfig, out: str) -> None:
        self._config, self._out = config, out
        self._row: list[Failure] = []
        self._saved = -1

    def decide(self, failure: Failure, *, saved: int, nodes: int) -> Decision:
        """`saved`: step of the newest checkpoint, 0 without one; `nodes`: machines that workers were on."""
        if saved > self._saved:
            self._row.clear()
        self._saved = saved
        if failure.kind == "resize":
            return Decision(len(self._row), 0.0)
        self._row.append(failure)
        row = len(self._row)
        bad = self._bad_node() if nodes > 1 else None
        if bad is not None or row > self._config.max_failures:
            return Decision(row, 0.0, self._error(failure, bad))
        doubled = self._config.restart_delay_s * 2 ** (row - 2) if row > 1 else 0.0
        return Decision(row, min(doubled, LONGEST_DELAY_S))

    def _bad_node(self) -> str | None:
        last = {failure.node for failure in self._row[-BAD_NODE_FAILURES:]}
        return last.pop() or None if len(self._row) >= BAD_NODE_FAILURES and len(last) == 1 else None

    def _error(self, failure: Failure, bad: str | None) -> ClusterError:
        row, again = len(self._row), "the same command again goes on from the last checkpoint"
        if bad is not None:
            return ClusterError(
                f"workers fail again and again on one machine, {BAD_NODE_FAILURES} times in a row; last: "
                f"{failure.reason}", where=f"machine {bad}", hint=f"take it out of the cluster; {again}",
            )  # fmt: skip
        return ClusterError(
            f"the workers failed {row} times in a row without a new checkpoint; last: {failure.reason}",
            where=self._out, hint=f"see restarts.jsonl and ranks/ in the run folder; mended, {again}",
        )  # fmt: skip
