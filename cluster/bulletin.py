"""The board on which driver and workers leave each other notes: status lines, the stop word, a fatal mistake."""

import threading
import uuid
from typing import Any, NamedTuple

import ray
from ray import train

from datapipe.errors import UserError

POLL_S = 1.0
NAMESPACE = "reid"


class Notes(NamedTuple):
    """What the driver takes from the board."""

    lines: list[str]
    failure: UserError | None
    ending: tuple[int, bool] | None


class Board:
    """State of the board; runs as an actor that lives as long as the driver."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._stopped = False
        self._failure: UserError | None = None
        self._ending: tuple[int, bool] | None = None
        self._starts = 0

    def say(self, line: str) -> None:
        self._lines.append(line)

    def stop(self) -> None:
        self._stopped = True

    def stopping(self) -> bool:
        return self._stopped

    def fail(self, failure: UserError) -> None:
        """A mistake that no restart mends. The first one stays."""
        self._failure = self._failure or failure

    def failed(self) -> bool:
        return self._failure is not None

    def end(self, step: int, complete: bool) -> None:
        self._ending = step, complete

    def start(self) -> int:
        """Number of times that the workers were started, this one included."""
        self._starts += 1
        return self._starts

    def take(self) -> Notes:
        """Lines since the last call, and how the run failed or ended if it did."""
        lines, self._lines = self._lines, []
        return Notes(lines, self._failure, self._ending)


def open_board() -> tuple[str, Any]:
    """(name, actor handle) of a fresh board."""
    name = f"board-{uuid.uuid4().hex[:12]}"
    return name, ray.remote(num_cpus=0)(Board).options(name=name, namespace=NAMESPACE).remote()


class RayHost:
    """A worker's host: hears the stop word and preemption notices, and writes to the board."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._stopped = threading.Event()
        threading.Thread(target=self._listen, name="stop word", daemon=True).start()

    def _listen(self) -> None:
        while not self._stopped.wait(POLL_S):
            try:
                if ray.get(self._board.stopping.remote()):
                    self._stopped.set()
            except (ray.exceptions.RayError, RuntimeError):
                return  # the driver is gone, and this process will be ended with it

    def preempted(self) -> bool:
        return self._stopped.is_set()

    def saved(self, step: int) -> None:
        train.report({"step": step})

    def say(self, line: str) -> None:
        self._board.say.remote(line)
