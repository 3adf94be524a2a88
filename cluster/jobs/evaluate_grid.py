"""A grid of evaluations on Ray: each cell is a task with a device of its own, started again alone where its worker or
machine is lost, from its own checkpoint."""

import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from cluster.core.arguments import EvaluateJob
from cluster.core.devices import Kind, own_device
from cluster.core.ray_workers import refuse_unseen
from cluster.core.session import prepare, result
from cluster.core.shared_paths import Witness
from cluster.jobs.pieces import devices_of
from datapipe.core import cli
from training.commands.evaluate_grid import begin, conclude, request_of, show_dry_run
from training.core.host import Doing, LocalHost, exit_code
from training.core.run_folder.lease import lease_on
from training.grid.carry_out import carry_out
from training.grid.cells import Cell
from training.grid.following import Following
from training.grid.progress import GridProgress

POLL_S = 1.0
"""Seconds between looks for lines of tasks, signals and new checkpoints."""
LOST_WORKERS = 10
"""Times that Ray starts a cell again whose worker or machine was lost; each goes on from its last checkpoint."""


def evaluate_grid(chosen: EvaluateJob, flags: Sequence[str], *, address: str, prog: str) -> int:
    """Carry out a grid with all devices of a cluster; the exit code.

    The first signal lets every cell that trains save, and those that are being scored come to their end; where none
    trains yet, and at a second signal, everything ends at once.
    """
    request = request_of(chosen, flags, prog=prog)
    if chosen.dry_run:
        return show_dry_run(request)
    with LocalHost(starting=True) as host, lease_on(request.out, request.storage, show_line=host.show_line):
        progress, following = begin(request)
        weights = {cell.weights.start for cell in progress.cells} - {""}
        read = sorted(weights | {cell.data.url for cell in progress.cells})
        with devices_of(address, chosen.device, written=request.out, read=read) as (workers, kind):
            driver = _Driver(progress, following, host, kind, workers.seen, follow=chosen.follow)
            driver.carry_out()
        return conclude(request, progress, exit_code(host.received) if host.preempted() else cli.COMPLETE)


class _Driver:
    """Hands cells to Ray as they may begin, and takes what comes of them."""

    def __init__(
        self, progress: GridProgress, following: Following, host: LocalHost, kind: Kind, seen: tuple[Witness, ...], *,
        follow: bool,
    ) -> None:  # fmt: skip
        import ray

        self._progress, self._following, self._host, self._kind, self._seen = progress, following, host, kind, seen
        self._over = not follow
        self._post: Any = ray.remote(num_cpus=0)(Post).remote()
        self._running: dict[Any, Cell] = {}
        self._told = False

    def carry_out(self) -> None:
        """Until no cell is left, or all that were under way have saved after a signal."""
        import ray

        while True:
            self._pass_on()
            if not self._host.preempted():
                self._arrive()
                while (cell := self._progress.next()) is not None:
                    self._progress.begin(cell)
                    self._running[self._task(cell)] = cell
            if not self._running:
                if self._over or self._host.preempted():
                    return
                time.sleep(POLL_S)
                continue
            done, _ = ray.wait(list(self._running), num_returns=1, timeout=POLL_S)
            for reference in done:
                self._end(self._running.pop(reference), reference)

    def _task(self, cell: Cell) -> Any:
        import ray

        cpus = min(cell.config.cluster.cpus_per_worker, _most_cpus()) if cell.config else 1
        remote = ray.remote(num_cpus=cpus, num_gpus=1 if self._kind == "cuda" else 0, max_retries=LOST_WORKERS,
                            max_calls=1, scheduling_strategy="SPREAD")(_carry_out)  # fmt: skip
        return remote.remote(cell, self._kind, max(1, int(cpus)), self._seen, self._post)

    def _end(self, cell: Cell, reference: Any) -> None:
        try:
            came_of_it = result(reference)
        except Exception as error:  # a task's own, of any type: it costs its cell alone
            self._progress.failed(cell, error)
            return
        if came_of_it is None:
            self._progress.stopped(cell)
        else:
            self._progress.complete(cell, came_of_it)

    def _arrive(self) -> None:
        if not self._over and self._following.due:
            self._over = self._following.over()
            self._progress.add(*self._following.arrivals())

    def _pass_on(self) -> None:
        """Lines of tasks to the terminal, our stop word to them."""
        import ray

        lines, self._host.starting = ray.get(self._post.take.remote())
        for line in lines:
            print(line, file=sys.stderr, flush=True)
        if self._host.preempted() and not self._told:
            self._told = True
            self._post.stop.remote()


class Post:
    """Between the driver and its tasks: lines to show, and the word to stop; an actor."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._stop = False
        self._training: set[str] = set()

    def show_line(self, cell: str, line: str) -> None:
        """A line of a cell."""
        self._lines.append(f"{cell}: {line}")

    def stepping(self, cell: str) -> None:
        """A cell trains: there is something to save."""
        self._training.add(cell)

    def take(self) -> tuple[list[str], bool]:
        """The lines since the last call, and whether no cell trains yet."""
        lines, self._lines = self._lines, []
        return lines, not self._training

    def stop(self) -> None:
        """Have all tasks save and end."""
        self._stop = True

    def stopped(self) -> bool:
        """Are they to?"""
        return self._stop


class CellHost:
    """The host of a cell in a worker of Ray: its lines go to the driver, and the driver's word to stop is heard."""

    def __init__(self, cell: str, post: Any) -> None:
        self._cell, self._post = cell, post
        self._stop, self._ended = threading.Event(), threading.Event()
        threading.Thread(target=self._listen, name="stop word", daemon=True).start()

    def _listen(self) -> None:
        import ray

        while not self._ended.wait(POLL_S):
            try:
                if ray.get(self._post.stopped.remote()):
                    self._stop.set()
                    return
            except ray.exceptions.RayError:
                return  # the driver is gone, and Ray ends this process

    def close(self) -> None:
        """Listen no more."""
        self._ended.set()

    def place(self) -> str:
        import ray

        return ray.util.get_node_ip_address()

    def alive(self, step: int, doing: Doing) -> None:
        """Nobody watches."""

    def launched(self, step: int, doing: Doing, reached: Any) -> None:
        """Nobody watches."""

    def stepping(self) -> None:
        self._post.stepping.remote(self._cell)

    def preempted(self) -> bool:
        return self._stop.is_set()

    def saved(self, step: int) -> None:
        """Nobody else needs to know."""

    def show_line(self, line: str) -> None:
        self._post.show_line.remote(self._cell, line)


def _carry_out(cell: Cell, kind: Kind, threads: int, seen: tuple[Witness, ...], post: Any) -> dict[str, Any] | None:
    """One cell, in a worker process."""
    prepare()
    os.environ["REID_ENTRY"] = "cluster"
    import torch

    from datapipe.core.process_setup import numbers_in_environment

    refuse_unseen(seen)
    host = CellHost(cell.folder, post)
    if kind == "cpu":
        torch.set_num_threads(threads)
        if cell.config is not None and not cell.config.engine.threads:
            engine = replace(cell.config.engine, threads=threads)
            cell = replace(cell, config=replace(cell.config, engine=engine))
    try:
        with numbers_in_environment():
            return carry_out(cell, host, device=own_device(kind), threads=threads)
    finally:
        host.close()


def _most_cpus() -> float:
    """CPUs of the largest machine of the cluster."""
    import ray

    return max((node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]), default=1.0)
