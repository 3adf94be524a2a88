"""What is refused before processes start: settings that cannot work here, data, an older run in the same folder."""

import torch

from datapipe.core.errors import ConfigError
from training import methods
from training.config.batch_split import BatchSplit
from training.config.continuation import as_begun, look, refuse_changed_data, refuse_changed_settings
from training.config.run_config import RunConfig
from training.config.run_plan import RunPlan, plan_run
from training.core.precision import refuse_fp16_on_cpu
from training.core.run_folder.run_folder import RunFolder
from training.weights.initialise import refuse_missing


def check(config: RunConfig, ranks: int, machines: int = 1) -> RunPlan:
    """Everything that can be refused before processes start: settings, data, an older run in the same folder. `ranks`:
    of the run, the most that it may have where that changes; `machines` that they are on, where that is known.

    Returns what it is otherwise. Raises ConfigError, DataError or StorageError.
    """
    from datapipe.stream.training_data import load_data

    folder = RunFolder(config.out, config.storage)
    before = look(folder)
    plan = plan_run(as_begun(config, before), load_data(config.stream, config.storage), ranks, machines)
    config = plan.config
    if config.init.weights:
        refuse_missing(config.init, config.storage)
    refuse_changed_settings(config, before)
    refuse_changed_data(before, plan.data)
    folder.refuse_unwritable()
    return plan


def refuse_unsuited(config: RunConfig, device: torch.device) -> None:
    """Raises ConfigError for settings that this device or this engine cannot carry out; reads nothing."""
    refuse_fp16_on_cpu(config.optimisation.precision, device)
    engine = config.engine
    if config.backbone.compile_blocks is True and engine.stepper == "deepspeed" and engine.zero_stage == 3:
        raise ConfigError(
            "compile_blocks does not go with zero_stage 3: hooks fetch the parameters of every layer, so that a block "
            "falls into dozens of pieces, and compiling them gains nothing",
            where="backbone.compile_blocks, engine.zero_stage",
            hint="engine.zero_stage = 2, or backbone.compile_blocks = false",
        )


def refuse_split(config: RunConfig, split: BatchSplit, *, couples: bool) -> None:
    """Raises ConfigError where a batch must not be taken in micro-batches, or they cut groups of images that belong
    together. `couples`: see `Method.couples_batch`."""
    clusters = methods.of(config.method).by_cluster(config.method)
    asked = config.optimisation.micro_batch
    if clusters is not None and 0 < asked < clusters.group:
        raise ConfigError(
            f"{asked} images at once cut groups of {clusters.group} that batch norm takes together",
            where="optimisation.micro_batch, method.norm_group",
            hint=f"optimisation.micro_batch = {clusters.group} or more; or another method.norm_group",
        )
    if couples and split.per_rank > split.micro_batch:
        raise ConfigError(
            f"{config.method.name} couples the images of a batch (Sinkhorn targets, batch norm in the stem, mining), "
            f"so a batch cannot be taken in {split.per_rank // split.micro_batch} micro-batches",
            where="optimisation.micro_batch, method.targets, backbone.stem",
            hint=f"optimisation.micro_batch = 0 (here {split.per_rank} images at once), more workers, or targets and a "
            "stem that do not couple",
        )
