"""What each rank says for itself: ranks/rank_03.log in the run folder, warnings and the trace of an error included."""

import contextlib
import logging
import os
import sys
import time
from collections.abc import Iterator

from datapipe.core.errors import LeaseError
from training.core.host import Host
from training.core.run_folder.run_folder import RunFolder
from training.core.world import World

log = logging.getLogger(__name__)

PACKAGES = ("datapipe", "training", "cluster")
"""Whose lines are kept."""


class _Lines(logging.Handler):
    """Appends lines to a file of the run folder. Calls come from any thread, one at a time."""

    def __init__(self, folder: RunFolder, name: str) -> None:
        super().__init__(logging.INFO)
        self._folder, self._name = folder, name
        self._failed = False
        form = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%d %H:%M:%S")
        form.converter = time.gmtime
        self.setFormatter(form)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._folder.append(self._name, self.format(record))
        except LeaseError:
            return  # the file is another process's
        except Exception as error:  # noqa: BLE001  (a log that cannot be written must not end a run)
            if not self._failed:
                reason = str(error).partition("\n")[0]
                print(f"warning: {self._name} cannot be written: {reason}", file=sys.stderr, flush=True)
            self._failed = True

    def flush(self) -> None:
        self._folder.flush()


@contextlib.contextmanager
def rank_log(folder: RunFolder, world: World, host: Host) -> Iterator[None]:
    """Keep what the rank logs for as long as the context lasts. Warnings go to stderr as they did before; the trace of
    the error that ends it does not."""
    handler = _Lines(RunFolder(folder.url, folder.storage, folder.guard), f"ranks/rank_{world.rank:02d}.log")
    stderr = logging.StreamHandler(sys.stderr)
    stderr.setLevel(logging.WARNING)
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    if not logging.root.handlers:  # with a handler of ours Python no longer prints warnings by itself
        logging.root.addHandler(stderr)
    try:
        log.info("rank %d of %d, process %d on %s, %s", world.rank, world.size, os.getpid(), host.place(), world.device)
        yield
        log.info("ended")
    except BaseException:
        # into this file only: whoever raised it to here tells the person, once
        trace = log.makeRecord(log.name, logging.ERROR, __file__, 0, "ended by an error", (), sys.exc_info())
        handler.handle(trace)
        raise
    finally:
        logging.root.removeHandler(stderr)
        for logger, level in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
        handler.flush()
        handler.close()
