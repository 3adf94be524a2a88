"""A process that is killed in a save, at every moment there is: the checkpoint is complete or absent, and training goes
on to the weights it would have had.

The store of the process that dies kills it with SIGKILL before, in the middle of, or after one of its writes.
"""

import datetime
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from datapipe.storage import Data, open_store
from datapipe.storage.local import LocalStore
from datapipe.storage.store import TEMPORARY
from tests.support.forked import forkserver
from tests.training.checkpoint.toy import make_checkpoints, make_method, make_step, same, tensors
from training.checkpoint import complete, read_marker, verify
from training.core.world import World
from training.engine.param_groups import group_parameters
from training.engine.plain import PlainStepper
from training.engine.settings import OptimisationConfig

STEPS = 4
PATIENCE_S = 300
WHEN = ("before", "half", "after")
WRITES = ("part of 1", "marker of 1", "part of 2", "marker of 2")
"""Of the leading rank, in this order; the others write no markers."""


class DeadlyStore(LocalStore):
    """Kills its process at one of its writes."""

    def __init__(self, path: str, write: int, when: str) -> None:
        super().__init__(path)
        self.left, self.when = write, when

    def replace(self, name: str, data: Data) -> None:
        self._write(name, data, super().replace)

    def put_if_absent(self, name: str, data: Data) -> bool:
        return bool(self._write(name, data, super().put_if_absent))

    def _write(self, name: str, data: Data, write: Callable[[str, Data], bool | None]) -> bool | None:
        self.left -= 1
        if self.left == 0:
            if self.when == "half":
                path = Path(self.address(name))
                path.parent.mkdir(parents=True, exist_ok=True)
                path.with_name(f".{path.name}.1234{TEMPORARY}").write_bytes(bytes(memoryview(data)[: len(data) // 2]))
            if self.when == "after":
                write(name, data)
            os.kill(os.getpid(), signal.SIGKILL)
        return write(name, data)


def _train(folder: str, rank: int, size: int, meeting: str, deadly: tuple[int, int, str]) -> None:
    """Steps with a checkpoint after each, from the last one on. `deadly`: rank, number of its write, when."""
    torch.set_num_threads(1)
    world = World(rank, size, rank, size)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size,
                                timeout=datetime.timedelta(seconds=300))  # fmt: skip
    store = DeadlyStore(folder, *deadly[1:]) if rank == deadly[0] else open_store(folder)
    method = make_method()
    stepper = PlainStepper(method, group_parameters(method), OptimisationConfig(), world)
    checkpoints = make_checkpoints(store, world=world, keep_every_steps=0)
    samples, _ = checkpoints.restore(stepper)
    for step in range(samples // 4 + 1, STEPS + 1):
        make_step(stepper, step)
        checkpoints.save(step, 4 * step, stepper)
    checkpoints.finish(needed=True)


def _run(folder: Path, size: int, deadly: tuple[int, int, str] = (-1, 0, "")) -> list[int | None]:
    """Exit codes of all ranks. When one has died, the others are ended too, as a scheduler does."""
    context = forkserver()
    meeting = folder.with_name(f"{folder.name}-{os.urandom(4).hex()}")
    arguments = [(str(folder), rank, size, str(meeting), deadly) for rank in range(size)]
    processes = [context.Process(target=_train, args=words) for words in arguments]
    for process in processes:
        process.start()
    first = processes[deadly[0]] if deadly[0] >= 0 else processes[0]
    first.join(PATIENCE_S)
    for process in processes:
        if first.exitcode:
            process.kill()
        process.join(PATIENCE_S)
    return [process.exitcode for process in processes]


def _moments(size: int) -> list[Any]:
    every = [(rank, write, when) for rank in range(size) for write in range(1, 5) for when in WHEN]
    return every if size == 1 else every[size - 1 :: 5]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert _run(folder, 1) == [0]
    return tensors(open_store(str(folder)))


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_kill__complete_or_absent_and_bit_identical_after(
    tmp_path: Path, undisturbed: dict[str, torch.Tensor], size: int
) -> None:
    for deadly in _moments(size):
        folder = tmp_path / "-".join(map(str, deadly))
        assert _run(folder, size, deadly)[deadly[0]] == -signal.SIGKILL
        store = open_store(str(folder))
        whole = complete(store)
        for name in whole:
            verify(store, name, read_marker(store, name).files)
        if size == 1:
            assert len(whole) == (deadly[1] - 1 + (deadly[2] == "after")) // 2, deadly
        assert _run(folder, size) == [0] * size
        assert same(undisturbed, tensors(store)), deadly
        assert complete(store) == ["step_0000003", "step_0000004"]
        left = [path for path in folder.rglob("*") if path.is_file()]
        assert len(left) == 2 * (size + 1), f"{deadly} leaves {left}"
