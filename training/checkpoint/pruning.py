"""Deletes what a new checkpoint supersedes, in a thread of its own: training, saves and stops never wait for it."""

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from threading import Event

from datapipe.core.errors import DataError, LeaseError, StorageError
from datapipe.core.parallel import in_order
from datapipe.storage import Store, is_remote
from training.checkpoint.async_save import BackgroundTask
from training.checkpoint.lineage import Head, before, look, term_of
from training.checkpoint.metadata import MARKER, Marker, name_of, step_of
from training.checkpoint.retention import folder_of, strays, superseded
from training.checkpoint.settings import CheckpointConfig
from training.core.run_folder.write_guard import WriteGuard

log = logging.getLogger(__name__)

LISTS_IN_FLIGHT = 8
"""Folders of checkpoints listed at a time on remote stores."""


class Pruner:
    """Deletes for all saves of a run, on the leading rank. All methods are called from the thread that trains."""

    def __init__(self, store: Store, config: CheckpointConfig, epoch_steps: float, guard: WriteGuard) -> None:
        self._store, self._config, self._epoch_steps, self._guard = store, config, epoch_steps, guard
        self._heads: dict[str, Head] = {}
        self._task: BackgroundTask | None = None
        self._stop = Event()
        self._gave_way = False
        """Has the last one left something undone for a save?"""

    def begin(self, marker: Marker) -> None:
        """Delete what this new checkpoint supersedes, once the pruning before is over."""
        last, stop = self._task, Event()

        def work() -> None:
            if last is not None:
                last.join()
                assert not last.failure  # `tidy` tells of all that a user can act on
            tidy(lambda: self._prune(marker, stop), log.warning)

        self._stop, self._task = stop, BackgroundTask(work)

    def give_way(self) -> None:
        """A save begins: end after the request that is under way, and leave the rest to the next pruning. That one goes
        on beside a save, for where saves follow one another closely there would never be time for it."""
        if self._task is None or self._task.done:
            self._gave_way = False
        elif not self._gave_way:
            self._stop.set()
            self._gave_way = True

    def end(self, within_s: float | None = None) -> None:
        """Return when nothing is being deleted. `within_s`: after so long what is left stays, but for a request that
        is under way."""
        if self._task is None:
            return
        self._task.join(within_s)
        if not self._task.done:
            self._stop.set()
        else:
            assert not self._task.failure

    def _prune(self, marker: Marker, stop: Event) -> None:
        prune(self._store, self._config, marker, self._epoch_steps, self._heads, self._guard, stop.is_set)


def prune(
    store: Store,
    config: CheckpointConfig,
    marker: Marker,
    epoch_steps: float,
    heads: dict[str, Head],
    guard: WriteGuard,
    stopped: Callable[[], bool],
) -> None:
    """Delete what the new checkpoint supersedes, what in its folder is not its own, and what terms before its own have
    noted; nothing of a later term. It takes a few requests, whatever the number of files; before each it asks whether
    it is `stopped`.

    `heads`: those of markers that are known, which it takes up. Raises LeaseError when another process has taken over.
    """
    guard.confirm()
    newest = name_of(marker.step)
    for name in _last_before(newest, heads, config.keep_last):
        del heads[name]  # what counts as one of the last must be there: a person may have deleted it
    heads[newest] = Head(marker.step, marker.term)
    if stopped():
        return
    found = look(store, heads)
    folders = superseded(config, found.marked, found.folders, newest, epoch_steps, found.passed_over)
    if stopped():
        return
    files = _files_in(store, [*folders, newest])
    own = [file.name for file in marker.files]
    going = [*(file for file in files if folder_of(file) in folders), *strays(files, newest, own)]
    going = [*(file for file in going if term_of(file, heads) <= marker.term), *before(found, marker.term)]
    markers = [file for file in going if file.endswith(f"/{MARKER}")]
    for names in (markers, [file for file in going if file not in markers]):  # no half checkpoint looks whole
        if names and not stopped():
            store.delete_many(names)


def _files_in(store: Store, folders: Sequence[str]) -> list[str]:
    """Names of all files in these folders, also of those that nobody finished."""

    def below(folder: str) -> list[str]:
        return [entry.name for entry in store.list(f"{folder}/")]

    found = in_order(below, folders, threads=LISTS_IN_FLIGHT if is_remote(store.url) else 0)
    return [*chain.from_iterable(found), *store.unfinished()]


def _last_before(newest: str, names: Iterable[str], count: int) -> list[str]:
    before = [name for name in names if (step_of(name) or 0) < (step_of(newest) or 0)]
    return sorted(before, key=lambda name: step_of(name) or 0)[-count:]


def sweep(store: Store, part: str) -> None:
    """Take back what a rank wrote for a save that failed."""
    store.delete(part)


def tidy(work: Callable[[], object], warn: Callable[[str], None]) -> None:
    """Tidying: its faults are told, and the next save tidies again. Of a lease that was lost the next write tells."""
    try:
        work()
    except (StorageError, DataError) as error:
        warn(f"warning: old checkpoint files were not deleted: {error.what} ({error.where})")
    except LeaseError:
        pass
