"""What the device and the host take for each part of a micro-batch: products, memory traffic, launches.

Where the constants come from is said at each: counted from shapes, or by `test_step_time.py`.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from training.config.build import view_spec, why_uncompiled
from training.config.run_config import RunConfig
from training.nn.heads import HeadConfig
from training.nn.vision_transformer import BackboneConfig
from training.nn.workload import Decoding, Scored, Stack, Workload
from training.preflight.calculated.activation_memory import FULL
from training.preflight.calculated.gpus import Format
from training.preflight.calculated.machine import Machine
from training.preflight.calculated.memory import Census
from training.preflight.calculated.operations import backbone_format, block_flops, operations

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


def sum_of(parts: Iterable[Part]) -> Part:
    total = Part()
    for part in parts:
        total += part
    return total


def pixels(config: RunConfig, images: int) -> int:
    """Pixels of all views of so many images."""
    spec, count = view_spec(config), 0
    for group in spec.groups:
        views, _, height, width, _ = spec.shape(group, images)
        count += views * images * height * width
    return count


class Computation(NamedTuple):
    """Parts of a micro-batch on a machine."""

    config: RunConfig
    machine: Machine
    head_format: Format

    @property
    def format(self) -> Format:
        """What products of the backbone multiply."""
        return backbone_format(self.config)

    @property
    def compiled(self) -> bool:
        """Are blocks compiled?"""
        return not why_uncompiled(self.config, cuda=self.machine.streams)

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
        decoders = sum_of(self.decoder(one, 0) for one in work.decoded)
        stacks = sum_of(self.stack(stack, learns=True) for stack in work.student)
        return stacks + decoders

    def casts(self, sizes: Census, micros: int) -> Part:
        """The student's weights cast for products, once in a step; in compiled blocks once for each micro-batch."""
        blocks = self.lowered(sizes.lowered_blocks + sizes.lowered_rest)
        return blocks.times(micros) if self.compiled else blocks

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
        total = sum_of(self.product(shape, self.format, size) for shape in shapes).times(1 + direction)
        total += self.attention(stack, heads, width, direction, size)
        traffic: float = (TRAFFIC[self.kind][direction] + (DROP_PATH if drops else 0)) * rows * width
        launches: float = LAUNCHES[self.kind][direction] + (LAUNCHES_OF_DROP_PATH[direction] if drops else 0)
        if self.compiled:
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
            total += sum_of(
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
