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
ViT-T/S/B/L, `tests/training/preflight/test_step_time.py`), and with whole steps by part on a CPU (`CPU_MOST`).
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from training.config.batch_split import BatchSplit, split_of
from training.config.build import view_spec, workload
from training.config.run_config import RunConfig
from training.core.world import World
from training.engine.overlapped_reduction import overlaps
from training.nn.heads import HeadConfig
from training.nn.vision_transformer import BackboneConfig
from training.nn.workload import Decoding, Scored, Stack, Workload
from training.preflight.activation_memory import FULL
from training.preflight.communication import GBIT_S, Traffic, traffic
from training.preflight.gpus import GIGA, Format, Gpu
from training.preflight.memory import Census
from training.preflight.operations import backbone_format, block_flops, float32_format, operations

# ------------------------------------------------------------------------------------------------------- constants

TRAFFIC = {"fp32": (72, 168), "lowered": (64, 152)}
"""Bytes that everything but products moves in a block for every token and channel, forward and backward, one kernel for
each operation: two layer norms, two residual sums, GELU over four times the channels, and under autocast the casts in
front of products. Counted from shapes: a tensor that an operation reads or writes counts with its size."""
COMPILED = 0.64
"""What is left of it where torch.compile fuses the operations of a block, counted likewise."""
DROP_PATH = 8
"""Bytes more, forward and backward each, where branches are scaled by drop path's factors: two products."""
SOFTMAX = 4, 6
"""How often attention weights are read or written, forward and backward, where no fused kernel keeps them on chip."""
STUDENT_PASSES, TEACHER_PASSES, PROTOTYPE_PASSES = (11, 6), 8, (2, 4)
"""How often a step reads or writes all logits of the student's heads (forward, backward), of the teacher's, and all
prototypes (forward, backward), in float32: temperature, softmax, targets, centre, loss and their gradients; prototypes
at unit length."""
ADAM, SGD, NORMS, AVERAGE = 28, 28, 12, 12
"""Bytes moved for each number that is stepped (AdamW in one kernel; SGD with momentum), for norms and clipping, and for
each number of the teacher."""
LAUNCHES = {"fp32": (10, 20), "lowered": (12, 24)}
"""Operations that a block launches, forward and backward (`test_step_time.py` counts them, as those that follow)."""
LAUNCHES_OF_CASTS = 8
"""More under autocast for each block of a network: its weights and biases, those of the student once in a step, the
teacher's in each micro-batch; gradients in each."""
LAUNCHES_OF_DROP_PATH = 5, 8
"""More for each block where branches are scaled by drop path's factors."""
LAUNCHES_OF_STACK, LAUNCHES_OF_HEAD, LAUNCHES_OF_LOSS = (20, 14), (39, 50), (10, 0)
"""Of what a backbone has beside blocks, for views of one size; of one head with its targets and loss; of the rest."""
LAUNCHES_OF_VIEWS = 12
"""Of a micro-batch's copies and normalisation."""
LAUNCHES_OF_DECODER, LAUNCHES_OF_DECODER_BLOCK = (20, 10), {"fp32": (40, 50), "lowered": (63, 76)}
"""Of a decoder beside its blocks, with its part of the loss; of one of its blocks."""
LAUNCHES_AFTER = 60
"""After the backward pass, at most."""
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


class Machine(NamedTuple):
    """What one rank has, as far as it is reached."""

    name: str
    products: Mapping[Format, float]
    """Operations a second in large matrix products."""
    attention: float
    """Share of that in attention's products, which are small."""
    memory: float
    """Bytes a second that norms, sums, softmax and activations move."""
    stream: float
    """Bytes a second that an optimizer moves through its long vectors."""
    launch_s: float
    """Seconds of the host for an operation; 0: the host is the device."""
    link: float
    """Bytes a second that a rank sends to others of its machine."""
    network: float
    """Gb/s that a machine sends to others."""
    host: float
    """Bytes a second from the host's memory; infinite: nothing is copied."""
    fused: bool = True
    """Does a fused kernel do attention?"""

    @property
    def streams(self) -> bool:
        """Can it communicate beside its computation, as a GPU can?"""
        return self.launch_s > 0


