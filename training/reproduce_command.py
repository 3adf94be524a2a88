"""python -m training reproduce: is a published score reached here?"""

import tyro

from datapipe import command
from datapipe.config import StorageConfig
from datapipe.errors import ConfigError
from datapipe.settings import settings
from training.engine.host import LocalHost, exit_code
from training.report import write_report
from training.reproduce import LIST, listing, page, read_row
from training.reproduce import reproduce as run_row

PROG = "python -m training reproduce"


@settings
class ReproduceCommand:
    row: tyro.conf.Positional[str] = ""
    """Name of a published row, or a TOML file with a row of your own."""
    list: bool = False
    """Print every row: name, mAP, Rank-1, what its authors' code gave them again, tolerance, source."""
    weights: str = ""
    """File of published weights, folder of an export or import, or run folder, local or s3://bucket/prefix. Weights
    that are fine-tuned already are scored as they are; others are fine-tuned first, as the row says."""
    data: str = ""
    """The row's data set: a folder or s3://bucket/prefix with its files, or its shards."""
    out: str = ""
    """Folder for scores, report and, where it takes one, the run. Started again with the same folder, it goes on.
    Empty: reproductions/ROW."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def reproduce(arguments: list[str]) -> int:
    """Carry out a published evaluation and hold ours against it: exit code 0 within the tolerance, 1 outside."""
    chosen = tyro.cli(ReproduceCommand, args=arguments, prog=PROG)
    if chosen.list:
        print(listing())
        return command.COMPLETE
    missing = [name for name in ("row", "weights", "data") if not getattr(chosen, name)]
    if missing:
        raise ConfigError(f"not given: {', '.join(missing)}", where=PROG,
                          hint=f"reproduce ROW --weights FILE --data FOLDER; {LIST}")  # fmt: skip
    row = read_row(chosen.row)
    out = chosen.out or f"reproductions/{row.name}"
    with LocalHost(starting=True) as host:
        done = run_row(row, chosen.weights, chosen.data, out, chosen.storage, host)
        if done is None:
            return exit_code(host.received)
    print(page(done))
    print(write_report(out, chosen.storage))
    return command.COMPLETE if done.within else command.FAILED
