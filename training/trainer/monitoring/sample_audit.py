"""A log of the samples that training really saw, for whoever wants to prove that none was lost or doubled."""

import json
from typing import Any

from training.core.run_folder.run_folder import RunFolder
from training.core.world import World
from training.methods.base import Method
from training.trainer.monitoring.observer import Observer, StepDone


class Audit(Observer):
    """Writes ranks/audit_00.jsonl of this rank: a line for each step that counted, from what reached the method's
    forward pass, micro-batch by micro-batch, padding left out."""

    def __init__(self, method: Method, folder: RunFolder, world: World) -> None:
        self._method, self._folder = method, folder
        self._name, self._world = f"ranks/audit_{world.rank:02d}.jsonl", world.size
        self._seen: dict[int, int] = {}

    def begin(self) -> None:
        self._method.register_forward_pre_hook(self._note)  # the rehearsal was no step

    def step(self, step: StepDone) -> None:
        start, after = step.batch.start, step.batch.after
        seen = {place: sample for place, sample in sorted(self._seen.items()) if start <= place < after}
        self._seen.clear()  # also of what went through forward in steps that were not carried out
        line = {"step": step.done, "world": self._world, "samples": [*seen.values()], "positions": [*seen]}
        self._folder.append(self._name, json.dumps(line))

    def _note(self, method: Method, inputs: tuple[Any, ...]) -> None:
        views = inputs[0]
        real = views["position"] >= 0
        self._seen.update(zip(views["position"][real].tolist(), views["sample"][real].tolist(), strict=True))
