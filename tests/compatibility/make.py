"""What an earlier version wrote, for `test_compatibility`: a data set and a run that was stopped on its way.

Made once, by the version whose files they are: in a checkout of commit cb3f6dc,

    python make.py tests/compatibility/written

with this file beside it. In that folder: `shards/`, a data set of generated crops; `run/`, a run on it that SIGTERM
stopped after STOP steps; `undisturbed.json`, the loss of every step of the same run when it is left alone.
"""

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path

CROPS, STEPS, STOP = 20, 20, 9
SMALLER = {"width = 24": "width = 12", "depth = 2": "depth = 1", "out_dim = 32": "out_dim = 16",
           "hidden = 24": "hidden = 12"}  # fmt: skip


def make(folder: Path) -> None:
    """Write all of it below `folder`, which must not exist."""
    jpegs = import_module("tests.datapipe.crop_set").jpegs  # modules as they are called in that version
    tiny = import_module("tests.end_to_end.tiny")
    load, pretrain = import_module("training.config").load, import_module("training.trainer.pretrain").pretrain
    alone = import_module("training.core.world").World()
    (folder / "crops").mkdir(parents=True)
    for row, data in enumerate(jpegs(CROPS)):
        (folder / "crops" / f"{row // 2:04d}_c{row % 2 + 1}s1_{row:06d}_00.jpg").write_bytes(data)
    manifest = tiny.shards(folder / "crops", str(folder / "shards")).url
    for name, stop in (("undisturbed", 0), ("run", STOP)):
        text = tiny.RECIPE.format(out=folder / name, manifest=manifest, epochs=STEPS * 6 / CROPS)
        for before, after in SMALLER.items():
            text = text.replace(before, after)
        (folder / "recipe.toml").write_text(text)
        pretrain(load(str(folder / "recipe.toml")), world=alone, host=tiny.StoppingHost(stop))
    losses = {record["step"]: record["loss"] for record in tiny.step_records(folder / "undisturbed")}
    (folder / "undisturbed.json").write_text(json.dumps(losses, indent=1))
    for name in ("crops", "undisturbed", "run/tensorboard"):
        shutil.rmtree(folder / name)
    (folder / "recipe.toml").unlink()


if __name__ == "__main__":
    make(Path(sys.argv[1]).resolve())
