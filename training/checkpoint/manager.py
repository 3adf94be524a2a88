"""The checkpoints of one run, as the loop uses them. The loop stands still for a copy to host memory, no longer.

    save                  every rank copies its state and starts a thread that writes its part
    local_status,         how far this rank's thread is goes into the all-reduce of every step, and its sum comes back:
    apply_global_status   when all parts are written the leading rank's thread writes the marker, and when that is
                          written the checkpoint exists, on all ranks in the same step
    finish                waits for a save; at the end, at a stop, before going back, and before another save
    restore               the ranks read what they need of the newest checkpoint, all at the same time, and check each
                          fragment; where one is damaged all of them go to the checkpoint before

The ranks' view of a save changes in the same step on all of them, so they need no other agreement.
"""

import logging
import math
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from datapipe.core.errors import DataError, LeaseError, NotFoundError, StorageError
from datapipe.storage import Store
from training.checkpoint import async_save, lineage, retention
from training.checkpoint.announcements import Announcements
from training.checkpoint.lineage import Survey
from training.checkpoint.machine_blocks import shared_blocks
from training.checkpoint.metadata import MARKER, Marker, name_of, parsed_marker
from training.checkpoint.pruning import Pruner, sweep, tidy
from training.checkpoint.reader import DamageError, Reader, passed_over, refuse_misfit
from training.checkpoint.settings import CheckpointConfig
from training.checkpoint.snapshot import Snapshots
from training.core.host import run_lines
from training.core.run_folder.write_guard import FREE, WriteGuard
from training.core.world import World
from training.engine.loss_scaling import LossScale, first_scale
from training.engine.state_fragments import Piece, divide
from training.engine.stepper import Stepper

log = logging.getLogger(__name__)
T = TypeVar("T")

TIDY_S = 2.0
"""Longest that a stop waits for the deletion of old checkpoints."""


def _nothing() -> None:
    """Nothing has to be done first."""


class SaveStatus(NamedTuple):
    """What a rank contributes every step; applied as the sum over the ranks."""

    written: float = 0.0
    """1: this rank's part of the save in flight is written, or what else it had to do."""
    failed: float = 0.0
    """1: it could not be."""
    due: float = 0.0
    """1: the leading rank's clock says that it is time to save."""


class Saved(NamedTuple):
    """A checkpoint that exists."""

    step: int
    stood_s: float
    """Seconds that the loop stood still for it."""
    took_s: float
    """Seconds from the request until it existed."""
    share: float
    """Part of the time since the save before, or since the start, that the loop stood still for this save."""


@dataclass
class _Flight:
    """A save that is not done yet."""

    step: int
    samples: int
    token: str
    began: float
    since_s: float
    """Seconds since the save before began."""
    task: async_save.BackgroundTask
    about: dict[str, Any]
    """The marker's fields."""
    stood_s: float = 0.0
    parts_written: bool = False
    marker: Marker | None = None
    """On the leading rank, once it is there."""
    took_s: float = math.nan
    """Until then; on the leading rank."""

    @property
    def name(self) -> str:
        return name_of(self.step)


@dataclass
class _Noted:
    """What a restore has noted of the beginning of its term."""

    known: Survey | None
    """What there was; None on ranks that do not note."""
    here: bool = False
    """By this restore: it may be noted anew where that checkpoint turns out to be damaged."""


