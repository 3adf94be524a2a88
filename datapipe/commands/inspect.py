"""The commands that look into data sets: verify | stats | preview."""

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field

from datapipe.core import cli
from datapipe.core.cli import POSITIONAL, page_of, parse
from datapipe.core.config import Decode, StorageConfig, StreamConfig
from datapipe.core.errors import ConfigError
from datapipe.core.progress import counted
from datapipe.core.settings import settings
from datapipe.core.stop_signals import GOES_ON, unwinding
from datapipe.formats.text import NoText, decode_text

MOST_FINDINGS = 50
"""Lines that `verify` prints at most."""


@settings
class VerifyCommand:
    url: Annotated[str, POSITIONAL]
    """The data set: a folder or s3://bucket/prefix, or one manifest file."""
    decode: Decode = "sample"
    """Which crops are decoded as well: none, one in a hundred, or all."""
    repair: bool = False
    """First rebuild damaged or missing indexes from intact tars, and take damaged crops out of all versions of the
    folder; their rows stay, as with `remove`."""
    workers: Annotated[int, Field(ge=0)] = 0
    """Processes. 0: one per core."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def verify(arguments: list[str]) -> int:
    """Check a data set against its manifest and name what is wrong; exits with 1 if anything is."""
    chosen = parse(VerifyCommand, arguments, page_of(verify, "data/shards"))
    from datapipe.dataset.verify import verify as check

    if chosen.repair:
        from datapipe.maintain.repair import repair

        with unwinding(GOES_ON):
            repaired = repair(chosen.url, chosen.storage, workers=chosen.workers)
        for line in repaired.lines():
            print(line)
    with unwinding():
        checked = check(chosen.url, chosen.decode, chosen.storage, workers=chosen.workers)
    for finding in checked.findings[:MOST_FINDINGS]:
        print(f"{finding.where}: {finding.what}")
    if len(checked.findings) > MOST_FINDINGS:
        print(f"and {len(checked.findings) - MOST_FINDINGS:,} more")
    manifest = checked.manifest
    print(
        f"{'FAILED' if checked.findings else 'good'}: {counted(len(checked.findings), 'finding')} in "
        f"{counted(checked.crops, 'crop')} of {counted(len(manifest.shards), 'shard')}, {checked.decoded:,} decoded"
    )
    return cli.FAILED if checked.findings else cli.COMPLETE


@settings
class StatsCommand:
    url: Annotated[str, POSITIONAL]
    """The data set: a folder or s3://bucket/prefix, or one manifest file."""
    json: bool = False
    """Print it as JSON, for programs."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def stats(arguments: list[str]) -> int:
    """Say what a data set holds: counts, sizes, duplicates, per source."""
    chosen = parse(StatsCommand, arguments, page_of(stats, "data/shards"))
    from datapipe.dataset.stats import as_text, statistics

    with unwinding():
        facts = statistics(chosen.url, chosen.storage)
    print(json.dumps(facts, indent=1) if chosen.json else as_text(facts))
    return cli.COMPLETE


@settings
class PreviewCommand:
    manifest: Annotated[str, POSITIONAL]
    """The data set: a folder or s3://bucket/prefix, or one manifest file."""
    out: str = "preview.jpg"
    """Picture to write, .jpg or .png, local or s3://bucket/x.jpg."""
    count: Annotated[int, Field(ge=1)] = 20
    """Crops to show: the first ones of the stream."""
    views: Path | None = None
    """File written by `python -m training views RECIPE`: beside each crop, exactly the views that training with that
    recipe makes of it, in its order. Without: whole crops only."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def preview(arguments: list[str]) -> int:
    """Draw a contact sheet of crops and of the views that training will see of them."""
    chosen = parse(PreviewCommand, arguments, page_of(preview, "data/shards --out preview.jpg"))
    from datapipe.stream.preview import TrainingViews, contact_sheet

    if chosen.views is None:
        with unwinding():
            print(contact_sheet(chosen.manifest, chosen.out, count=chosen.count, storage=chosen.storage))
        return cli.COMPLETE
    if not chosen.views.is_file():
        raise ConfigError("no such file", where=str(chosen.views), hint="python -m training views RECIPE > views.json")
    try:
        seen = TrainingViews.from_json(decode_text(chosen.views.read_bytes()), where=str(chosen.views))
    except NoText as error:
        raise ConfigError(f"not a description of views: it {error}", where=str(chosen.views),
                          hint="python -m training views RECIPE > views.json") from error  # fmt: skip
    with unwinding():
        print(
            contact_sheet(
                chosen.manifest,
                chosen.out,
                spec=seen.spec,
                seed=seen.seed,
                count=chosen.count,
                storage=chosen.storage,
                stream=StreamConfig(block=seen.block, window=seen.window),
            )
        )
    return cli.COMPLETE
