"""Catastrophic forgetting scores on Ray, with a task for each piece of a shard; what is finished stays, so that killed
and started again it goes on."""

from cluster.core.arguments import ScoreCfsJob
from cluster.core.devices import Kind, own_device
from cluster.core.job_paths import refuse_relative
from cluster.core.session import LOCAL, chosen_address
from cluster.jobs.pieces import begin_piece, devices_of
from datapipe.core import cli
from datapipe.core.process_setup import numbers_in_environment
from datapipe.core.progress import counted
from datapipe.storage import full_url
from training.core.devices import choose_device
from training.evaluation import forgetting
from training.evaluation.forgetting import NAMES, SCORES, ForgettingRequest, ForgettingTask


def score_cfs(chosen: ScoreCfsJob) -> int:
    """Score all crops with all devices of a cluster; the exit code."""
    refuse_relative(chosen.places)
    address = chosen_address(chosen.address or "")
    source, target, data, out = map(full_url, (chosen.source, chosen.target, chosen.data, chosen.out))
    if address == LOCAL:
        choose_device(chosen.device)  # refuses what cannot be before weights and data are looked at
    print(f"reads the weights {source} and {target}, and the data set {data}", flush=True)
    request = ForgettingRequest(
        source=source, target=target, data=data, storage=chosen.storage, feature=chosen.feature, size=chosen.size,
        source_statistics=chosen.source_statistics, target_statistics=chosen.target_statistics,
        interpolation=chosen.interpolation, batch=chosen.embed_batch, threads=chosen.threads,
        precision=chosen.precision,
    )  # fmt: skip
    planned = forgetting.plan(request, out, tuned_on=chosen.tuned_on)
    if planned is None:
        print("already complete: these scores were made before")
    else:
        feature, tuned_on = planned.header["feature"], planned.header["tuned_on"]
        print(f"scores {counted(planned.data.images, 'crop')} in {counted(len(planned.data.pieces), 'piece')}: "
              f"{feature}, the target fine-tuned on {tuned_on}", flush=True)  # fmt: skip
        read = [data, planned.request.source, planned.request.target]
        with devices_of(address, chosen.device, written=planned.out.url, read=read) as (workers, kind):
            rows, notes = forgetting.carry_out(planned, workers, _score_piece, kind)
        print(f"{counted(rows, 'crop')} scored")
        for note in notes:
            print(f"note: {note}")
    print(f"{out}/{SCORES}\n{out}/{NAMES}")
    return cli.COMPLETE


def _score_piece(task: ForgettingTask, kind: Kind) -> int:
    begin_piece(kind)
    with numbers_in_environment():
        return forgetting.score_piece(task, own_device(kind))
