"""A grid carried out in this process, one cell after another."""

import time

import torch

from training.core.host import LocalHost
from training.grid.carry_out import carry_out
from training.grid.following import EVERY_S, Following
from training.grid.progress import GridProgress

LOOK_S = 0.5
"""Seconds between looks at signals, while there is nothing to do."""


def run_here(
    progress: GridProgress, following: Following, host: LocalHost, device: torch.device, *, follow: bool
) -> None:
    """Carry out all cells, those of later checkpoints too where runs are followed; return when there are none left, or
    once the host was told to stop."""
    over = not follow
    while not host.preempted():
        if follow and following.due:
            over = over or following.over()
            progress.add(*following.arrivals())
        cell = progress.next()
        if cell is None:
            if over:
                return
            _pause(host)
            continue
        progress.begin(cell)
        host.starting = True  # until its first step there is nothing to save
        try:
            result = carry_out(cell, host, device=device)
        except Exception as error:  # of any type: it costs its cell alone
            progress.failed(cell, error)
            continue
        if result is None:
            progress.stopped(cell)
            return
        progress.complete(cell, result)


def _pause(host: LocalHost) -> None:
    for _ in range(max(1, int(EVERY_S / LOOK_S))):
        if host.preempted():
            return
        time.sleep(LOOK_S)
