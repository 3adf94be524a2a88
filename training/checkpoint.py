"""Checkpoints: complete or absent, verified when read, and holding all that the future depends on.

    checkpoints/step_0000100/state.safetensors   whole tensors: model/..., and the optimizer's, such as exp_avg/...
    checkpoints/step_0000100/checkpoint.json     written last: its presence means complete

Tensors are whole, so any world size and any stepper restores them.
"""

import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from datapipe.errors import DataError, NotFoundError, StorageError
from datapipe.storage import Store
from training.config import CheckpointConfig
from training.engine.optimizers import ParameterState
from training.engine.scaling import LossScale, first_scale
from training.engine.stepper import Stepper
from training.engine.world import World

log = logging.getLogger(__name__)

FORMAT = 1
STATE, MARKER = "state.safetensors", "checkpoint.json"
_NAME = re.compile(r"step_(\d{7,})")


@dataclass(frozen=True)
class Marker:
    """What a checkpoint says of itself. Written last."""

    step: int
    samples: int
    manifest: str
    manifest_rows: int
    seed: int
    batch: int
    world: int
    bytes: int
    sha256: str
    steps: dict[str, float]
    """The optimizer's step count of each parameter; 0 where it does not count, or has not begun."""
    loss_scale: dict[str, Any] = field(default_factory=dict)
    """The fields of `LossScale`; empty where the loss was not scaled."""
    config: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    """The pretrained weights that the run began with, where it did."""
    time: float = 0.0
    format: int = FORMAT


def name_of(step: int) -> str:
    """The folder of a checkpoint: `step_0000100`, steps done."""
    return f"step_{step:07d}"


def step_of(name: str) -> int | None:
    """The steps done that a folder name states; None for another name."""
    match = _NAME.fullmatch(name)
    return int(match.group(1)) if match else None


def complete(store: Store) -> list[str]:
    """Names of the checkpoints that have their marker, oldest first. `store`: the run's `checkpoints` folder."""
    try:
        entries = [entry.name for entry in store.list()]
    except NotFoundError:
        return []
    names = [folder for folder, _, file in (name.rpartition("/") for name in entries) if file == MARKER]
    return sorted((name for name in names if step_of(name) is not None), key=lambda name: step_of(name) or 0)


def read_marker(store: Store, name: str) -> Marker:
    """Raises DataError for a marker that cannot be read or is of another format."""
    try:
        content = json.loads(store.read(f"{name}/{MARKER}"))
        if content.get("format") != FORMAT:
            raise ValueError(f"format {content.get('format')}, this version reads {FORMAT}")
        return Marker(**content)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"the checkpoint's marker is damaged: {error}", where=store.address(f"{name}/{MARKER}"), hint="delete it"
        ) from error


def read_state(store: Store, name: str) -> tuple[Marker, dict[str, Tensor]]:
    """Marker and tensors of a checkpoint, verified by size and SHA-256. Raises DataError where they differ."""
    marker = read_marker(store, name)
    content = store.read(f"{name}/{STATE}")
    where = store.address(f"{name}/{STATE}")
    hint = "use an older checkpoint, or delete this one"
    if len(content) != marker.bytes:
        raise DataError(f"the checkpoint has {len(content)} bytes, should have {marker.bytes}", where=where, hint=hint)
    if hashlib.sha256(content).hexdigest() != marker.sha256:
        raise DataError("the checkpoint's checksum is wrong", where=where, hint=hint)
    try:
        return marker, safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise DataError(f"the checkpoint cannot be read: {error}", where=where, hint=hint) from error


def newest_good(store: Store, warn: Callable[[str], None]) -> tuple[str, Marker, dict[str, Tensor]] | None:
    """The newest checkpoint that verifies. A damaged one is passed over with a warning for the one before it."""
    for name in reversed(complete(store)):
        try:
            return name, *read_state(store, name)
        except (DataError, NotFoundError) as error:
            warn(f"warning: checkpoint {name} is passed over: {error.what} ({error.where})")
    return None


