"""What a run folder says of its run: the command that goes on, settings, versions, data, and the first views."""

import os
import platform
import shlex
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from datapipe.core.resource_limits import available_cores
from datapipe.sampling.epoch_order import ORDER_VERSION
from datapipe.stream.preview import hide, view_sheet
from datapipe.stream.training_data import Data
from datapipe.views.render import make_views
from training import methods
from training.config import bicubic
from training.config import recipe_toml as recipes
from training.config.build import deepspeed_json, training_views
from training.config.run_config import RunConfig
from training.config.run_plan import RunPlan
from training.core.run_folder.run_folder import RunFolder, as_json
from training.core.world import World
from training.trainer.determinism import guarantee


def about(plan: RunPlan, world: World, origin: dict[str, Any]) -> dict[str, Any]:
    """What every checkpoint's marker repeats."""
    config = plan.config
    return {
        "manifest": plan.data.id,
        "manifest_rows": plan.data.rows,
        "seed": config.seed,
        "batch": config.optimisation.batch,
        "world": world.size,
        "config": recipes.to_tree(config),
        "versions": versions() | methods.package_of(config.method.name),
        "origin": origin,
    }


def describe(plan: RunPlan, folder: RunFolder, world: World) -> None:
    """Write everything that is known before the first step; on object storage before the first checkpoint exists."""
    config = plan.config
    folder.write_soon("command.txt", shlex.join(resume_command(config)) + "\n")
    folder.write_soon("config.toml", recipes.to_toml(config))
    if config.engine.stepper == "deepspeed":
        folder.write_soon("deepspeed.json", as_json(deepspeed_json(config, world, plan.split)))
    where = environment(plan.data, world) | {"guarantee": guarantee(config, world)}
    where["versions"] |= methods.package_of(config.method.name)
    folder.write_soon("environment.json", as_json(where))
    folder.write_soon("views.json", training_views(config).to_json() + "\n")


def show_first_batch(plan: RunPlan, folder: RunFolder) -> None:
    """Write the picture of what training sees first."""
    folder.write_soon("first_batch.jpg", view_sheet(first_views(plan, count=8)))


def first_views(plan: RunPlan, *, count: int) -> dict[str, np.ndarray]:
    """The views of the first samples of the stream, uint8 [V, count, H, W, 3]: the pixels that training sees,
    patches that are hidden from the student in grey."""
    positions = np.arange(count, dtype=np.int64)
    config, spec = plan.config, plan.spec
    out = {group.name: np.zeros(spec.shape(group, count), np.uint8) for group in spec.groups}
    make_views(plan.stream.peek(plan.order().samples(positions)), spec, config.seed, positions, out,
               resize=bicubic.fastest())  # fmt: skip
    hide(out, spec, config.seed, positions)
    return out


def versions() -> dict[str, str]:
    """Versions of what decides pixels and numbers."""
    names = ("reid-pretraining", "torch", "timm", "deepspeed", "ray", "numpy", "opencv-python-headless", "simplejpeg",
             "pillow", "pyarrow")  # fmt: skip
    version_of = {"python": platform.python_version(), "order": str(ORDER_VERSION)}
    for name in names:
        try:
            version_of[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            version_of[name] = "absent"
    return version_of


def environment(data: Data, world: World) -> dict[str, Any]:
    """Where, on what and from which data and code a run is made."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.processor() or "cpu"
    return {
        "versions": versions(),
        "git": _git(),
        "world": world.size,
        "device": device,
        "cores": available_cores(),
        "device_type": world.device.type,
        "platform": platform.platform(),
        "manifest": _described(data),
    }


def _described(data: Data) -> dict[str, Any]:
    """The data set; of a mix what holds for all together, and each under `sets`."""
    sets: list[dict[str, Any]] = [
        {"id": manifest.id, "name": manifest.name, "rows": manifest.rows, "shards": len(manifest.shards),
         "bytes": manifest.bytes,
         "version": manifest.version, "url": manifest.url, "licence": manifest.licence,
         "notes": list(manifest.notes)}
        for manifest in data.sets
    ]  # fmt: skip
    if len(sets) == 1:
        return sets[0]
    total = {key: sum(part[key] for part in sets) for key in ("rows", "shards", "bytes")}
    names = {key: "; ".join(dict.fromkeys(part[key] for part in sets if part[key])) for key in ("url", "licence")}
    notes = list(dict.fromkeys(note for part in sets for note in part["notes"]))
    parts = [{**part, "weight": weight} for part, weight in zip(sets, data.weights, strict=True)]
    return {"id": data.id, **total, **names, "notes": notes, "sets": parts}


def _git() -> str:
    """The revision of this code; "unknown" where it is installed, which may be inside somebody else's working tree."""
    here = Path(__file__)
    outputs = []
    for words in (["ls-files", "--error-unmatch", here.name], ["describe", "--always", "--dirty", "--abbrev=12"]):
        try:
            done = subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, timeout=10,
                                  check=False)  # fmt: skip
        except OSError:
            return "unknown"
        if done.returncode:
            return "unknown"
        outputs.append(done.stdout.strip())
    return outputs[-1] or "unknown"


def resume_command(config: RunConfig) -> list[str]:
    """The command that goes on with the run, from its own saved recipe."""
    entry = os.environ.get("REID_ENTRY", "training").split()
    return ["python", "-m", *entry, "pretrain", f"{config.out.rstrip('/')}/config.toml"]
