"""How many bytes one micro-batch keeps for the backward pass: pure arithmetic on the recipe and on what its method says
of a micro-batch, part by part.

Every term is a tensor that autograd saves (PyTorch 2.15, timm 1.0); the real ones are counted by
`tests/training/preflight/calculated/test_activation_memory.py`. What two operations save counts once.
Left out are drop-path factors and masks: a few bytes per image.

Letters: B images of the micro-batch, R rows (views * images), T tokens, C channels, K prototypes, Z bottleneck.
"""

from typing import NamedTuple

from training.config.build import workload
from training.config.run_config import RunConfig
from training.nn.heads import HeadConfig
from training.nn.ics_stem import CHANNELS
from training.nn.vision_transformer import BackboneConfig
from training.nn.workload import Decoding, Scored, Stack, Workload

FULL = 4
"""Bytes of a float32."""
STATISTICS = 2 * FULL
"""Mean and deviation that a layer norm keeps of every token."""


class Numerics(NamedTuple):
    """What a number weighs where."""

    matrix: int
    """Bytes of what goes into a matrix product of the backbone: 4, or 2 under autocast."""
    softmax: int
    """Bytes kept of every attention weight; 0 with a fused kernel, which keeps one number per row instead."""
    decoder_softmax: int
    """Bytes kept of every attention weight in decoders, whose attention is fused on a GPU only."""

    @property
    def lowered(self) -> bool:
        return self.matrix < FULL

    @property
    def casts(self) -> int:
        """Copies of a float32 tensor that goes into two products: autocast makes one for each."""
        return 2 if self.lowered else 1


def numerics(config: RunConfig, *, cuda: bool) -> Numerics:
    """On a GPU autocast takes the softmax in float32 and casts what comes out: both are kept."""
    matrix = FULL if config.optimisation.precision == "fp32" else 2
    plain = FULL + matrix if cuda and matrix < FULL else matrix
    kernel = config.backbone.attention
    fused = kernel == "fused" or (kernel == "auto" and cuda)
    return Numerics(matrix, 0 if fused else plain, 0 if cuda else plain)


def saved(config: RunConfig, images: int, how: Numerics, work: Workload | None = None) -> dict[str, int]:
    """Bytes that autograd keeps of a micro-batch at the end of its forward pass, by part.

    Lowered copies of weights are not among them. `work`: what the micro-batch is, where that is known better than from
    the recipe.
    """
    work = work or workload(config, images)
    backbone = config.backbone
    parts = {
        "patch embedding": sum(embedding_bytes(backbone, stack, how) for stack in work.student),
        "blocks": sum(blocks_bytes(backbone, stack, how) for stack in work.student),
        "final norm": sum(norm_bytes(stack.rows * stack.tokens, backbone.shape.width) for stack in work.student),
    }
    if work.decoded:
        parts["decoders"] = decoder_bytes(work.decoded, backbone.shape.width, how)
    if work.head is not None:
        parts |= _heads(work.scored, backbone.shape.width, work.head)
    loss = FULL * (work.loss_kept + sum(part.prototypes * (part.student + part.targets) for part in work.scored))
    return parts | ({"loss": loss} if loss else {})


