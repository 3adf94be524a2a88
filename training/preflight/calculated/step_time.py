"""How long a step takes on a machine, by part: pure arithmetic on a recipe and on what the machine can do.

    data        the loader makes a batch, and it is copied to the device; both beside the rest of the step, so that only
                what is longer counts
    normalise   views on the device
    teacher     forward pass of its backbone; its heads count with the others
    student     forward pass of its backbone and decoders
    heads, loss forward pass of heads, student's and teacher's, targets and loss, in float32
    backward    of student, heads and loss
    reduce      what ranks tell each other, as far as it does not go beside the rest: gradients, and parameters that are
                split or were stepped in parts
    after       norms, clipping, optimizer, moving average
    checkpoint  what the loop stands still for, spread over the steps between two

The device does one operation after the other. A matrix product takes what its operations take, or what moving its three
matrices takes, whichever is more; everything else takes what moving its numbers takes. The host launches operations
meanwhile: of the two, device and host, the slower one counts, part by part.

Where the constants come from is said at each. Checked against measurements of others on GPUs (timm's published rates of
ViT-T/S/B/L, `test_step_time.py`), and with whole steps by part on a CPU (`CPU_MOST`).
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

from training.config.batch_split import BatchSplit, split_of
from training.config.build import workload
from training.config.run_config import RunConfig
from training.core.world import World
from training.engine.overlapped_reduction import overlaps
from training.preflight.calculated.activation_memory import FULL
from training.preflight.calculated.communication import Traffic, traffic
from training.preflight.calculated.computation import Computation, Part, pixels, sum_of
from training.preflight.calculated.gpus import Gpu
from training.preflight.calculated.machine import BAD, GOOD, USUAL, Machine, machine_of
from training.preflight.calculated.memory import Census
from training.preflight.calculated.operations import backbone_format, float32_format, operations

SNAPSHOT = 0.5
"""Share of the rate between device and host that copies of a checkpoint reach: into fresh host memory, unpinned."""
VIEW_RATE = {"linear": 95e6, "area": 95e6, "bicubic": 70e6}
"""Pixels of finished views a second and core: 682 images a second with the eleven views of PASS by linear
interpolation (`make bench`, one core of a server of 2023), 500 by bicubic: 1.7 times the 293 of Pillow, which runs of
earlier versions of the views' rules go on with. JPEG decoding included."""
CORES = 12
"""Cores of the host for each GPU that are assumed, as machines for training have 8 to 16."""
GPU_ERROR = (
    "forward rates of ViT-T/S/B/L on RTX 3090, 4090 and 5090 (timm's, published) are 0 to 30 % faster than it says, "
    "training on the 3090 1 % slower to 9 % faster (ViT-T: 26 % slower); steps of these recipes were measured on no GPU"
)
CPU_LEAST, CPU_MOST = 0.9, 1.6
"""How long steps on CPUs take at least and at most, over what is calculated. Measured, one thread, a CPU with AMX:
PASS ViT-S, 4 images, 1.34 times as long in fp32 and 1.40 in bf16 (teacher 1.2 and .95, student 1.4 and 1.6, heads and
loss 3.4 and 3.5, backward 1.2 and 1.2, after 1.1 and 1.0 times), PersonMAE ViT-S, 8 images, fp32, 1.11 times: softmax
takes more than its traffic there."""
CPU_ERROR = (
    "calculated from products and memory traffic measured here; steps that were measured take 1.1 (PersonMAE ViT-S) to "
    "1.4 times (PASS ViT-S) as long as it says"
)


class StepTime(NamedTuple):
    """One step of the whole run."""

    parts: dict[str, Part]
    """By name, in order; without data."""
    data_s: float
    """What the loader takes for a batch, or its copy to the device, whichever is more."""
    images: int
    """Of the global batch."""
    flops: float
    """Operations of the global batch, nothing counted twice."""

    @property
    def computing_s(self) -> float:
        """Without waiting for data."""
        return sum(part.seconds for part in self.parts.values())

    @property
    def seconds(self) -> float:
        return max(self.computing_s, self.data_s)

    @property
    def images_per_s(self) -> float:
        return self.images / self.seconds

    def seconds_of(self) -> dict[str, float]:
        """Seconds by part; "data": what the rest waits for it."""
        waits = self.seconds - self.computing_s
        return {"data": waits} | {name: part.seconds for name, part in self.parts.items()}

    def limits(self) -> dict[str, float]:
        """Seconds of a step by what takes them, most first."""
        found = dict.fromkeys(("matrix products", "memory traffic", "launches", "communication and copies"), 0.0)
        for part in self.parts.values():
            launched = part.launch > part.products + part.memory
            found["launches"] += part.launch if launched else 0.0
            found["matrix products"] += 0.0 if launched else part.products
            found["memory traffic"] += 0.0 if launched else part.memory
            found["communication and copies"] += part.links
        found["data"] = self.seconds - self.computing_s
        return dict(sorted(found.items(), key=lambda one: -one[1]))


