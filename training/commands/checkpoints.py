"""python -m training checkpoints RUN [verify | compare A B | prune --keep-last N]"""

import math
import sys
from datetime import datetime
from typing import Annotated

import tyro
from pydantic import Field

from datapipe.core import cli
from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError, NotFoundError
from datapipe.core.settings import settings
from datapipe.storage import Store, open_store, split_url
from training.checkpoint import compare as comparing
from training.checkpoint.lineage import complete, survey
from training.checkpoint.metadata import Marker, completed, read_marker, step_of
from training.checkpoint.reader import Reader, newest_good, verify
from training.checkpoint.retention import folder_of, kept, old_files
from training.checkpoint.settings import CheckpointConfig

PROG = "python -m training checkpoints"


@settings
class List:
    """List a run's checkpoints; RUN verify reads them, RUN compare A B tells how two differ, RUN prune deletes old
    ones."""

    run: tyro.conf.Positional[str]
    """Run folder, local or s3://bucket/prefix."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


@settings
class Verify:
    """Read checkpoints and compare them with their checksums."""

    run: tyro.conf.Positional[str]
    """Run folder, local or s3://bucket/prefix."""
    names: tyro.conf.Positional[tuple[str, ...]] = ()
    """Which ones, e.g. step_0012000. None: all."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


@settings
class Compare:
    """Tell how two checkpoints differ; the exit code is 0 where training would go on alike from both."""

    run: tyro.conf.Positional[str]
    """Run folder, local or s3://bucket/prefix."""
    a: tyro.conf.Positional[str]
    """A checkpoint of the run (step_0012000), another run's folder (its newest), or the folder of a checkpoint."""
    b: tyro.conf.Positional[str]
    """The same."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


@settings
class Prune:
    """Delete all but the newest good checkpoints, and what crashed attempts left behind them."""

    run: tyro.conf.Positional[str]
    """Run folder, local or s3://bucket/prefix."""
    keep_last: Annotated[int, Field(ge=1)]
    """So many of the newest that verify stay."""
    keep_every_steps: Annotated[int, Field(ge=0)] = 0
    """Those at multiples of this stay too. 0: none."""
    dry_run: tyro.conf.FlagCreatePairsOff[bool] = False
    """Only say what would be deleted."""
    storage: StorageConfig = StorageConfig()
    """How object stores are reached."""


def checkpoints(arguments: list[str]) -> int:
    """List, verify, compare or prune a run's checkpoints."""
    for action, kind, work in (("verify", Verify, _verify), ("compare", Compare, _compare), ("prune", Prune, _prune)):
        if action in arguments[1:2]:
            words = [word for place, word in enumerate(arguments) if place != 1]
            return work(tyro.cli(kind, args=words, prog=f"{PROG} RUN {action}"))  # type: ignore[arg-type]
    return _list(tyro.cli(List, args=arguments, prog=PROG))


def newest(store: Store) -> str:
    """Name of the newest checkpoint that verifies. Raises DataError where there is none."""
    found = newest_good(store, lambda line: print(line, file=sys.stderr))
    if found is None:
        raise DataError("the run has no good checkpoint", where=store.url, hint="let it reach its first save")
    return found[0]


def _list(chosen: List) -> int:
    store = _store(chosen.run, chosen.storage)
    damaged = False
    for name in _names(store):
        try:
            print(f"{name}  {_line(read_marker(store, name))}")
        except DataError as error:
            damaged = True
            print(f"{name}  DAMAGED: {error.what}")
    for name in _partial(store):
        print(f"{name}  not complete: being written, or left by a crash")
    return cli.FAILED if damaged else cli.COMPLETE


def _line(marker: Marker) -> str:
    saved = datetime.fromtimestamp(marker.time).strftime("%Y-%m-%d %H:%M:%S")
    size = math.ceil(marker.size / 1e6)
    files = f"{len(marker.files)} file{'s' if len(marker.files) > 1 else ''}"
    return f"{marker.samples:>12,} samples  {size:>6,} MB in {files}  world {marker.world}  {saved}"


def _verify(chosen: Verify) -> int:
    store = _store(chosen.run, chosen.storage)
    damaged = False
    for name in chosen.names or _names(store):
        fault = _fault(store, name)
        damaged = damaged or bool(fault)
        print(f"{name}  {'DAMAGED: ' + fault if fault else 'good'}", flush=True)
    return cli.FAILED if damaged else cli.COMPLETE


def _fault(store: Store, name: str) -> str:
    """What is wrong with a checkpoint; empty for a good one."""
    try:
        verify(store, name, read_marker(store, name).files)
    except (DataError, NotFoundError) as error:
        return f"{error.what} ({error.where})"
    return ""


def _compare(chosen: Compare) -> int:
    store = _store(chosen.run, chosen.storage)
    found = comparing.compare(*(_open(store, address, chosen.storage) for address in (chosen.a, chosen.b)))
    print("\n".join(comparing.table(found)))
    return cli.COMPLETE if found.equal else cli.FAILED


def _open(store: Store, address: str, storage: StorageConfig) -> Reader:
    """A checkpoint by its name in the run, by the address of its folder, or the newest of another run."""
    if step_of(address) is not None:
        return _reader(store, address)
    folder, name = split_url(address)
    if step_of(name) is not None:
        return _reader(open_store(folder, storage), name)
    other = _store(address, storage)
    return _reader(other, _names(other)[-1])


def _reader(store: Store, name: str) -> Reader:
    try:
        return Reader(store, name)
    except NotFoundError as error:
        known = ", ".join(complete(store)) or "none"
        raise DataError("no such checkpoint, or not complete", where=store.address(name),
                        hint=f"complete ones here: {known}") from error  # fmt: skip


def _prune(chosen: Prune) -> int:
    store = _store(chosen.run, chosen.storage)
    good = _newest_good(store, chosen.keep_last)
    if not good:
        raise DataError("no checkpoint of the run is good, so none is deleted", where=store.url,
                        hint=f"{PROG} RUN verify says what is wrong")  # fmt: skip
    entries = {entry.name: entry.size for entry in store.list()}
    found = survey(store, entries)
    every = CheckpointConfig(keep_every_steps=chosen.keep_every_steps)
    staying = {*good, *(name for name in found.names if kept(every, step_of(name) or 0, math.inf))}
    going = old_files(entries, good[0], {*staying, *found.passed_over})
    if not chosen.dry_run:
        for file in going:
            store.delete(file)
    said = "would delete" if chosen.dry_run else "deleted"
    for name in sorted({folder_of(file) for file in going}):
        print(f"{said} {name}")
    size = sum(entries[file] for file in going) / 1e6
    print(f"{said} {len(going)} files, {size:,.1f} MB; good ones that stay: {', '.join(sorted(staying))}")
    return cli.COMPLETE


def _newest_good(store: Store, count: int) -> list[str]:
    """The newest that verify, the newest first; the damaged ones among them are named."""
    good: list[str] = []
    for name in reversed(_names(store)):
        if len(good) == count:
            break
        fault = _fault(store, name)
        if fault:
            print(f"{name}  DAMAGED: {fault}")
        else:
            good.append(name)
    return good


def _store(run: str, storage: StorageConfig) -> Store:
    return open_store(run, storage).at("checkpoints")


def _names(store: Store) -> list[str]:
    found = complete(store)
    if not found:
        raise DataError("no complete checkpoint", where=store.url, hint="is this a run folder?")
    return found


def _partial(store: Store) -> list[str]:
    files = [entry.name for entry in store.list()]
    whole = completed(files)
    return sorted({name for name in map(folder_of, files) if step_of(name) is not None and name not in whole})
