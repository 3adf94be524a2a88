"""A short pre-training on real crops, and zero-shot scores on other ones before and after it.

    crops -> shards (`datapipe.ingest`) -> batches (`datapipe.stream.loader`) -> steps (`training.trainer.loop`)
          -> checkpoint -> scores (`training.evaluation.evaluation`)

A recipe's own views, step and schedules; the run is as long as there is time, and schedules are those of the whole run.
Needs more packages than batches of noise do (`NEEDED`), no Ray, DeepSpeed, boto3 or webdataset; without simplejpeg
Pillow decodes, and that is said.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from time import monotonic, perf_counter
from typing import Any, NamedTuple

import torch

from datapipe.core.config import ShardConfig, StorageConfig, StreamConfig
from datapipe.core.errors import ConfigError, DataError
from tests.bench.gpu import pillow_jpeg
from tests.bench.gpu.checks import Check
from tests.bench.gpu.settings import full, settled
from tests.bench.gpu.trial import Loaded, Trial
from training import methods
from training.config import recipe_toml
from training.config.build import allows_tf32, build_method
from training.config.run_config import RunConfig
from training.config.run_plan import RunPlan, make_loader, plan_run
from training.core.precision import tf32_products
from training.core.world import World
from training.methods.base import Method
from training.preflight.calculated.memory import census

NEEDED = {"cv2": "opencv-python-headless", "pyarrow": "pyarrow", "scipy": "scipy", "xxhash": "xxhash"}
"""Module -> package, of what real crops need beside what noise does."""
RECIPE = "pass_vits"
SECONDS = 90.0
"""That steps take; the start, shards and scores come on top."""
NO_CROPS = "no crops are given: --crops FOLDER (make bench-gpu CROPS=FOLDER)"
FIRST = 3
"""Steps that say nothing of the rate: the first views, kernels that are chosen."""
TRIED = 8
"""Steps that tell how many there is time for."""
LATE = 1.5
"""Times the planned seconds at which the run is stopped, however far it has come."""
WARM_UP = 0.1
"""Share of the run in which the learning rate rises."""
TRAIN, QUERY = "bounding_box_train", "query"
"""Folders of the Market-1501 layout."""
SHOWN = ("mAP", "rank1")


class Request(NamedTuple):
    """What is asked for."""

    crops: str
    """Folder of crops to train on; of a labelled set the part that is there for it."""
    scored: str
    """Folder of a labelled set, whose query and gallery are scored; empty: `crops`."""
    recipe: str = RECIPE
    seconds: float = SECONDS
    steps: int = 0
    """In place of `seconds`; 0: as many as there is time for."""


@dataclass(frozen=True)
class CropSets:
    """Crops to train on, as shards, and others to score on."""

    manifest: str
    rows: int
    scored: str
    by_pillow: bool
    """Are JPEGs decoded by Pillow, for want of simplejpeg?"""


class Pace(NamedTuple):
    """How steps went, after the first ones."""

    ends: list[float]
    """When each step was over, seconds of one clock; the first entry is the beginning."""
    waited_s: list[float]
    """What each waited for its batch; one less."""

    def figures(self, images: int) -> dict[str, float]:
        """`images`: of a step."""
        whole = self.ends[-1] - self.ends[0]
        each = [later - one for one, later in zip(self.ends, self.ends[1:], strict=False)]
        return {
            "images_per_s": images * len(each) / whole, "ms": 1_000 * statistics.median(each),
            "data_wait": sum(self.waited_s) / whole, "data_wait_ms": 1_000 * statistics.median(self.waited_s),
        }  # fmt: skip


def missing() -> str:
    """What packages real crops lack here; empty: nothing."""
    return " ".join(package for module, package in NEEDED.items() if find_spec(module) is None)


def recipe_of(names: Sequence[str]) -> str:
    """The first of the recipes that pre-trains: learns from no labels, given or made. Empty: none."""
    return next((name for name in names if _pre_trains(settled(name))), "")


def _pre_trains(config: RunConfig) -> bool:
    method = methods.of(config.method)
    return not method.fine_tunes and method.by_identity(config.method) is None


def prepare(request: Request, folder: Path) -> CropSets:
    """Check what is to be scored, and shard what is to be trained on into `folder`. Raises UserError."""
    by_pillow = pillow_jpeg.stand_in()  # before what imports simplejpeg
    from datapipe.ingest.pipeline import ingest_sources
    from datapipe.sources.folder import FolderSource
    from datapipe.sources.location import find_place
    from datapipe.storage import full_url
    from training.evaluation.evaluation import open_data
    from training.reid.settings import ScoringConfig

    scored = request.scored or request.crops
    for name in dict.fromkeys((request.crops, scored)):
        if not Path(name).is_dir():
            raise DataError("there is no such folder", where=name, hint="--crops FOLDER of images of people")
    train = Path(request.crops, TRAIN) if Path(request.crops, TRAIN).is_dir() else Path(request.crops)
    if Path(train, QUERY).is_dir():
        raise DataError(f"a test set alone: there is no {TRAIN}", where=str(train),
                        hint="--crops FOLDER_OF_OTHER_CROPS --scored this one")  # fmt: skip
    if Path(scored).resolve().is_relative_to(train.resolve()):
        raise ConfigError("what is scored would be trained on", where=scored,
                          hint="--scored FOLDER with query and bounding_box_test of other people")  # fmt: skip
    test = open_data(scored, StorageConfig(), ScoringConfig())
    if len({*test.query.pids.tolist(), *test.gallery.pids.tolist()}) < 2:
        raise DataError("all images that are scored are of one identity: any order of them is right", where=scored,
                        hint="score on a set of several people")  # fmt: skip
    # in this process: others would not have what stands in for simplejpeg
    config, storage, url = ShardConfig(workers=1), StorageConfig(), full_url(str(train))
    source = FolderSource.at(find_place(url, train.name, storage, config.jpeg_quality))
    if source is None:
        raise DataError("there are no images to train on", where=url, hint="--crops FOLDER of images of people")
    made = ingest_sources([source], str(folder / "shards"), config, storage).manifest
    return CropSets(str(folder / "shards"), made.rows, scored, by_pillow)


def configured(request: Request, sets: CropSets, folder: Path, memory: int, *, tiny: bool) -> RunConfig:
    """The recipe with one micro-batch a step that fits into `memory` bytes, on these crops, for one step."""
    config = settled(request.recipe, tiny=tiny)
    batch_before, lr = config.optimisation.batch, config.optimisation.lr
    config = full(request.recipe, config, census(config), memory)
    batch = min(config.optimisation.batch, sets.rows)
    optimisation = replace(config.optimisation, batch=batch, micro_batch=batch, lr=lr * batch / batch_before)
    return replace(
        config, optimisation=optimisation, out=str(folder), samples_per_epoch=sets.rows,
        stream=StreamConfig(manifest=sets.manifest, prefetch=config.stream.prefetch),
        checkpoints=replace(config.checkpoints, every_steps=0, keep_every_steps=0, keep_every_epochs=0.0),
    )  # fmt: skip


def of_steps(config: RunConfig, steps: int) -> RunConfig:
    """The recipe over so many steps: all that is scheduled is over at their end."""
    epochs = steps * config.optimisation.batch / config.samples_per_epoch
    optimisation = replace(config.optimisation, epochs=epochs, warmup_epochs=WARM_UP * epochs)
    return replace(config, optimisation=optimisation)


def pretrained(
    request: Request, sets: CropSets, folder: Path, device: torch.device, *, tiny: bool = False,
    make: Callable[[RunPlan, World], Any] = make_loader,
) -> Check:  # fmt: skip
    """Pre-train and score; leaves a run folder in `folder`, which `python -m training evaluate` takes. Fails where a
    loss or a gradient is not finite: how much is learnt in so short a time has no bound. `make`: the loader."""
    from training.core.run_folder.run_folder import RunFolder
    from training.evaluation.evaluation import headline
    from training.reid.settings import RANDOM
    from training.reid.zero_shot import Weights

    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 1 << 62
    config = configured(request, sets, folder, memory, tiny=tiny)
    initial = build_method(config)
    steps = request.steps
    with tf32_products(allows_tf32(config)):
        if not steps:
            _, pace = _run(of_steps(config, TRIED), initial, device, make)
            steps = max(1, int(1_000 * request.seconds / pace.figures(1)["ms"]))
        config = of_steps(config, steps)
        trial, pace = _run(config, initial, device, make, into=RunFolder(str(folder), StorageConfig()),
                           seconds=0.0 if request.steps else LATE * request.seconds)  # fmt: skip
    done, losses, seen = trial.position // trial.batch, trial.losses, trial.run.loader.intake
    figures: dict[str, Any] = {
        "recipe": request.recipe, "precision": config.optimisation.precision, "images": trial.batch,
        "crops": sets.rows, "steps": done, "planned_steps": steps, **pace.figures(trial.batch),
        "loss": [losses[0], losses[-1]], "loader_threads": getattr(trial.run.loader, "threads", None),
        "reading_share": seen.reading_s / max(seen.reading_s + seen.making_s, 1e-9),
        "decoder": "Pillow" if sets.by_pillow else pillow_jpeg.SIMPLEJPEG,
    }  # fmt: skip
    samples = trial.position
    del trial
    scores = {
        when: _score(config, sets, weights, device)
        for when, weights in (("before", Weights(RANDOM, 0, 0)), ("after", Weights(_name(done), done, samples)))
    }
    figures |= {when: headline(found) for when, found in scores.items()}
    figures |= {key: scores["after"][key] for key in ("headline", "queries", "gallery", "set")}
    lacks = {} if not sets.by_pillow else {"decoding by simplejpeg": "it is not installed; Pillow takes longer"}
    return Check(True, "", figures, lacks)


def _run(
    config: RunConfig, initial: Method, device: torch.device, make: Callable[[RunPlan, World], Any], *,
    into: Any = None, seconds: float = 0.0,
) -> tuple[Trial, Pace]:  # fmt: skip
    """All steps of the recipe, and a checkpoint in a run folder `into`; stopped after `seconds`; 0: never."""
    from datapipe.stream.training_data import load_data
    from training.trainer.provenance import about

    world = World(device=device)
    plan = plan_run(config, load_data(config.stream, config.storage), 1)
    store = None
    if into is not None:
        into.write_soon("config.toml", recipe_toml.to_toml(config))
        store = into.at("checkpoints")
    with make(plan, world) as loader:
        data = Loaded(loader, plan.data.rows, about(plan, world, {}))
        trial = Trial(config, initial, device, precision=config.optimisation.precision, store=store, data=data)
        ends, late = [perf_counter()], monotonic() + seconds

        def over() -> None:
            ends.append(perf_counter())
            if seconds and monotonic() > late:
                trial.stop()

        trial.each_step = over
        trial.until(plan.clock.total_steps, save=store is not None)
    first = min(FIRST, len(ends) - 2)  # of a run of few steps all but the last
    return trial, Pace(ends[first:], trial.waited_s[first:])


def _name(step: int) -> str:
    from training.checkpoint import name_of

    return name_of(step)


def _score(config: RunConfig, sets: CropSets, weights: Any, device: torch.device) -> dict[str, Any]:
    """The content of metrics.json of these weights."""
    from training.evaluation.evaluation import ScoringTask, score

    task = ScoringTask(config.out, sets.scored, weights, config.storage)
    return score(task, threads=torch.get_num_threads(), device=device)