def embedding_bytes(backbone: BackboneConfig, stack: Stack, how: Numerics) -> int:
    """What patch embedding keeps: the lowered images, and all of what a convolutional stem makes of them.

    Images in float32 are the batch itself and count there. Dropped patches: the whole sequence, to drop from.
    """
    height, width = stack.size
    kept = stack.rows * 3 * height * width * how.matrix if how.lowered else 0
    if backbone.stem == "ics":
        values = stack.rows * CHANNELS * (height // 2) * (width // 2)
        kept += values * (9 * FULL + (3 * how.matrix if how.lowered else 0))
    if stack.tokens < stack.patches:
        kept += stack.rows * stack.patches * (backbone.shape.width * FULL + 8)
    return kept


def blocks_bytes(backbone: BackboneConfig, stack: Stack, how: Numerics) -> int:
    """What stays of all blocks after the forward pass: the inputs of checkpointed ones, else all, on average over
    what drop path draws: images that are spared a branch keep nothing of it, unless blocks are compiled for certain
    (where "auto" compiles them, they keep less for other reasons)."""
    depth = backbone.shape.depth
    if backbone.checkpoint_blocks:
        return depth * stack.rows * stack.tokens * backbone.shape.width * FULL
    spared = 0.0 if backbone.compile_blocks is True else sum(backbone.drop_rates)
    return round((depth - spared) * block_bytes(backbone, stack, how))


def block_bytes(backbone: BackboneConfig, stack: Stack, how: Numerics) -> int:
    """All that a block saves: the inputs of its norms in float32; what goes into qkv, projection and both layers of the
    MLP, and into GELU; queries, keys and values; attention weights, or the fused kernel's number per row; what layer
    scale multiplies. Compiled blocks keep less."""
    width, _, heads, mlp_ratio = backbone.shape
    tokens = stack.rows * stack.tokens
    scaled = 2 * width if backbone.layer_scale else 0
    products = tokens * how.matrix * (6 * width + 2 * int(width * mlp_ratio) + scaled)
    return 2 * norm_bytes(tokens, width) + products + _attention(tokens * heads, stack.tokens, how.softmax)


def norm_bytes(tokens: int, width: int) -> int:
    """What a layer norm saves: its input, mean and deviation."""
    return tokens * (width * FULL + STATISTICS)


def _attention(queries: int, keys: int, softmax: int) -> int:
    """Attention weights of so many queries (heads counted), or one number for each."""
    return queries * (keys * softmax or FULL)


def _heads(rows: tuple[Scored, ...], width: int, head: HeadConfig) -> dict[str, int]:
    """Heads in float32 and their prototypes at unit length."""
    return {
        "heads": sum(mlp_bytes(part.student, width, head) for part in rows),
        "unit prototypes": sum(prototype_bytes(part.prototypes, head) for part in rows),
    }


def mlp_bytes(rows: int, width: int, head: HeadConfig) -> int:
    """Inputs of the layers and of the GELUs between them, the bottleneck before and after its norm, the norm."""
    hidden = 2 * head.hidden * (head.layers - 1)
    return rows * FULL * (width + hidden + 2 * head.bottleneck + 2)


def prototype_bytes(prototypes: int, head: HeadConfig) -> int:
    """Scaled directions, and their lengths before."""
    return FULL * prototypes * (head.bottleneck + 1)


def decoder_bytes(decoded: tuple[Decoding, ...], memory_width: int, how: Numerics) -> int:
    """Blocks, norm and what is read out of each decoder. What enters their embeddings is of `memory_width` channels,
    and one tensor for all of them; autocast makes a copy for each."""
    kept = sum(
        one.images * (
            one.depth * _decoder_block(one, memory_width, how)
            + norm_bytes(one.tokens, one.width)
            + one.predicted * one.width * FULL
        )
        for one in decoded
    )  # fmt: skip
    entering = decoded if how.lowered else decoded[:1]
    return kept + sum(one.images * one.seen * memory_width * how.matrix for one in entering)


def _decoder_block(one: Decoding, memory_width: int, how: Numerics) -> int:
    """One image's self-attention, cross-attention to the tokens of the encoder, and MLP."""
    products = one.tokens * ((how.casts + 2) * one.width + 6 * one.inner + 2 * one.hidden)
    memory = one.seen * (memory_width + 2 * one.inner)
    attention = sum(_attention(one.tokens * one.heads, keys, how.decoder_softmax) for keys in (one.tokens, one.seen))
    norms = 3 * norm_bytes(one.tokens, one.width)
    return norms + how.matrix * (products + memory) + one.seen * STATISTICS + attention
