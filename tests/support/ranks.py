"""Run a function in several real processes that share a gloo process group on loopback."""

import datetime
import os
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from tests.support.forked import call, forkserver
from training.core.world import World

TIMEOUT_S = 300


def run_ranks(count: int, function: Callable[..., Any], *arguments: Any, fresh: bool = False) -> list[Any]:
    """`function(world, *arguments)` in `count` processes; their picklable results by rank. A failure is raised here.
    `fresh`: processes that have imported nothing yet, as those of users."""
    method = "spawn" if fresh else forkserver().get_start_method()
    with tempfile.TemporaryDirectory() as folder:
        start = (dict(os.environ), count, folder, function, arguments)
        multiprocessing.start_processes(_start, args=start, nprocs=count, start_method=method)
        found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]
    return found


def exit_codes(count: int, function: Callable[..., Any], *arguments: Any) -> list[int | None]:
    """How each process ended, of ranks some of which end before their time; whoever is first to end."""
    with tempfile.TemporaryDirectory() as folder:
        start = (dict(os.environ), count, folder, function, arguments)
        ranks = [forkserver().Process(target=_start, args=(rank, *start)) for rank in range(count)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(TIMEOUT_S)
            process.kill()
            process.join()
        return [process.exitcode for process in ranks]


def _start(rank: int, environment: dict[str, str], *rest: Any) -> None:
    call(environment, _rank, rank, *rest)


def _rank(rank: int, count: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=count,
        timeout=datetime.timedelta(seconds=TIMEOUT_S),
    )
    try:
        result = function(World(rank, count, rank, count), *arguments)
        torch.save(result, Path(folder) / f"{rank}.pt")
    except Exception:
        traceback.print_exc()
        raise
    finally:
        dist.destroy_process_group()
