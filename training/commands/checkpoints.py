"""python -m training checkpoints RUN [verify | compare A B | prune --keep-last N]"""

import math
import sys
from datetime import datetime

from datapipe.core import cli
from datapipe.core.config import StorageConfig
from datapipe.core.errors import DataError, NotFoundError
from datapipe.core.progress import counted
from datapipe.storage import Store, open_store, split_url
from training.checkpoint import compare as comparing
from training.checkpoint.lineage import complete, survey
from training.checkpoint.metadata import MARKER, Marker, completed, read_marker, step_of, was_pruned
from training.checkpoint.reader import Reader, newest_good
from training.checkpoint.reader import verify as check
from training.checkpoint.retention import folder_of, kept, old_files
from training.checkpoint.settings import CheckpointConfig
from training.commands.arguments import CompareCommand, ListCommand, PruneCommand, VerifyRunCommand

PROG = "python -m training checkpoints"


def newest(store: Store) -> str:
    """Name of the newest checkpoint that verifies. Raises DataError where there is none."""
    checkpoint = newest_good(store, lambda line: print(line, file=sys.stderr))
    if checkpoint is None:
        raise DataError("the run has no good checkpoint", where=store.url, hint="let it reach its first save")
    return checkpoint[0]


def listing(chosen: ListCommand) -> int:
    """Print a run's checkpoints, complete ones and others."""
    store = _store(chosen.run, chosen.storage)
    damaged = False
    for name in _names(store):
        try:
            print(f"{name}  {_line(read_marker(store, name))}")
        except (DataError, NotFoundError) as error:
            if was_pruned(store, name):
                continue
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


def verify(chosen: VerifyRunCommand) -> int:
    """Read checkpoints and compare them with their checksums."""
    store = _store(chosen.run, chosen.storage)
    damaged = False
    for name in chosen.names or _names(store):
        fault = _fault(store, name)
        if fault and not chosen.names and was_pruned(store, name):
            print(f"{name}  pruned by its run before it was read", flush=True)
            continue
        damaged = damaged or bool(fault)
        print(f"{name}  {'DAMAGED: ' + fault if fault else 'good'}", flush=True)
    return cli.FAILED if damaged else cli.COMPLETE


def _fault(store: Store, name: str) -> str:
    """What is wrong with a checkpoint; empty for a good one."""
    try:
        check(store, name, read_marker(store, name).files)
    except (DataError, NotFoundError) as error:
        return f"{error.what} ({error.where})"
    return ""


def compare(chosen: CompareCommand) -> int:
    """Print how two checkpoints differ."""
    store = _store(chosen.run, chosen.storage)
    comparison = comparing.compare(*(_open(store, address, chosen.storage) for address in (chosen.a, chosen.b)))
    print("\n".join(comparing.table(comparison)))
    return cli.COMPLETE if comparison.equal else cli.FAILED


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


def prune(chosen: PruneCommand) -> int:
    """Delete what may go."""
    store = _store(chosen.run, chosen.storage)
    good = _newest_good(store, chosen.keep_last)
    if not good:
        raise DataError("no checkpoint of the run is good, so none is deleted", where=store.url,
                        hint=f"{PROG} RUN verify says what is wrong")  # fmt: skip
    entries = {entry.name: entry.size for entry in store.list()}
    surveyed = survey(store, entries)
    every = CheckpointConfig(keep_every_steps=chosen.keep_every_steps)
    staying = {*good, *(name for name in surveyed.names if kept(every, step_of(name) or 0, math.inf))}
    going = old_files(entries, good[0], {*staying, *surveyed.passed_over})
    if not chosen.dry_run:
        for last in (False, True):  # markers first, so that no half checkpoint looks whole
            store.delete_many(file for file in going if file.endswith(f"/{MARKER}") != last)
    verb = "would delete" if chosen.dry_run else "deleted"
    for name in sorted({folder_of(file) for file in going}):
        print(f"{verb} {name}")
    size = sum(entries[file] for file in going) / 1e6
    print(f"{verb} {counted(len(going), 'file')}, {size:,.1f} MB; good ones that stay: {', '.join(sorted(staying))}")
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
    names = complete(store)
    if not names:
        raise DataError("no complete checkpoint", where=store.url, hint="is this a run folder?")
    return names


def _partial(store: Store) -> list[str]:
    files = [entry.name for entry in store.list()]
    whole = completed(files)
    return sorted({name for name in map(folder_of, files) if step_of(name) is not None and name not in whole})