class Forecast(NamedTuple):
    """Time of a step on one kind of machine: as is usual, and the least and the most that is likely."""

    machine: str
    usual: StepTime
    least_s: float
    most_s: float
    peak: float
    """Operations a second of all ranks by datasheet; 0: not known."""
    error: str
    """Where the figures are from, and how far off they may be."""

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilisation; None where there is no datasheet."""
        return self.usual.flops / self.usual.seconds / self.peak if self.peak else None

    @property
    def limit(self) -> str:
        """What takes most of a step."""
        return next(iter(self.usual.limits()))


class Share(NamedTuple):
    """A rank's part of the work, and who it works with."""

    world: int
    machines: int
    """That the ranks are on."""
    cores: float
    """Of the host, for the loader of a rank."""


def step_time(config: RunConfig, sizes: Census, machine: Machine, share: Share) -> StepTime:
    """The time of a step of the run."""
    split = split_of(config, share.world)
    micros = split.micro_batches
    work = workload(config, split.micro_batch)
    how = Computation(config, machine, float32_format(config))
    once: dict[str, Part] = {
        "normalise": how.normalise(split.micro_batch),
        "teacher": sum_of(how.stack(stack, learns=False) for stack in work.teacher) + how.lowered(sizes.teacher),
        "student": how.student(work),
        "heads, loss": how.heads(work, sizes),
        "backward": how.backward(work, sizes),
    }
    parts = {name: part.times(micros) for name, part in once.items()}
    parts["student"] += how.casts(sizes, micros)
    parts["reduce"] = _reduce(config, sizes, machine, share, once)
    parts["after"] = how.after(sizes, share.world)
    parts["checkpoint"] = _checkpoint(config, sizes, machine, share)
    images = config.optimisation.batch
    flops = operations(workload(config, images), config.backbone).total
    copied_s = 3 * pixels(config, split.per_rank) / machine.host
    return StepTime(parts, max(data_seconds(config, split, share.cores), copied_s), images, flops)


def forecast(config: RunConfig, sizes: Census, gpu: Gpu, share: Share) -> Forecast:
    """The time of a step on GPUs of a kind, by its datasheet."""
    usual, good, bad = (step_time(config, sizes, machine_of(gpu, one), share) for one in (USUAL, GOOD, BAD))
    peak = share.world * gpu.peak(backbone_format(config))
    return Forecast(gpu.name, usual, good.seconds, bad.seconds, peak, f"calculated from the {gpu.source}: {GPU_ERROR}")


def forecast_here(config: RunConfig, sizes: Census, machine: Machine, share: Share) -> Forecast:
    """The time of a step on CPUs as they were measured."""
    usual = step_time(config, sizes, machine, share)
    return Forecast(machine.name, usual, CPU_LEAST * usual.seconds, CPU_MOST * usual.seconds, 0.0, CPU_ERROR)


def data_seconds(config: RunConfig, split: BatchSplit, cores: float) -> float:
    """What the loader of a rank takes for its part of a batch, with so many cores."""
    return pixels(config, split.per_rank) / (VIEW_RATE[config.views.interpolation] * max(cores, 1e-9))


def _reduce(config: RunConfig, sizes: Census, machine: Machine, share: Share, once: Mapping[str, Part]) -> Part:
    """What a step waits for: all that is sent but what goes beside the computation of micro-batches (`once`: the parts
    of one), of which at least the last bucket has nothing left to go beside. In a ring two ranks of a machine pass on
    as much as two machines do; of the two the slower link counts."""
    if share.world == 1:
        return Part()
    micros = split_of(config, share.world).micro_batches
    deepspeed = config.engine.stepper == "deepspeed"
    stage = config.engine.zero_stage if deepspeed else None
    sent = traffic(
        trained=sizes.trained, parameters=sizes.parameters, stage=stage, reduction=config.optimisation.reduction,
        ranks=share.world, machines=max(2, share.machines), micro_batches=micros,
    )  # fmt: skip
    gradients_s, parameters_s = (_sent_s(one, machine, share) for one in (sent.gradients, sent.parameters))
    beside_s = 0.0
    if machine.streams and stage == 3:
        beside_s = micros * sum(part.seconds for part in once.values())
        gradients_s, parameters_s = gradients_s + parameters_s, 0.0
    elif machine.streams and overlaps(World(size=share.world, device=torch.device("cuda")), stage or 0):
        beside_s = (micros if stage == 2 else 1) * once["backward"].seconds
    last_s = gradients_s * min(1.0, config.engine.bucket / sizes.trained) / (micros if (stage or 0) > 1 else 1)
    exposed_s = max(gradients_s - beside_s, last_s) if beside_s else gradients_s
    return Part(links=exposed_s + parameters_s)


def _sent_s(sent: int, machine: Machine, share: Share) -> float:
    inside_s = sent / machine.link
    return inside_s if share.machines == 1 else max(inside_s, Traffic(sent, 0).seconds(machine.network))


def _checkpoint(config: RunConfig, sizes: Census, machine: Machine, share: Share) -> Part:
    """A rank's share of weights, moments and buffers copied to the host while the loop stands still."""
    every = config.checkpoints.every_steps or config.checkpoints.keep_every_steps
    if not every:
        return Part()
    moments = 1 if config.optimisation.optimizer == "sgd" else 2
    numbers = sizes.parameters + moments * sizes.trained + sizes.buffers
    rate = SNAPSHOT * machine.host if math.isfinite(machine.host) else SNAPSHOT * machine.stream
    return Part(links=FULL * numbers / share.world / rate / every)
