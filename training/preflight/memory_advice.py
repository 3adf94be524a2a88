"""A run that is out of memory ends with one error that says what it needs, what there is, and what needs less. No
restart mends it: the same batch would ask for the same memory again."""

import contextlib
import dataclasses
import shlex
from typing import NamedTuple

from datapipe.core.errors import ConfigError
from training.config.batch_split import split_of
from training.config.run_config import RunConfig
from training.config.run_plan import sampling_of
from training.core.out_of_memory import GB, device_bytes, device_name, explained, first_line
from training.core.run_folder.run_folder import RunFolder
from training.core.world import World
from training.preflight.calculated import memory


def training_memory(config: RunConfig, world: World) -> contextlib.AbstractContextManager[None]:
    """Around all that a rank does: raises ConfigError where memory runs out, with the micro-batch, the calculated
    memory beside the device's, smaller settings and the dry run."""
    return explained(lambda error: _of_training(config, world, error))


class _Try(NamedTuple):
    """Settings that need less, as flags, and the bytes that they need."""

    flags: str
    needed: int


class _Rank:
    """What a rank of a recipe needs, and what it has."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self.config, self.world = config, world
        self.room = device_bytes(world)
        self._sizes = memory.census(config)

    @property
    def micro(self) -> int:
        """Images of a micro-batch."""
        return split_of(self.config, self.world.size).micro_batch

    def needed(self, config: RunConfig | None = None) -> int:
        """Bytes, as calculated, with the present settings or others that leave the model as it is."""
        cuda = self.world.device.type == "cuda"
        return memory.calculate(config or self.config, self._sizes, world=self.world.size, cuda=cuda).needed

    def tries(self) -> list[_Try]:
        """A smaller micro-batch, checkpointed blocks, a higher ZeRO stage: what fits, else what needs less."""
        config, tried = self.config, []
        tried += self._smaller()[:1]
        if not config.backbone.checkpoint_blocks:
            blocks = dataclasses.replace(config.backbone, checkpoint_blocks=True)
            changed = dataclasses.replace(config, backbone=blocks)
            tried.append(_Try("--backbone.checkpoint-blocks True", self.needed(changed)))
        if config.engine.stepper == "deepspeed" and config.engine.zero_stage < 2 and self.world.size > 1:
            changed = dataclasses.replace(config, engine=dataclasses.replace(config.engine, zero_stage=2))
            tried.append(_Try("--engine.zero-stage 2", self.needed(changed)))
        less = [one for one in tried if one.needed < self.needed()]
        return [one for one in less if one.needed <= self.room] or less

    def _smaller(self) -> list[_Try]:
        """Halved micro-batches, the largest first: those that fit, as far as that is known, else the smallest. Where
        the images of a batch are coupled the batch is halved, too, as it must stay whole."""
        tried = []
        for shift in range(1, self.micro.bit_length()):
            micro, optimisation = self.micro >> shift, self.config.optimisation
            changed = dataclasses.replace(optimisation, micro_batch=micro)
            flags = f"--optimisation.micro-batch {micro}"
            if self._sizes.couples:
                changed = dataclasses.replace(changed, batch=micro * self.world.size)
                flags = f"--optimisation.batch {changed.batch} {flags}"
            tried.append(_Try(flags, self.needed(dataclasses.replace(self.config, optimisation=changed))))
        return [one for one in tried if not self.room or one.needed <= self.room] or tried[-1:]


def _of_training(config: RunConfig, world: World, error: BaseException) -> ConfigError:
    rank = _Rank(config, world)
    needed = rank.needed()
    what = (f"out of memory on {device_name(world)}, rank {world.rank} of {world.size}: as calculated, this "
            f"configuration needs {needed / GB:.2f} GB on it")  # fmt: skip
    if rank.room and needed <= rank.room:
        what += ", which should fit: something else may hold the rest"
    tries = ", or ".join(f"{one.flags} ({one.needed / GB:.2f} GB)" for one in rank.tries())
    return ConfigError(
        f"{what} ({first_line(error)})",
        where=f"optimisation.micro_batch = {config.optimisation.micro_batch}, images at once on a rank: {rank.micro}",
        hint=(tries or "a device with more memory, or more workers") + _dry_run(config, rank),
    )


def _dry_run(config: RunConfig, rank: _Rank) -> str:
    """The command that lists what fits; fine-tuning has none."""
    if sampling_of(config) is not None:
        return ""
    saved = f"{config.out.rstrip('/')}/config.toml"
    recipe = saved if RunFolder(config.out, config.storage).read_text("config.toml") is not None else "RECIPE"
    words = ["python", "-m", "training", "pretrain", recipe, "--dry-run"]
    words += ["--gpu-memory-gb", f"{rank.room / GB:.2f}"] if rank.room else []
    if config.cluster.max_workers != rank.world.size:
        words += ["--cluster.max-workers", str(rank.world.size)]
    return f"; `{shlex.join(words)}` lists what fits"
