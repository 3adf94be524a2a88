"""`evaluate` with several weights, data sets or tasks: every cell of the grid, one table, one report."""

import tempfile
from collections.abc import Sequence

import torch

from datapipe.core import cli
from datapipe.core.resource_limits import available_cores
from datapipe.storage import full_url, open_store
from training.commands.arguments import EvaluateCommand
from training.core.devices import choose_device
from training.core.host import LocalHost, exit_code
from training.core.run_folder.lease import lease_on
from training.evaluation import evaluation
from training.grid import dry_run, table
from training.grid.following import Following
from training.grid.local_run import run_here
from training.grid.planning import GridRequest, Planner, WeightsList, open_sets
from training.grid.progress import GridProgress
from training.grid.request import read_recipes
from training.reid.settings import RANDOM
from training.report.report import write_report
from training.weights.safe_load import is_weights_file


def run(chosen: EvaluateCommand, flags: Sequence[str], *, prog: str) -> int:
    """Carry out the grid in this process; the exit code: 0 complete, 1 where a cell failed, 75 or 130 stopped."""
    request = request_of(chosen, flags, prog=prog)
    if chosen.dry_run:
        return show_dry_run(request)
    device = choose_device(chosen.device)
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))  # of quotas PyTorch knows nothing
    with LocalHost(starting=True) as host, lease_on(request.out, request.storage, show_line=host.show_line):
        progress, following = begin(request)
        run_here(progress, following, host, device, follow=chosen.follow)
        return conclude(request, progress, exit_code(host.received) if host.preempted() else cli.COMPLETE)


def request_of(chosen: EvaluateCommand, flags: Sequence[str], *, prog: str) -> GridRequest:
    """What a command line asks for. Raises ConfigError for recipes that fit no task."""
    return GridRequest(
        chosen.named_weights, chosen.named_data, chosen.chosen_tasks, full_url(chosen.out) if chosen.out else "",
        every_checkpoint=chosen.every_checkpoint,
        recipes=tuple(read_recipes(chosen.recipe, chosen.chosen_tasks).items()),
        flags=tuple((kind, tuple(own)) for kind, own in chosen.recipe_flags(flags).items()),
        scoring=chosen.scoring, storage=chosen.storage, prog=prog,
    )  # fmt: skip


def begin(request: GridRequest) -> tuple[GridProgress, Following]:
    """Data sets opened, weights exported, all cells planned and checked: nothing has been scored or trained yet."""
    planner = Planner(request, open_sets(request))
    following = Following(planner, WeightsList(request), runs_of(request), request.storage)
    cells, left_out = following.arrivals()
    progress = GridProgress(open_store(request.out, request.storage))
    progress.add(cells, left_out)
    return progress, following


def runs_of(request: GridRequest) -> list[str]:
    """Addresses of the run folders among the weights."""
    addresses = [full_url(one.address) for one in request.weights if one.address != RANDOM]
    return [one for one in addresses if not is_weights_file(one) and evaluation.is_run(one, request.storage)]


def show_dry_run(request: GridRequest) -> int:
    """Print what there is to do; the grid's folder stays as it is."""
    planner = Planner(request, open_sets(request, shard=False))
    with tempfile.TemporaryDirectory() as scratch:
        weights = WeightsList(request, exports_in=scratch)
        print(dry_run.page(*Following(planner, weights, (), request.storage).arrivals()))
    return cli.COMPLETE


def conclude(request: GridRequest, progress: GridProgress, code: int) -> int:
    """Print the table, write the report; the exit code."""
    print(table.plain(progress.rows()))
    print(open_store(request.out, request.storage).address(f"{table.TABLE}.md"))
    print(write_report(request.out, request.storage))
    return cli.FAILED if code == cli.COMPLETE and progress.failures else code