class Checkpoints:
    """A run's checkpoints: saved beside training, restored at any world size. Every rank makes one, and calls every
    method in the same steps."""

    def __init__(
        self,
        store: Store,
        config: CheckpointConfig,
        world: World,
        *,
        about: Mapping[str, Any],
        replaces: Collection[str] = (),
        epoch_steps: float = math.inf,
        guard: WriteGuard = FREE,
    ) -> None:
        """`about`: the fields of `Marker` that do not change during a run. `replaces`: as `Manifest.replaces`.
        `guard`: of the run folder."""
        self.store, self.config, self.world = store, config, world
        self.about, self.replaces, self.epoch_steps = dict(about), replaces, epoch_steps
        self.guard, self._noted = guard, False
        self.spoiled = False
        """Has the last restore overwritten some of the state before it found damage, and found no other checkpoint?"""
        attempt = world.broadcast(secrets.token_hex(4))
        self._attempt = f"t{guard.term}-{attempt}" if guard.term else attempt
        self._snapshots = Snapshots(world.device)
        self._announcements = Announcements(world)
        self._pruner = Pruner(store, config, epoch_steps, guard)
        self._flight: _Flight | None = None
        self._saved: list[Saved] = []
        self._saves, self._failures = 0, 0
        self._began = time.monotonic()
        self._time_is_up = False
        self._sweeping: async_save.BackgroundTask | None = None

    # -- saving --------------------------------------------------------------------------------------------------

    def due(self, step: int) -> bool:
        """Is it time to save after this many steps?"""
        return self._time_is_up or retention.due(self.config, step, self.epoch_steps)

    def save(self, step: int, samples: int, stepper: Stepper, *, first: Callable[[], None] = _nothing) -> None:
        """Begin a checkpoint of the state as it is now. Waits for the one before where that is not done yet.

        `first`: puts on storage what must be there when this checkpoint exists; done in the thread of the save.
        """
        now = time.monotonic()
        if self._flight is not None:
            run_lines.info(
                f"step {step:,}: the checkpoint of step {self._flight.step:,} is not written yet; waiting for it"
            )
            self._land()
        self._pruner.give_way()
        self._saves += 1
        token, name = f"{self._attempt}-{self._saves}", name_of(step)
        steps = stepper.steps()
        part = self._snapshots.take(divide(stepper.pieces(steps), self.world.rank, self.world.size))
        about = self.about | {"step": step, "samples": samples, "steps": steps, "world": self.world.size,
                              "term": self.guard.term,
                              "loss_scale": {} if stepper.scale is None else asdict(stepper.scale)}  # fmt: skip

        def write() -> None:
            first()
            written = async_save.write_part(self.store, name, self.world.rank, token, part)
            self._announcements.announce(token, written)

        task = async_save.BackgroundTask(write)
        self._flight = _Flight(step, samples, token, now, now - self._began, task, about)
        self._began, self._time_is_up = now, False
        self._flight.stood_s = time.monotonic() - now

    @property
    def stage(self) -> tuple[int, bool]:
        """How far saving is; the same on all ranks. A status of another stage must not be applied."""
        return self._saves, self._flight is not None and self._flight.parts_written

    def local_status(self) -> SaveStatus:
        """This rank's contribution to the sum of this step."""
        flight = self._flight
        late = time.monotonic() - self._began > 60 * self.config.every_minutes > 0
        due = float(self.world.is_leader and flight is None and late)
        if flight is None or not flight.task.done:
            return SaveStatus(due=due)
        failed = bool(flight.task.failure)
        return SaveStatus(float(not failed), float(failed), due)

    def apply_global_status(self, status: SaveStatus) -> None:
        """Apply the sum of all ranks' statuses of this stage. Raises StorageError after too many failed saves."""
        flight = self._flight
        self._time_is_up = status.due > 0
        if flight is None or status.written + status.failed < self.world.size:
            return
        if status.failed:
            self._give_up(flight)
        elif not flight.parts_written:
            flight.parts_written = True
            if self.world.is_leader:
                flight.task = async_save.BackgroundTask(lambda: self._complete(flight))
        else:
            self._flight, self._failures = None, 0
            share = flight.stood_s / max(flight.since_s, 1e-9)
            self._saved.append(Saved(flight.step, flight.stood_s, flight.took_s, share))
            if flight.marker is not None:
                self._pruner.begin(flight.marker)

    def finish(self, *, needed: bool = False, hurry: bool = False) -> None:
        """Return when no save is in flight, and nothing is being deleted. `needed`: the last save must exist; raises
        StorageError if it does not. `hurry`: the machine may be taken away, what is to be deleted may stay."""
        failures = self._failures
        self._land()
        self._pruner.end(TIDY_S if hurry else None)
        if self._sweeping is not None:
            self._sweeping.join(TIDY_S if hurry else None)
        if needed and self._failures > failures:
            raise StorageError(
                "the last checkpoint could not be saved",
                where=self.store.url,
                hint="make room or mend the store; started again, the run goes on from the one before",
            )

    def _land(self) -> None:
        """Return when no save is in flight."""
        began = time.monotonic()
        while (flight := self._flight) is not None:
            flight.task.join()
            self.world.meet()  # the leading rank writes the marker alone
            statuses = self.world.all_gather(self.local_status())
            flight.stood_s += time.monotonic() - began
            began = time.monotonic()
            self.apply_global_status(SaveStatus(*map(sum, zip(*statuses, strict=True))))

    def newly_saved(self) -> list[Saved]:
        """The checkpoints that have come into existence since the last call; the same on all ranks, but for times."""
        saved, self._saved = self._saved, []
        return saved

    def _complete(self, flight: _Flight) -> None:
        """In the leading rank's thread: all parts are written."""
        parts = self._announcements.of_all(flight.token)
        flight.marker = async_save.write_marker(self.store, parts, flight.about, self.guard)
        flight.took_s = time.monotonic() - flight.began

    def _give_up(self, flight: _Flight) -> None:
        """The save failed somewhere: say why, take its files back, go on without. The checkpoints before stay."""
        why = async_save.unlike(self.world.all_gather(flight.task.failure))
        if self.guard.lost:
            raise self.guard.lost
        self._flight = None
        self._failures += 1
        part = f"{flight.name}/{async_save.part_name(self.world.rank, flight.token)}"
        self._sweeping = async_save.BackgroundTask(lambda: tidy(partial(sweep, self.store, part), log.warning))
        most = self.config.max_failed_saves
        if self._failures >= most:
            raise StorageError(
                f"{self._failures} checkpoints in a row could not be saved: {why}",
                where=self.store.url,
                hint="make room or mend the store; started again, the run goes on from the last one",
            )
        run_lines.warning(f"the checkpoint of step {flight.step:,} could not be saved: {why}; the run goes on without "
                 f"it ({self._failures} in a row, {most} end the run)")  # fmt: skip

    # -- restoring -----------------------------------------------------------------------------------------------

    def restore(self, stepper: Stepper) -> tuple[int, str | None]:
        """(samples seen, name) of the newest good checkpoint after loading it; (0, None) where there is none.

        A damaged one is passed over for the one before it. Its good fragments may have been loaded by then: without
        another one the state is `spoiled`, and has to be made anew.
        """
        self.finish()
        self.spoiled = False
        surveys: list[Survey] = []
        names = self._together(lambda: self._survey(surveys))[0]
        noted = _Noted(surveys[0] if surveys else None)
        for name in reversed(names):
            marker = self._marker(name, surveys)
            if marker is None:
                continue
            where = self.store.address(name)
            refuse_other_data(marker, self.about["manifest"], self.about["manifest_rows"], self.replaces, where=where)
            if not self._load(name, marker, stepper, noted):
                self.spoiled = True
                continue
            scaled = LossScale(**marker.loss_scale) if marker.loss_scale else first_scale(stepper.config.precision)
            stepper.scale, self.spoiled = scaled, False
            self._began = time.monotonic()
            return marker.samples, name
        self._together(lambda: self._note_beginning(0, noted))
        self._began = time.monotonic()
        return 0, None

    def _survey(self, found: list[Survey]) -> list[str]:
        """Names of the run's checkpoints, oldest first, as the leading rank finds them."""
        if not self.world.is_leader:
            return []
        found.append(lineage.look(self.store, ahead=True))
        lineage.tell(self.store, found[0], run_lines.info)
        return found[0].names

    def _marker(self, name: str, surveys: list[Survey]) -> Marker | None:
        """What the leading rank has read, on all ranks; None where it is damaged, which is told."""
        content: list[bytes] = []

        def read() -> str:
            if self.world.is_leader:
                try:
                    content.append(surveys[0].markers.get(name) or self.store.read(f"{name}/{MARKER}"))
                    parsed_marker(content[0], self.store, name)
                except (DataError, NotFoundError) as error:
                    return passed_over(name, error)
            return ""

        if damage := self._together(read)[0]:
            run_lines.info(damage)
            return None
        return parsed_marker(self.world.broadcast(content[0] if content else b""), self.store, name)

    def _load(self, name: str, marker: Marker, stepper: Stepper, noted: "_Noted") -> bool:
        """Load what each rank needs; False where any of it is damaged, which is told. Meanwhile the leading rank notes
        the beginning of its term."""
        blocks = shared_blocks(self.store, marker, self.world)

        def load() -> str:
            with ThreadPoolExecutor(1) as beside:
                noting = beside.submit(self._note_beginning, marker.step, noted)
                try:
                    self._fill(Reader(self.store, name, marker, shared=blocks), stepper)
                except (DamageError, NotFoundError) as error:
                    return passed_over(name, error)
                finally:
                    noting.result()
            return ""

        try:
            damage = self._together(load)
        finally:
            if blocks is not None and self.world.local_rank == 0:
                blocks.drop()  # nobody reads them any more
        if any(damage):
            run_lines.info(next(text for text in damage if text))
        return not any(damage)

    def _note_beginning(self, step: int, noted: "_Noted") -> None:
        """Once for each term: what the terms before save from now on is no part of the run."""
        if not self.world.is_leader or not self.guard.term or (self._noted and not noted.here):
            return
        self.guard.confirm()
        made = lineage.begin(self.store, self.guard.term, step, known=noted.known, anew=noted.here)
        self._noted, noted.here = True, made

    def _fill(self, reader: Reader, stepper: Stepper) -> None:
        def fill(pieces: Sequence[Piece]) -> None:
            with torch.no_grad():
                reader.fill(pieces)

        stepper.method.adopt_shapes({name: form.shape for name, form in reader.forms("model").items()})
        shapes = {piece.key.removeprefix("model/"): piece.shape for piece in stepper.pieces({})}
        refuse_misfit(reader, shapes)
        stepper.restore(reader.marker.steps, fill)

    def _together(self, work: Callable[[], T]) -> list[T]:
        """`work` of all ranks. Where one fails all raise, and none waits for it in vain."""
        mine: T | Exception
        try:
            mine = work()
        except (DataError, StorageError, LeaseError) as error:
            mine = error
        self.world.meet()
        results = self.world.all_gather(mine)
        for result in results:
            if isinstance(result, Exception):
                raise result
        return results


def refuse_other_data(marker: Marker, manifest: str, rows: int, replaces: Collection[str], *, where: str) -> None:
    """Raises DataError when a checkpoint was made on another data set than the one at hand.

    It is the same data set where crops have been taken out since: `replaces` are the ids of the versions before, which
    had the same order, row for row.
    """
    if marker.manifest not in (manifest, *replaces):
        raise DataError(
            f"this checkpoint was trained on other data: manifest {_short(marker.manifest)} "
            f"({marker.manifest_rows:,} crops), now {_short(manifest)} ({rows:,} crops)",
            where=where,
            hint="give stream.manifest of the data it began with, or start anew in another folder with --out",
        )


def _short(manifest: str) -> str:
    """Enough of an id, or of each one's of a mix, to tell them apart."""
    return " + ".join(identity[:12] for identity in manifest.split("+"))
