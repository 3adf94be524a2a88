"""How many floating-point operations a micro-batch takes: pure arithmetic on what its method says of it.

Counted are matrix products and convolutions, a multiplication and an addition each, as `torch.utils.flop_counter` has
them; it agrees to 1e-3 on every shipped recipe (`test_operations.py`). Left out is what is no product (norms,
activations, softmax), and the few products of losses and metrics: below 2e-4 of the whole.

Every block is counted for every image: where drop path spares blocks, a step does less than is counted, by half of
`backbone.drop_path` of the student's blocks.
"""

from typing import NamedTuple

from training.config.build import allows_tf32, workload
from training.config.run_config import RunConfig
from training.nn.heads import HeadConfig
from training.nn.ics_stem import CHANNELS
from training.nn.vision_transformer import BackboneConfig
from training.nn.workload import Decoding, Scored, Stack, Workload
from training.preflight.calculated.gpus import Format

MANY = 1_000
"""Images over which counts are averaged, as a method may round them (hidden patches)."""


class Operations(NamedTuple):
    """Floating-point operations of forward passes, by part of a method; what the backward pass adds follows from it."""

    pixels: float
    """The student's layer that sees the images: in the backward pass its weights alone have a gradient."""
    student: float
    """All that follows it in the student's backbone."""
    decoders: float
    """Decoders, but for what is read out of them."""
    heads: float
    """The student's heads, and what is read out of decoders: in float32 in every recipe."""
    teacher: float
    teacher_heads: float

    @property
    def forward(self) -> float:
        return sum(self)

    @property
    def backward(self) -> float:
        """Gradients of inputs and of weights, as much as the forward pass each."""
        return self.pixels + 2 * (self.student + self.decoders + self.heads)

    @property
    def total(self) -> float:
        """Forward and backward pass, nothing computed twice: what utilisation is measured by."""
        return self.forward + self.backward


def operations(work: Workload, backbone: BackboneConfig) -> Operations:
    """The operations of what goes through the networks."""
    width, head = backbone.shape.width, work.head
    read_out = sum(2.0 * one.images * one.predicted * one.width * one.out for one in work.decoded)
    return Operations(
        pixels=sum(_pixel_layer(backbone, stack) for stack in work.student),
        student=sum(_after_pixels(backbone, stack) for stack in work.student),
        decoders=sum(one.images * _decoder(one, width) for one in work.decoded),
        heads=read_out + sum(part.student * (_mlp(width, head) + _prototypes(part, head)) for part in work.scored),
        teacher=sum(_pixel_layer(backbone, stack) + _after_pixels(backbone, stack) for stack in work.teacher),
        teacher_heads=sum(
            (part.teacher_mlp or part.teacher) * _mlp(width, head) + part.teacher * _prototypes(part, head)
            for part in work.scored
        ),
    )


def of_image(config: RunConfig) -> Operations:
    """Operations for each image of the batch, on average."""
    return Operations(*(part / MANY for part in operations(workload(config, MANY), config.backbone)))


def flops_of_image(config: RunConfig) -> float:
    """Floating-point operations of a step for each image of the batch: the student's forward and backward pass, the
    teacher's forward pass. Blocks that are computed a second time, as they are checkpointed, count once."""
    return of_image(config).total


def computed_of_image(config: RunConfig) -> float:
    """What `flops_of_image` counts, with checkpointed blocks as often as they are computed: what takes time."""
    again = again_of_stacks(config, MANY) / MANY if config.backbone.checkpoint_blocks else 0.0
    return flops_of_image(config) + again


def again_of_stacks(config: RunConfig, images: int) -> float:
    """What is computed a second time of checkpointed blocks: all but their last product, which nothing waits for unless
    layer scale multiplies it."""
    width, depth, _, mlp_ratio = config.backbone.shape
    spared = 0 if config.backbone.layer_scale else 2.0 * int(mlp_ratio * width) * width
    return sum(
        stack.rows * depth * (block_flops(config.backbone, stack.tokens) - stack.tokens * spared)
        for stack in workload(config, images).student
    )


def float32_format(config: RunConfig) -> Format:
    """What float32 products multiply on a GPU: heads and losses, and the backbone where nothing lowers it."""
    return "tf32" if allows_tf32(config) else "fp32"


def backbone_format(config: RunConfig) -> Format:
    """What products of the backbone multiply on a GPU: what a run's utilisation is measured in."""
    precision = config.optimisation.precision
    return float32_format(config) if precision == "fp32" else precision


def block_flops(backbone: BackboneConfig, tokens: int) -> float:
    """Forward pass of one block over one row of tokens: four products of the attention's width, two of the MLP's, and
    two of every query with every key."""
    width, _, _, mlp_ratio = backbone.shape
    products = tokens * (4 * width**2 + 2 * int(mlp_ratio * width) * width)
    return 2.0 * (products + 2 * tokens**2 * width)


def _pixel_layer(backbone: BackboneConfig, stack: Stack) -> float:
    """Patches to tokens, of all rows, or the stem's first convolution, of 7 x 7 at half the resolution."""
    if backbone.stem == "ics":
        return 2.0 * stack.rows * _half(stack) * CHANNELS * 3 * 7**2
    return 2.0 * stack.rows * stack.patches * 3 * backbone.patch**2 * backbone.shape.width


def _after_pixels(backbone: BackboneConfig, stack: Stack) -> float:
    """Blocks, of all rows, and the rest of a convolutional stem."""
    width, depth, *_ = backbone.shape
    stem = 0.0
    if backbone.stem == "ics":
        convolutions = 2 * _half(stack) * CHANNELS**2 * 3**2
        stem = 2.0 * (convolutions + stack.patches * CHANNELS * (backbone.patch // 2) ** 2 * width)
    return stack.rows * (depth * block_flops(backbone, stack.tokens) + stem)


def _half(stack: Stack) -> int:
    """Places of an image at half its resolution."""
    return (stack.size[0] // 2) * (stack.size[1] // 2)


def _mlp(width: int, head: HeadConfig | None) -> float:
    """One row through the MLP of a head."""
    assert head is not None, "rows are scored, and no head is said"
    widths = [width, *[head.hidden] * (head.layers - 1), head.bottleneck]
    return 2.0 * sum(before * after for before, after in zip(widths[:-1], widths[1:], strict=True))


def _prototypes(part: Scored, head: HeadConfig | None) -> float:
    """One row with each prototype."""
    assert head is not None, "rows are scored, and no head is said"
    return 2.0 * head.bottleneck * part.prototypes


def _decoder(one: Decoding, memory_width: int) -> float:
    """One image: what enters, then blocks of self-attention, attention to `seen` tokens of the encoder, and MLP."""
    own = one.tokens * (4 * one.width * one.inner + 2 * one.tokens * one.inner)
    cross = (
        one.tokens * (2 * one.width * one.inner + 2 * one.seen * one.inner) + one.seen * memory_width * 2 * one.inner
    )
    mlp = one.tokens * 2 * one.width * one.hidden
    return 2.0 * (one.seen * memory_width * one.width + one.depth * (own + cross + mlp))