def model_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The method's own tensors (student, teacher, centres) of a checkpoint's state, under their module names."""
    return {key.removeprefix("model/"): value for key, value in state.items() if key.startswith("model/")}


class Checkpoints:
    """The checkpoints of one run, as the loop uses them. Every rank calls every method."""

    def __init__(
        self,
        store: Store,
        config: CheckpointConfig,
        world: World,
        *,
        about: Mapping[str, Any],
        say: Callable[[str], None],
        replaces: Collection[str] = (),
    ) -> None:
        """`about`: the fields of `Marker` that do not change during a run. `replaces`: as `Manifest.replaces`."""
        self.store, self.config, self.world, self.say = store, config, world, say
        self.about, self.replaces = dict(about), replaces

    def due(self, step: int) -> bool:
        """Is it time to save after this many steps?"""
        return step % self.config.every_steps == 0 or self._kept(step)

    def save(self, step: int, samples: int, stepper: Stepper) -> None:
        """Write a checkpoint; return when it exists. The state file first, then the marker, then old ones go."""
        model, optimizer = stepper.model_state(), stepper.optimizer_state()
        if self.world.leads:
            self._write(step, samples, model, optimizer, stepper.scale)
            self._prune(step)
        self.world.wait()

    def restore(self, stepper: Stepper) -> tuple[int, str | None]:
        """(samples seen, name) of the newest good checkpoint after loading it; (0, None) where there is none."""
        chosen = None
        if self.world.leads:
            newest = newest_good(self.store, self.say)
            if newest is not None:
                where = self.store.address(newest[0])
                refuse_other_data(newest[1], self.about["manifest"], self.about["manifest_rows"], self.replaces,
                                  where=where)
                chosen = newest[0]
        chosen = self.world.tell(chosen)
        if chosen is None:
            return 0, None
        marker, state = read_state(self.store, chosen)
        stepper.load_model_state(model_tensors(state), where=self.store.address(chosen))
        stepper.load_optimizer_state(_optimizer_state(state, marker))
        stepper.scale = LossScale(**marker.loss_scale) if marker.loss_scale else first_scale(stepper.config.precision)
        return marker.samples, chosen

    def _write(
        self,
        step: int,
        samples: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, ParameterState],
        scale: LossScale | None,
    ) -> None:
        tensors = {f"model/{key}": value.detach().cpu().contiguous() for key, value in model.items()}
        for name, kept in optimizer.items():
            tensors |= {f"{key}/{name}": value.contiguous() for key, value in kept.tensors.items()}
        content = safetensors.torch.save({key: value.clone() for key, value in tensors.items()})
        marker = Marker(
            step=step,
            samples=samples,
            bytes=len(content),
            sha256=hashlib.sha256(content).hexdigest(),
            steps={name: kept.step for name, kept in optimizer.items()},
            loss_scale={} if scale is None else asdict(scale),
            time=time.time(),
            **self.about,
        )
        name = name_of(step)
        self.store.delete(f"{name}/{MARKER}")  # from an earlier, damaged try: its marker must not vouch for new bytes
        self.store.replace(f"{name}/{STATE}", content)
        self.store.replace(f"{name}/{MARKER}", json.dumps(asdict(marker), indent=1).encode())

    def _kept(self, step: int) -> bool:
        return self.config.keep_every_steps > 0 and step % self.config.keep_every_steps == 0

    def _prune(self, newest: int) -> None:
        """Remove what is neither among the last nor kept for evaluation, and what was never finished."""
        names = [name for name in complete(self.store) if (step_of(name) or 0) <= newest]
        staying = {name for name in names[-self.config.keep_last :]}
        staying |= {name for name in names if self._kept(step_of(name) or 0)}
        for entry in list(self.store.list()):
            name = entry.name.partition("/")[0]
            step = step_of(name)
            if step is not None and step <= newest and name not in staying:
                if name in names:
                    self.store.delete(f"{name}/{MARKER}")  # first: a half-removed checkpoint must not look complete
                self.store.delete(entry.name)


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


def _optimizer_state(state: Mapping[str, Tensor], marker: Marker) -> dict[str, ParameterState]:
    found: dict[str, dict[str, Tensor]] = {name: {} for name in marker.steps}
    for key, value in state.items():
        kind, _, name = key.partition("/")
        if kind != "model":
            found[name][kind] = value
    return {name: ParameterState(tensors, marker.steps[name]) for name, tensors in found.items()}


def describe(store: Store) -> Sequence[str]:
    """One line per complete checkpoint: name, samples, size, whether it verifies."""
    lines = []
    for name in complete(store):
        try:
            marker, _ = read_state(store, name)
            size = math.ceil(marker.bytes / 1e6)
            verdict = f"{marker.samples:>12,} samples  {size:>6,} MB  world {marker.world}  good"
        except (DataError, StorageError) as error:
            verdict = f"DAMAGED: {error.what}"
        lines.append(f"{name}  {verdict}")
    return lines
