"""python -m training report: one self-contained page of a run folder."""

import tyro

from datapipe.core import cli
from datapipe.core.config import StorageConfig
from datapipe.core.settings import settings


@settings
class ReportCommand:
    run: tyro.conf.Positional[str]
    """Run folder, local or s3://bucket/prefix."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def report(arguments: list[str]) -> int:
    """Write report.html, one self-contained file, from what the run folder holds."""
    from training.report.report import write_report

    chosen = tyro.cli(ReportCommand, args=arguments, prog="python -m training report")
    print(write_report(chosen.run, chosen.storage))
    return cli.COMPLETE
