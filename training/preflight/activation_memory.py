"""How many bytes one micro-batch keeps for the backward pass: pure arithmetic on the recipe, part by part.

Every term is a tensor that autograd saves (PyTorch 2.15, timm 1.0); the real ones are counted by
`tests/training/preflight/test_activation_memory.py`. What two operations save counts once.
Left out are drop-path factors and masks: a few bytes per image.

Letters: B images of the micro-batch, R rows (views * images), T tokens, C channels, K prototypes, Z bottleneck.
"""

import math
from typing import NamedTuple

from datapipe.core.config import Size
from training.config.run_config import RunConfig
from training.methods.dino import DinoConfig
from training.methods.pass_reid import PassConfig
from training.methods.personmae import PersonMaeConfig
from training.methods.personvit import PersonVitConfig
from training.methods.supervised import SupervisedConfig
from training.nn.heads import HeadConfig
from training.nn.ics_stem import CHANNELS
from training.nn.vision_transformer import BackboneConfig

FULL = 4
"""Bytes of a float32."""
STATISTICS = 2 * FULL
"""Mean and deviation that a layer norm keeps of every token."""
GLOBALS = 2


class Numerics(NamedTuple):
    """What a number weighs where."""

    matrix: int
    """Bytes of what goes into a matrix product of the backbone: 4, or 2 under autocast."""
    softmax: int
    """Bytes kept of every attention weight; 0 with a fused kernel, which keeps one number per row instead."""
    decoder_softmax: int
    """The same in PersonMAE's decoders, which are fused on a GPU and only there."""

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


class Stack(NamedTuple):
    """Views of one size, as they go through a backbone together."""

    rows: int
    size: Size
    patches: int
    """Patches that are cut."""
    tokens: int
    """Tokens that enter the blocks."""


class Scored(NamedTuple):
    """Rows that go through one head, and what the teacher says about them."""

    learnt: int
    """Rows of the student."""
    targets: int
    """Rows of targets that the loss keeps."""
    taught: int
    """Rows that the teacher scores."""
    prototypes: int


