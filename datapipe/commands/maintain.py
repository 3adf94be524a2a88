"""The commands that change finished data sets: select | reshard | remove."""

from typing import TYPE_CHECKING, Annotated

from datapipe.core import cli
from datapipe.core.cli import INLINE, POSITIONAL, page_of, parse
from datapipe.core.config import RemoveConfig, ReshardConfig, SelectConfig, StorageConfig
from datapipe.core.progress import counted
from datapipe.core.settings import settings
from datapipe.core.stop_signals import GOES_ON, unwinding

if TYPE_CHECKING:
    from datapipe.dataset.manifest import Manifest


@settings
class SelectCommand:
    url: Annotated[str, POSITIONAL]
    """The data set: a folder (its newest version with all crops), or the manifest file of one version."""
    config: Annotated[SelectConfig, INLINE] = SelectConfig()
    """The criteria that crops have to meet."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def select(arguments: list[str]) -> int:
    """Make a new version of a data set with some of its crops; no tar is written."""
    chosen = parse(SelectCommand, arguments, page_of(select, "data/shards --where 'height >= 128'"))
    from datapipe.maintain.select import select as choose

    with unwinding():
        done = choose(chosen.url, chosen.config, chosen.storage)
    print("; ".join(f"{count:,} {name}" if name == "crops" else f"{name}: {count:,}" for name, count in done.steps))
    if done.missing:
        print(f"listed, but not in the data set: {counted(done.missing, 'crop')}")
    _say(done.manifest)
    return cli.COMPLETE


@settings
class ReshardCommand:
    urls: Annotated[tuple[str, ...], POSITIONAL]
    """Data sets to take the crops of: folders or s3://bucket/prefix (their newest versions, be it selections), or
    manifest files."""
    out: str
    """Folder or s3://bucket/prefix for the new data set."""
    licence: str = ""
    """What the images may be used for. Empty: what the data sets say."""
    config: Annotated[ReshardConfig, INLINE] = ReshardConfig()
    """How shards are cut."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def reshard(arguments: list[str]) -> int:
    """Merge data sets, or cut one into other shards; no image is decoded. Goes on where a killed run stopped."""
    chosen = parse(ReshardCommand, arguments, page_of(reshard, "data/a data/b --out data/both"))
    from datapipe.maintain.reshard import reshard as rewrite

    with unwinding(GOES_ON):
        done = rewrite(chosen.urls, chosen.out, chosen.config, chosen.storage, licence=chosen.licence)
    if done.found_complete:
        print("already complete: nothing was left to do")
    for part in done.selections:
        print(f"{part.url}: {part.rows:,} of {part.stored_rows:,} crops are taken, as {part.file} is a selection")
    if done.repeated:
        print(f"in several of the data sets, and taken once: {counted(done.repeated, 'crop')}")
    _say(done.manifest)
    return cli.COMPLETE


@settings
class RemoveCommand:
    url: Annotated[str, POSITIONAL]
    """The data set: a folder or s3://bucket/prefix. All its versions lose the crops."""
    config: Annotated[RemoveConfig, INLINE] = RemoveConfig()
    """The criteria of the crops that go, and the reason."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def remove(arguments: list[str]) -> int:
    """Take crops out of all versions of a data set and out of its stored bytes, for good."""
    chosen = parse(RemoveCommand, arguments, page_of(remove, "data/shards --names people.txt --reason 'a request'"))
    from datapipe.maintain.remove import remove as take_out

    with unwinding(GOES_ON):
        done = take_out(chosen.url, chosen.config, chosen.storage)
    lists = done.lists
    if done.found_complete:
        print("already complete: these crops were removed before")
    elif lists.before:
        print(f"listed, but removed before, or quarantined and never in the stream: {counted(lists.before, 'crop')}")
    if lists.missing_count:
        print(f"listed, but not in the data set: {lists.missing_count:,}, for example {', '.join(lists.missing)}")
    if lists.remarks:
        print(f"taken for a heading or a comment: {counted(lists.remarks, 'line')}")
    if lists.alike:
        print(f"more than listed, their names differing in forms of Unicode or blanks: {counted(lists.alike, 'crop')}")
    if lists.copies:
        print(f"others with the same bytes, which stay without --duplicates: {counted(lists.copies, 'crop')}")
    print(f"{counted(done.crops, 'crop')} removed, {counted(done.deleted, 'old object')} deleted")
    for file in done.versions:
        print(f"{chosen.url.rstrip('/')}/{file}")
    for line in done.cleared.lines():
        print(line)
    if chosen.config.runs:
        print("`python -m training report RUN` makes a report again; give caches of other machines with --runs there")
    return cli.FAILED if done.cleared.failed else cli.COMPLETE


def _say(manifest: "Manifest") -> None:
    print(f"{counted(manifest.rows, 'crop')} in {counted(len(manifest.shards), 'shard')}")
    for note in manifest.notes:
        print(f"note: {note}")
    print(f"id {manifest.id}")
    print(f"{manifest.url.rstrip('/')}/{manifest.file}")
