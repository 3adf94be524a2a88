"""When crops are removed from a data set under way: what the run says of its data from then on."""

from collections.abc import Callable
from dataclasses import replace

from datapipe.data import Data
from datapipe.loader import Batch, Loader
from training.checkpoint import Checkpoints
from training.engine.world import World
from training.provenance import environment
from training.run_folder import RunFolder


class Succession:
    """On the leading rank: once its loader reads another version of a data set (see `Stream`), checkpoints and
    environment.json name that one, and the log tells. Checkpoints from before are accepted: it replaces what they
    name. Ranks go over one by one, each when it meets a shard that is gone."""

    def __init__(
        self, loader: Loader, data: Data, checkpoints: Checkpoints, folder: RunFolder, world: World,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.loader, self.data, self.checkpoints, self.folder = loader, data, checkpoints, folder
        self.world, self.say = world, say

    def __call__(self, done: int, batch: Batch) -> None:
        """After each step."""
        sets = self.loader.stream.manifests
        if all(now is before for now, before in zip(sets, self.data.sets, strict=True)):
            return
        files = [now.file for now, before in zip(sets, self.data.sets, strict=True) if now is not before]
        self.data = replace(self.data, sets=sets)
        self.checkpoints.about["manifest"] = self.data.id
        self.checkpoints.replaces = self.data.replaces
        self.folder.write_json("environment.json", environment(self.data, self.world))
        self.say(f"step {done:,}: crops were removed from the data set: {', '.join(files)} is read from now on")