def student_stacks(config: RunConfig, images: int) -> list[Stack]:
    """What the student's backbone sees of a micro-batch."""
    backbone, method = config.backbone, config.method
    patches = math.prod(backbone.grid)
    match method:
        case PersonMaeConfig():
            return [Stack(images, backbone.size, patches, 1 + patches - method.law(backbone).hidden)]
        case PassConfig():
            parts, near, views = method.parts, 1, len(method.areas)
        case DinoConfig() | PersonVitConfig():
            parts, near, views = 0, 0, method.locals
        case SupervisedConfig():
            return [Stack(images, backbone.size, patches, 1 + method.parts + patches)]
    small = math.prod(side // backbone.patch for side in method.local_size)
    whole = Stack(GLOBALS * images, backbone.size, patches, 1 + parts + patches)
    return [whole, Stack(views * images, method.local_size, small, 1 + near + small)][: 2 if views else 1]


def teacher_stack(config: RunConfig, images: int) -> Stack:
    """What the teacher's backbone sees, without gradient."""
    patches = math.prod(config.backbone.grid)
    match config.method:
        case PersonMaeConfig():
            return Stack(images, config.backbone.size, patches, 1 + patches)
        case PassConfig(parts=parts):
            return Stack(GLOBALS * images, config.backbone.size, patches, 1 + parts + patches)
    return Stack(GLOBALS * images, config.backbone.size, patches, 1 + patches)


def scored(config: RunConfig, images: int, hidden: int) -> list[Scored]:
    """The rows of each head, `hidden` patches in all views and images among them; none without prototypes."""
    taught = GLOBALS * images
    match config.method:
        case DinoConfig() as dino:
            return [Scored((GLOBALS + dino.locals) * images, taught, taught, dino.head.out_dim)]
        case PassConfig() as parted:
            prototypes = parted.head.out_dim
            part = Scored((GLOBALS + parted.locals_per_part) * images, taught, taught, prototypes)
            return [Scored((GLOBALS + len(parted.areas)) * images, taught, taught, prototypes), *[part] * parted.parts]
        case PersonVitConfig() as masked:
            own = masked.patch_out_dim if masked.patch_head == "separate" else masked.head.out_dim
            cls = Scored((GLOBALS + masked.locals) * images, taught, taught, masked.head.out_dim)
            return [cls, Scored(hidden, hidden, taught * math.prod(config.backbone.grid), own)]
    return []


def hidden_patches(config: RunConfig, images: int) -> int:
    """Patches that PersonViT's masks hide in a micro-batch, on the average over many; 0 for other methods."""
    if not isinstance(config.method, PersonVitConfig):
        return 0
    ratios = config.method.mask.ratios
    return round(GLOBALS * images * math.prod(config.backbone.grid) * sum(ratios) / len(ratios))


def saved(config: RunConfig, images: int, how: Numerics, *, hidden: int | None = None) -> dict[str, int]:
    """Bytes that autograd keeps of a micro-batch at the end of its forward pass, by part.

    Lowered copies of weights are not among them. `hidden`: patches hidden in fact, where that is known.
    """
    hidden = hidden_patches(config, images) if hidden is None else hidden
    stacks = student_stacks(config, images)
    backbone = config.backbone
    found = {
        "patch embedding": sum(embedding_bytes(backbone, stack, how) for stack in stacks),
        "blocks": sum(backbone.shape.depth * kept_of_block(backbone, stack, how) for stack in stacks),
        "final norm": sum(norm_bytes(stack.rows * stack.tokens, backbone.shape.width) for stack in stacks),
    }
    if isinstance(config.method, PersonMaeConfig):
        return found | _reconstruction(config.method, backbone, images, stacks[0], how)
    if isinstance(config.method, SupervisedConfig):
        return found  # its head keeps a few features per image
    rows = scored(config, images, hidden)
    return found | _distillation(backbone.shape.width, config.method.head, rows)


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


def kept_of_block(backbone: BackboneConfig, stack: Stack, how: Numerics) -> int:
    """What stays of a block after the forward pass: everything, or its input alone."""
    if backbone.checkpoint_blocks:
        return stack.rows * stack.tokens * backbone.shape.width * FULL
    return block_bytes(backbone, stack, how)


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


def _distillation(width: int, head: HeadConfig, rows: list[Scored]) -> dict[str, int]:
    """Heads in float32, their prototypes at unit length, and what the cross-entropies keep."""
    return {
        "heads": sum(mlp_bytes(part.learnt, width, head) for part in rows),
        "unit prototypes": sum(prototype_bytes(part.prototypes, head) for part in rows),
        "loss": sum(FULL * part.prototypes * (part.learnt + part.targets) for part in rows),
    }


def mlp_bytes(rows: int, width: int, head: HeadConfig) -> int:
    """Inputs of the layers and of the GELUs between them, the bottleneck before and after its norm, the norm."""
    hidden = 2 * head.hidden * (head.layers - 1)
    return rows * FULL * (width + hidden + 2 * head.bottleneck + 2)


def prototype_bytes(prototypes: int, head: HeadConfig) -> int:
    """Scaled directions and lengths; where lengths are learnt, directions before scaling too."""
    copies = 1 if head.norm_last_layer else 2
    return FULL * prototypes * (copies * head.bottleneck + 1)


class _Decoder(NamedTuple):
    """Sizes of one of PersonMAE's decoders."""

    width: int
    inner: int
    """Channels of all attention heads together."""
    heads: int
    hidden: int
    depth: int


def _reconstruction(
    method: PersonMaeConfig, backbone: BackboneConfig, images: int, stack: Stack, how: Numerics
) -> dict[str, int]:
    """Both decoders on seen tokens and mask tokens, and the losses."""
    width, _, heads, mlp_ratio = backbone.shape
    places = stack.patches if method.regions == "pair" else method.law(backbone).hidden
    predicted = stack.patches if method.regions == "pair" or method.loss_on == "all" else places
    heads = method.decoder_heads or heads
    decoders = [
        _Decoder(own, own // heads * heads, heads, int(own * mlp_ratio), method.decoder_depth)
        for own in (method.pixel_width or width, method.feature_width or width)
    ]
    tokens = stack.tokens + places
    kept = sum(
        one.depth * _decoder_block(one, tokens, stack.tokens, width, how)
        + norm_bytes(tokens, one.width)
        + predicted * one.width * FULL
        for one in decoders
    )
    kept += how.casts * stack.tokens * width * how.matrix  # what goes into both embeddings
    errors = predicted * FULL * (3 * backbone.patch**2 + 2 * width)
    return {"decoders": images * kept, "loss": images * errors}


def _decoder_block(one: _Decoder, tokens: int, seen: int, memory_width: int, how: Numerics) -> int:
    """One image's self-attention, cross-attention to the `seen` tokens of the encoder, and MLP."""
    products = tokens * ((how.casts + 2) * one.width + 6 * one.inner + 2 * one.hidden)
    memory = seen * (memory_width + 2 * one.inner)
    attention = sum(_attention(tokens * one.heads, keys, how.decoder_softmax) for keys in (tokens, seen))
    return 3 * norm_bytes(tokens, one.width) + how.matrix * (products + memory) + seen * STATISTICS + attention
