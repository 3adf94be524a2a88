"""python -m training embed: features of all images of a data set in one parquet file."""

import torch

from datapipe.core import cli
from datapipe.core.parallel import Workers
from datapipe.core.progress import counted
from datapipe.core.resource_limits import available_cores
from training.commands.arguments import EmbedCommand
from training.core.devices import choose_device
from training.evaluation.embedding import EmbedPlan, EmbedRequest, carry_out, embed_piece, plan


def run(chosen: EmbedCommand) -> int:
    """Embed in this process; started again after a kill, it goes on."""
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))  # of quotas PyTorch knows nothing
    device = choose_device(chosen.device)
    planned = planning(chosen)
    if planned is None:
        return cli.COMPLETE
    return conclude(chosen, carry_out(planned, Workers(1), embed_piece, device))


def planning(chosen: EmbedCommand) -> EmbedPlan | None:
    """What there is to do, after all that can be wrong before that; None, and a line: nothing."""
    print(f"reads the weights {chosen.weights} and the data set {chosen.data}", flush=True)
    request = EmbedRequest(
        weights=chosen.weights, data=chosen.data, storage=chosen.storage, feature=chosen.feature, dtype=chosen.dtype,
        batch=chosen.embed_batch, threads=chosen.threads, precision=chosen.precision,
    )  # fmt: skip
    planned = plan(request, chosen.out, data_name=chosen.data_name, allow_partial=chosen.allow_partial)
    if planned is None:
        print(f"already complete: {chosen.out}")
        return None
    weights, header = planned.header["weights"], planned.header
    print(f"embeds {counted(planned.data.images, 'image')} by {weights['name']}: {header['feature']}, "
          f"{counted(header['channels'], 'number')} each, {header['dtype']}", flush=True)  # fmt: skip
    return planned


def conclude(chosen: EmbedCommand, rows: int) -> int:
    """Say what was made."""
    print(f"{counted(rows, 'row')}\n{chosen.out}")
    return cli.COMPLETE
