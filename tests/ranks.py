"""Run a function in several real processes that share a gloo process group on loopback."""

import datetime
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from training.engine.world import World

TIMEOUT_S = 300


def run_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(world, *arguments)` in `count` processes; their picklable results by rank. A failure is raised here."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.start_processes(
            _rank, args=(count, folder, function, arguments), nprocs=count, start_method="spawn"
        )
        found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(count)]
    return found


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
