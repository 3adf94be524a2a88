"""The commands that make data sets: shard | synth."""

from typing import Annotated

from datapipe.core import cli
from datapipe.core.cli import INLINE, POSITIONAL, page_of, parse
from datapipe.core.config import ShardConfig, StorageConfig, SynthConfig
from datapipe.core.parallel import Executor
from datapipe.core.progress import counted
from datapipe.core.settings import settings
from datapipe.core.stop_signals import GOES_ON, unwinding


@settings
class ShardCommand:
    sources: Annotated[tuple[str, ...], POSITIONAL]
    """Where crops are, as many places of any kind as wanted, local or s3://bucket/prefix: folders of images (any depth;
    Market-1501-style names give person and camera), zips, tars and WebDataset shards (single, in folders, or
    cut into pieces), LMDBs, parquet files with images, videos with boxes. Patterns in quotes are one source each:
    "set/{00..12}.tar", "hf/train-*.parquet", "lup/**/cam[12]"."""
    out: str
    """Folder or s3://bucket/prefix for the data set."""
    licence: str = ""
    """What the images may be used for; noted in the manifest and in the card of what is trained on them."""
    dry_run: bool = False
    """Say what would be read and written, how many shards that makes and how long it takes; write nothing."""
    config: Annotated[ShardConfig, INLINE] = ShardConfig()
    """How crops are screened and shards are cut."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def shard(arguments: list[str]) -> int:
    """Turn crops into WebDataset tars with index and manifest; goes on where a killed run stopped."""
    return run_shard(parse(ShardCommand, arguments, page_of(shard, "crops/ 'lup/*.tar' --out data/shards")))


def run_shard(chosen: ShardCommand, workers: Executor | None = None) -> int:
    """Do what the command line says, on this machine or with the workers given, and print how it ended."""
    from datapipe.dataset.quarantine import NAME, listed
    from datapipe.ingest.pipeline import ingest

    if chosen.dry_run:
        return _say_what_would_be_done(chosen)
    with unwinding(GOES_ON):
        done = ingest(chosen.sources, chosen.out, chosen.config, chosen.storage, licence=chosen.licence,
                      workers=workers)  # fmt: skip
    manifest = done.manifest
    folder = manifest.url.rstrip("/")
    if done.found_complete:
        print("already complete: nothing was left to do")
    crops = manifest.stored_rows - manifest.removed
    print(
        f"{counted(crops, 'crop')} in {counted(len(manifest.shards), 'shard')}, {manifest.bytes / 1e6:,.1f} MB, "
        f"{manifest.quarantined:,} quarantined"
    )
    if done.reasons:
        print(f"quarantined: {listed(done.reasons)}; see {folder}/{NAME}")
    for line in done.remarks.lines():
        print(line)
    print(f"id {manifest.id}")
    print(f"{folder}/{manifest.file}")
    return cli.COMPLETE


def _say_what_would_be_done(chosen: ShardCommand) -> int:
    from datapipe.core.progress import duration
    from datapipe.ingest.dry_run import estimate

    estimated = estimate(chosen.sources, chosen.out, chosen.config, chosen.storage)
    read, written = (f"{size / 1e6:,.1f} MB" for size in (estimated.source_bytes, estimated.bytes))
    print(f"would read about {counted(estimated.crops, 'crop')}: {read} from {counted(len(chosen.sources), 'source')}")
    print(
        f"would write about {counted(estimated.shards, 'shard')}: {written} to {chosen.out}, as much to the spool for "
        f"as long; about {estimated.refused:.2%} of the crops quarantined"
    )
    for line in estimated.remarks.lines():
        print(line)
    print(f"would take about {duration(estimated.seconds)} on this machine, nothing was written")
    return cli.COMPLETE


@settings
class SynthCommand:
    out: str
    """Folder or s3://bucket/prefix to fill, in the layout of Market-1501."""
    config: Annotated[SynthConfig, INLINE] = SynthConfig()
    """What is rendered."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def synth(arguments: list[str]) -> int:
    """Render pedestrians as a Market-1501-style folder, for demos and tests."""
    chosen = parse(SynthCommand, arguments, page_of(synth, "--out data/people"))
    from datapipe.synth.market_folder import render

    with unwinding(GOES_ON):
        render(chosen.out, chosen.config, chosen.storage)
    return cli.COMPLETE
