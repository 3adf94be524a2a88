"""Embedding on Ray: what `python -m training embed` does, with a task for each piece of the data set; what is finished
stays, so that killed and started again it goes on."""

from dataclasses import replace

from cluster.core.arguments import EmbedJob
from cluster.core.devices import Kind, own_device
from cluster.core.job_paths import refuse_relative
from cluster.core.session import LOCAL, chosen_address
from cluster.jobs.pieces import begin_piece, devices_of
from datapipe.core import cli
from datapipe.core.process_setup import numbers_in_environment
from datapipe.storage import full_url
from training.commands.embed import conclude, planning
from training.core.devices import choose_device
from training.evaluation.embedding import EmbedTask, carry_out, embed_piece


def embed(chosen: EmbedJob) -> int:
    """Embed with all devices of a cluster; the exit code."""
    refuse_relative(chosen.places)
    address = chosen_address(chosen.address or "")
    weights, data, out = map(full_url, (chosen.weights, chosen.data, chosen.out))
    chosen = replace(chosen, weights=weights, data=data, out=out)
    if address == LOCAL:
        choose_device(chosen.device)  # refuses what cannot be before the data set is looked through
    planned = planning(chosen)
    if planned is None:
        return cli.COMPLETE
    read = [chosen.data, planned.request.weights]
    with devices_of(address, chosen.device, written=planned.files.beside.url, read=read) as (workers, kind):
        rows = carry_out(planned, workers, _embed_piece, kind)
    return conclude(chosen, rows)


def _embed_piece(task: EmbedTask, kind: Kind) -> int:
    begin_piece(kind)
    with numbers_in_environment():
        return embed_piece(task, own_device(kind))
