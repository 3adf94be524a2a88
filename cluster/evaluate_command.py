"""python -m cluster evaluate: what `python -m training evaluate` does, on Ray; killed and started again it goes on."""

import os
from collections.abc import Sequence
from dataclasses import replace

import tyro

from cluster.in_job import refuse_relative
from cluster.session import LOCAL, chosen_address
from datapipe import command
from datapipe.settings import settings
from datapipe.storage import is_remote
from training.engine.devices import choose_device
from training.evaluate_command import EvaluateCommand as LocalCommand
from training.evaluate_command import conclude, fine_tuning, show, writing, zero_shot_tasks
from training.reid.supervised import RANDOM

PROG = "python -m cluster evaluate"


@settings
class EvaluateCommand(LocalCommand):
    address: str = ""
    """Address of a running cluster. Empty: the one that this process is a job of (RAY_ADDRESS), else a Ray inside this
    process. "local": always the latter."""

    @property
    def places(self) -> dict[str, str]:
        """Every place that is read from or written to, by its flag."""
        found = {"weights": self.weights, "data": self.data, "out": self.out}
        return {name: place for name, place in found.items() if place and (name, place) != ("weights", RANDOM)}


def parse_evaluate(arguments: Sequence[str]) -> tuple[EvaluateCommand, list[str]]:
    """The command, and the flags of a recipe that followed it."""
    chosen, flags = tyro.cli(EvaluateCommand, args=list(arguments), prog=PROG, return_unknown_args=True)
    return chosen, flags


def evaluate(arguments: list[str]) -> int:
    """Score weights by retrieval, as they are or after fine-tuning; killed and started again it goes on."""
    chosen, flags = parse_evaluate(arguments)
    refuse_relative(chosen.places)
    address = chosen_address(chosen.address)
    weights, data, out = (_absolute(chosen.places.get(name, "")) for name in ("weights", "data", "out"))
    chosen = replace(chosen, weights=weights or chosen.weights, data=data, out=out)
    if chosen.task == "supervised":
        from cluster.pretrain_job import run as pretrain

        with writing(chosen, has_workers=True) as lease:
            config = fine_tuning(chosen, flags, prog=PROG)
            code = pretrain(config, address=address, lease=lease)
            return conclude(config) if code == command.COMPLETE else code
    from cluster.evaluate_job import run

    if address == LOCAL:
        choose_device(chosen.device)  # refuses what cannot be before the data is looked through
    print(f"reads the data set {chosen.data}", flush=True)
    return show(chosen, run(zero_shot_tasks(chosen, flags, prog=PROG), address=address, device=chosen.device))


def _absolute(place: str) -> str:
    """Workers run in other folders."""
    return os.path.abspath(place) if place and not is_remote(place) else place
