"""When crops are removed from a data set under way: what the run says of its data from then on."""

from dataclasses import replace

from datapipe.stream.loader import Loader
from datapipe.stream.training_data import Data
from training.checkpoint import Checkpoints
from training.core.host import run_lines
from training.core.run_folder.run_folder import RunFolder
from training.core.world import World
from training.trainer.monitoring.observer import Observer, StepDone
from training.trainer.provenance import environment


class DatasetRenewal(Observer):
    """Once a rank's loader reads another version of a data set, as it met a shard that is gone (see `Stream`), the
    others go over to it, too; checkpoints and environment.json name that one, and the log tells. Checkpoints from
    before are accepted: it replaces what they name. On every rank."""

    def __init__(self, loader: Loader, data: Data, checkpoints: Checkpoints, folder: RunFolder, world: World) -> None:
        self.loader, self.data, self.checkpoints, self.folder, self.world = loader, data, checkpoints, folder, world
        self._sought = 0

    def step(self, step: StepDone) -> None:
        stream = self.loader.stream
        newest = step.spent.intake.renewed
        if newest > max(stream.renewed, self._sought):
            self._sought = newest  # once: where this rank began later it has nothing to go over to
            stream.renew()
        sets = stream.manifests
        if all(now is before for now, before in zip(sets, self.data.sets, strict=True)):
            return
        files = [now.file for now, before in zip(sets, self.data.sets, strict=True) if now is not before]
        self.data = replace(self.data, sets=sets)
        self.checkpoints.about["manifest"] = self.data.id
        self.checkpoints.replaces = self.data.replaces
        if not self.world.is_leader:
            return
        now = environment(self.data, self.world)
        before = self.folder.read_record("environment.json")
        self.folder.write_json("environment.json", {**now, **before, "manifest": now["manifest"]})
        run_lines.info(
            f"step {step.done:,}: crops were removed from the data set: {', '.join(files)} is read from now on"
        )