class Reached(NamedTuple):
    """How much of datasheets is reached, and what datasheets do not say."""

    products: float
    attention: float
    memory: float
    link: float
    host: float
    launch_s: float
    network: float


USUAL = Reached(0.78, 0.5, 0.88, 0.75, 0.8, 10e-6, GBIT_S)
GOOD = Reached(1.0, 0.8, 0.97, 0.85, 0.9, 6e-6, 4 * GBIT_S)
BAD = Reached(0.55, 0.3, 0.7, 0.5, 0.6, 17e-6, GBIT_S / 2)
"""Large products reach 0.7 to 0.8 of a dense datasheet rate (A100 0.79, B200 0.75, V100 0.86 in float32, published
measurements), streams 0.9 (H100), collectives 0.7 to 0.8 of links. An operation takes the host 6 to 17 microseconds:
13 to 14 for ours, measured with kernels that take no time. The network is not of the GPU. Time with GOOD and with BAD
is the range that is told."""


def machine_of(gpu: Gpu, reached: Reached = USUAL) -> Machine:
    """A rank with this GPU. Formats that it has no units for go by float32."""
    formats: tuple[Format, ...] = ("fp32", "tf32", "bf16", "fp16")
    rates = {one: reached.products * (gpu.peak(one) or gpu.peak("fp32")) for one in formats}
    return Machine(
        name=gpu.name, products=rates, attention=reached.attention, memory=reached.memory * gpu.memory * GIGA,
        stream=reached.memory * gpu.memory * GIGA, launch_s=reached.launch_s, link=reached.link * gpu.link * GIGA,
        network=reached.network, host=reached.host * gpu.host * GIGA,
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------- what it is


class Part(NamedTuple):
    """Seconds of a part of a step, by what takes them."""

    products: float = 0.0
    """Matrix products, as far as operations bound them."""
    memory: float = 0.0
    """Moving numbers between a device and its memory."""
    launch: float = 0.0
    """The host's time to launch all of it, at the same time."""
    links: float = 0.0
    """Moving numbers between devices, or from and to the host."""

    @property
    def seconds(self) -> float:
        return max(self.products + self.memory, self.launch) + self.links

    def __add__(self, other: "Part") -> "Part":  # type: ignore[override]
        return Part(*(one + another for one, another in zip(self, other, strict=True)))

    def times(self, count: float) -> "Part":
        """So many of it."""
        return Part(*(count * one for one in self))


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
    how = _How(config, machine, float32_format(config))
    once: dict[str, Part] = {
        "normalise": how.normalise(split.micro_batch),
        "teacher": _sum(how.stack(stack, learns=False) for stack in work.teacher) + how.lowered(sizes.teacher),
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


def pixels(config: RunConfig, images: int) -> int:
    """Pixels of all views of so many images."""
    spec, count = view_spec(config), 0
    for group in spec.groups:
        views, _, height, width, _ = spec.shape(group, images)
        count += views * images * height * width
    return count


# ---------------------------------------------------------------------------------------------------------- its parts


class _How(NamedTuple):
    """Parts of a micro-batch on a machine."""

    config: RunConfig
    machine: Machine
    head_format: Format

    @property
    def format(self) -> Format:
        """What products of the backbone multiply."""
        return backbone_format(self.config)

    @property
    def kind(self) -> str:
        return "fp32" if self.config.optimisation.precision == "fp32" else "lowered"

    def normalise(self, images: int) -> Part:
        """uint8 to float32."""
        values = 3 * pixels(self.config, images)
        return Part(0.0, values * (1 + 2 * FULL) / self.machine.memory, LAUNCHES_OF_VIEWS * self.machine.launch_s)

    def lowered(self, numbers: int) -> Part:
        """The weights of a network cast for products."""
        if self.kind == "fp32" or not numbers:
            return Part()
        launches = LAUNCHES_OF_CASTS * self.config.backbone.shape.depth
        return Part(memory=numbers * (FULL + 2) / self.machine.memory, launch=launches * self.machine.launch_s)

    def student(self, work: Workload) -> Part:
        decoders = _sum(self.decoder(one, 0) for one in work.decoded)
        stacks = _sum(self.stack(stack, learns=True) for stack in work.student)
        return stacks + decoders

    def casts(self, sizes: Census, micros: int) -> Part:
        """The student's weights cast for products, once in a step; in compiled blocks once for each micro-batch."""
        blocks = self.lowered(sizes.lowered_blocks + sizes.lowered_rest)
        return blocks.times(micros) if self.config.backbone.compile_blocks else blocks

    def stack(self, stack: Stack, *, learns: bool) -> Part:
        """The forward pass of a backbone over views of one size."""
        depth = self.config.backbone.shape.depth
        drops = learns and self.config.backbone.drop_path > 0
        return self.embedding(stack, 0) + self.block(stack, 0, drops=drops).times(depth)

    def embedding(self, stack: Stack, direction: int) -> Part:
        """Patches to tokens; what a backbone has beside blocks."""
        backbone = self.config.backbone
        one = Workload(student=(stack,))
        inside = operations(one, backbone)
        products = (
            inside.pixels + inside.student - stack.rows * backbone.shape.depth * block_flops(backbone, stack.tokens)
        )
        tokens = stack.rows * stack.tokens * backbone.shape.width
        images = stack.rows * 3 * math.prod(stack.size)
        moved = FULL * (4 * tokens + images)
        return Part(products / self.machine.products[self.format], moved / self.machine.memory,
                    LAUNCHES_OF_STACK[direction] * self.machine.launch_s)  # fmt: skip

    def block(self, stack: Stack, direction: int, *, drops: bool) -> Part:
        """One block over all rows; `direction`: 0 forward, 1 backward, which has two products for each."""
        backbone, machine = self.config.backbone, self.machine
        width, _, heads, mlp_ratio = backbone.shape
        rows, hidden, size = stack.rows * stack.tokens, int(mlp_ratio * width), FULL if self.kind == "fp32" else 2
        shapes = ((rows, width, 3 * width), (rows, width, width), (rows, width, hidden), (rows, hidden, width))
        total = _sum(self.product(shape, self.format, size) for shape in shapes).times(1 + direction)
        total += self.attention(stack, heads, width, direction, size)
        traffic: float = (TRAFFIC[self.kind][direction] + (DROP_PATH if drops else 0)) * rows * width
        launches: float = LAUNCHES[self.kind][direction] + (LAUNCHES_OF_DROP_PATH[direction] if drops else 0)
        if backbone.compile_blocks:
            traffic *= COMPILED
            launches = launches / 3
        return total + Part(memory=traffic / machine.memory, launch=launches * machine.launch_s)

    def attention(self, stack: Stack, heads: int, width: int, direction: int, size: int) -> Part:
        """Queries with keys and weights with values. A fused kernel computes the weights again in the backward pass;
        without one they are moved as well."""
        flops = 4.0 * stack.rows * stack.tokens**2 * width
        repeats = (1.0, 2.5 if self.machine.fused else 2.0)[direction]
        moved = (4, 8)[direction] * stack.rows * stack.tokens * width * size
        if not self.machine.fused:
            moved += SOFTMAX[direction] * stack.rows * heads * stack.tokens**2 * size
        rate = self.machine.products[self.format] * self.machine.attention
        return Part(repeats * flops / rate, moved / self.machine.memory)

    def product(self, shape: tuple[int, int, int], form: Format, size: int) -> Part:
        """[a, b] times [b, c]: what bounds it, operations or its three matrices."""
        a, b, c = shape
        operations_s = 2.0 * a * b * c / self.machine.products[form]
        moved_s = size * (a * b + b * c + a * c) / self.machine.memory
        return Part(operations_s) if operations_s >= moved_s else Part(memory=moved_s)

    def decoder(self, one: Decoding, direction: int) -> Part:
        """One decoder, its blocks counted as operations and as the traffic of wider ones."""
        backbone, machine = self.config.backbone, self.machine
        flops = operations(Workload(student=(), decoded=(one,)), backbone).decoders
        traffic = 1.5 * TRAFFIC[self.kind][direction] * one.images * one.tokens * one.width * one.depth
        launches = LAUNCHES_OF_DECODER[direction] + one.depth * LAUNCHES_OF_DECODER_BLOCK[self.kind][direction]
        flops *= 1 + direction
        return Part(flops / machine.products[self.format], traffic / machine.memory, launches * machine.launch_s)

    def heads(self, work: Workload, sizes: Census) -> Part:
        """Forward pass of heads and loss."""
        return self._heads(work, sizes, 0)

    def _heads(self, work: Workload, sizes: Census, direction: int) -> Part:
        """One direction of heads and loss; teachers have but a forward pass."""
        backbone, head = self.config.backbone, work.head
        total = Part()
        for part in work.scored:
            assert head is not None
            layers = _layers(part, backbone, head)  # the last are the prototypes
            taught = [part.teacher_mlp or part.teacher] * (len(layers) - 1) + [part.teacher]
            rows = [part.student * (1 + direction) + (0 if direction else one) for one in taught]
            total += _sum(
                self.product((count, *pair), self.head_format, FULL) for count, pair in zip(rows, layers, strict=True)
            )
        logits = sum(
            part.prototypes
            * (part.student * STUDENT_PASSES[direction] + (0 if direction else part.teacher * TEACHER_PASSES))
            for part in work.scored
        )
        prototypes = PROTOTYPE_PASSES[direction] * sizes.student.get("prototypes", 0)
        read_out = sum(2.0 * one.images * one.predicted * one.width * one.out for one in work.decoded)
        kept = 3 * (work.loss_kept + work.loss_alive) if not direction else 3 * work.loss_kept
        launches = LAUNCHES_OF_LOSS[direction] + len(work.scored) * LAUNCHES_OF_HEAD[direction]
        return total + Part(
            read_out * (1 + direction) / self.machine.products[self.head_format],
            FULL * (logits + prototypes + kept) / self.machine.memory,
            launches * self.machine.launch_s,
        )

    def backward(self, work: Workload, sizes: Census) -> Part:
        """Gradients of all that learns, and blocks computed again where they are checkpointed; then gradients are cast
        and added up, twelve bytes a number."""
        backbone = self.config.backbone
        total = self._heads(work, sizes, 1)
        for one in work.decoded:
            total += self.decoder(one, 1)
        for stack in work.student:
            total += self.embedding(stack, 1)
            block = self.block(stack, 1, drops=backbone.drop_path > 0)
            if backbone.checkpoint_blocks:
                block += self.block(stack, 0, drops=backbone.drop_path > 0)
            total += block.times(backbone.shape.depth)
        return (
            total
            + self.lowered(sizes.lowered_blocks + sizes.lowered_rest)
            + Part(memory=12 * sizes.trained / self.machine.memory)
        )

    def after(self, sizes: Census, world: int) -> Part:
        """Norms, clipping and the optimizer on the part that a rank steps; the moving average of what it holds."""
        stage = stage_of(self.config)
        own = sizes.trained / (world if stage else 1)
        held = sizes.teacher / (world if stage == 3 else 1)
        stepped = SGD if self.config.optimisation.optimizer == "sgd" else ADAM
        moved = own * (stepped + NORMS) + held * AVERAGE
        return Part(0.0, moved / self.machine.stream, LAUNCHES_AFTER * self.machine.launch_s)


def _layers(part: Scored, backbone: BackboneConfig, head: HeadConfig) -> list[tuple[int, int]]:
    """(inputs, outputs) of the products of a head."""
    widths = [backbone.shape.width, *[head.hidden] * (head.layers - 1), head.bottleneck, part.prototypes]
    return list(zip(widths[:-1], widths[1:], strict=True))


def stage_of(config: RunConfig) -> int:
    """ZeRO stage; 0 too for the plain stepper."""
    return config.engine.zero_stage if config.engine.stepper == "deepspeed" else 0


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


def _sum(parts: Iterable[Part]) -> Part:
    total = Part()
    for part in parts:
        total += part
    return total
