"""The vision transformer on rectangles: timm's patch embedding, blocks and norm under tokens and positions of our own.

Tokens and position tables are separate parameters, named as in the reference repositories (PASS
`PASS/vision_transformer.py`, TransReID-SSL `dino/vision_transformer.py`): clipping per tensor makes the split part of
the algorithm. Without parts `pos_embed` is [1, 1 + N, C], its first row for CLS; with parts it is [1, N, C] and every
token has a position of its own.

Shapes: B images, H x W pixels, N patches (row-major), P part tokens, T tokens, C channels, D depth.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from datapipe.core.config import Size
from datapipe.core.settings import settings
from training.core.device_copy import table
from training.nn.drop_path import BlockPaths, Paths
from training.nn.ics_stem import ConvStem


class Shape(NamedTuple):
    """Size of a transformer."""

    width: int
    depth: int
    heads: int
    mlp_ratio: float


ARCHITECTURES = {
    "vit_tiny": Shape(192, 12, 3, 4.0),
    "vit_small": Shape(384, 12, 6, 4.0),
    "vit_base": Shape(768, 12, 12, 4.0),
    "vit_large": Shape(1024, 24, 16, 4.0),
}


@settings
class BackboneConfig:
    """The vision transformer."""

    arch: Literal["vit_tiny", "vit_small", "vit_base", "vit_large", "custom"] = "vit_small"
    """Published sizes, or "custom" with `width`, `depth` and `heads` given."""
    size: Size = (256, 128)
    """Native image size (height, width), pixels: the size of the global views and of the position table."""
    patch: int = Field(default=16, ge=1)
    """Side of a patch, pixels; must divide both sides of every view."""
    stem: Literal["patch", "ics"] = "patch"
    """"patch": one convolution per patch. "ics": TransReID-SSL's convolutions with instance and batch norm in front;
    better in its tables, slower, and its batch statistics forbid gradient accumulation."""
    width: int = Field(default=0, ge=0, le=65_536)
    """Channels of a token. Only with arch = "custom"; 0: that of `arch`."""
    depth: int = Field(default=0, ge=0, le=1_000)
    """Number of blocks. Only with arch = "custom"; 0: that of `arch`."""
    heads: int = Field(default=0, ge=0, le=65_536)
    """Attention heads; must divide the width. Only with arch = "custom"; 0: that of `arch`."""
    mlp_ratio: float = Field(default=4.0, gt=0, le=1_000)
    """Hidden width of the MLPs over `width`. Only with arch = "custom"."""
    drop_path: float = Field(default=0.0, ge=0, lt=1)
    """Share of images whose last branch is dropped in the student; rises linearly from 0 over the blocks. Published
    runs: 0.1."""
    layer_scale: float = Field(default=0.0, ge=0)
    """Initial value of a learnt factor per channel at the end of both branches of every block, e.g. 1e-5; steadies
    deep transformers (CaiT, Touvron et al. 2021). 0: none, as in all published runs here."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the initial Linear weights. 0.05 speeds up runs of a few hundred steps."""
    resize_positions_at_native_size: bool = False
    """Also resize the position table where nothing is to be resized, as the PASS code does on a CPU (on a GPU it ends
    up with the stored table). For parity runs only."""
    attention: Literal["auto", "plain", "fused"] = "auto"
    """Attention kernel. "auto": PyTorch's fused one on a GPU, plain matrix products on a CPU, where they are faster."""
    checkpoint_blocks: bool = False
    """Keep only the inputs of blocks and compute the rest again in the backward pass: less memory, a third more
    time."""
    compile_blocks: Literal["auto", True, False] = "auto"
    """Let torch.compile fuse the operations of a block while training: faster on a GPU after a minute of compiling, the
    same results up to rounding. Needs a compiler; not with engine.zero_stage 3. "auto": where a block tried before the
    first step works and is faster so, on GPUs and in runs long enough; not with engine.deterministic."""

    @model_validator(mode="after")
    def _fits(self) -> "BackboneConfig":
        given = (self.width, self.depth, self.heads)
        if self.arch == "custom" and 0 in given:
            raise ValueError('arch = "custom" needs width, depth and heads')
        if self.arch != "custom" and (any(given) or self.mlp_ratio != ARCHITECTURES[self.arch].mlp_ratio):
            raise ValueError(f'width, depth, heads and mlp_ratio go with arch = "custom", not with "{self.arch}"')
        if self.shape.width % self.shape.heads:
            raise ValueError(f"heads = {self.shape.heads} does not divide width = {self.shape.width}")
        if self.size[0] % self.patch or self.size[1] % self.patch:
            raise ValueError(f"patch = {self.patch} does not divide size = {self.size}")
        if self.stem == "ics" and self.patch % 2:
            raise ValueError(f'stem = "ics" halves the image before it is cut: patch = {self.patch} must be even')
        return self

    @property
    def shape(self) -> Shape:
        if self.arch == "custom":
            return Shape(self.width, self.depth, self.heads, self.mlp_ratio)
        return ARCHITECTURES[self.arch]

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches at the native size."""
        return self.size[0] // self.patch, self.size[1] // self.patch

    @property
    def drop_rates(self) -> list[float]:
        """Drop-path rate of each block: 0 for the first, `drop_path` for the last."""
        last = max(self.shape.depth - 1, 1)
        return [self.drop_path * block / last for block in range(self.shape.depth)]


class Features(NamedTuple):
    """Tokens after the final norm."""

    cls: Tensor
    """[B, C]"""
    parts: Tensor
    """[B, P, C]: all parts, the one asked for, or none (P = 0)."""
    patches: Tensor
    """[B, N, C], row-major"""
    outputs: tuple[Tensor, ...] = ()
    """[B, T, C] each: all tokens as they came out of the blocks asked for, before the final norm."""


Runner = Callable[[nn.Module, Tensor, BlockPaths], Tensor]


def run_block(block: nn.Module, tokens: Tensor, paths: BlockPaths) -> Tensor:
    """What comes out of a block."""
    output: Tensor = block(tokens, paths)
    return output


@functools.cache
def compiled_run() -> Runner:
    """`run_block`, compiled once for all blocks of one shape, any number of images and tokens. Modules stay as they
    are, so names in state dicts do too."""
    return torch.compile(run_block, dynamic=True)


PartChoice = int | Literal["all"] | Sequence[int] | None
"""Which part tokens go in. A number: that one, 1-based. "all": P1..PP. A sequence: the rows are that many equal
consecutive chunks, each with the part token of its number. None: no part token."""


class VisionTransformer(nn.Module):
    """Images of any size that the patch divides -> CLS, part and patch tokens."""

    masked_embed: nn.Parameter | None
    """[1, C]: what stands for a hidden patch in front of its position; zero at the start. iBOT's student has it."""
    compiled: bool
    """Are blocks compiled while training? Where the configuration says "auto" it is settled before the first step
    (`training.preflight.compiler`), and false until then."""

    def __init__(self, config: BackboneConfig, parts: int = 0, *, maskable: bool = False) -> None:
        from training.nn.blocks import DroppableBlock, LayerNorm

        super().__init__()
        self.config, self.parts = config, parts
        self.compiled = config.compile_blocks is True
        shape, (rows, columns) = config.shape, config.grid
        self.cls_token = _table(1, shape.width)
        for part in range(1, parts + 1):
            self.register_parameter(f"part_token{part}", _table(1, shape.width))
        if parts:
            self.cls_pos = nn.Parameter(torch.zeros(1, 1, shape.width))  # starts at zero, as in PASS
        for part in range(1, parts + 1):
            self.register_parameter(f"part{part}_pos", _table(1, shape.width))
        self.pos_embed = _table(rows * columns + (0 if parts else 1), shape.width)
        self.masked_embed = nn.Parameter(torch.zeros(1, shape.width)) if maskable else None
        self.patch_embed = _stem(config)
        self.blocks = nn.ModuleList(
            DroppableBlock(
                shape.width,
                shape.heads,
                shape.mlp_ratio,
                qkv_bias=True,
                norm_layer=LayerNorm,
                init_values=config.layer_scale or None,
            )  # fmt: skip
            for _ in range(shape.depth)
        )
        self.norm = LayerNorm(shape.width)  # eps 1e-6
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=self.config.init_std)
            nn.init.zeros_(module.bias)

    @property
    def width(self) -> int:
        return self.config.shape.width

    def forward(
        self,
        images: Tensor,
        *,
        part: PartChoice = "all",
        path_masks: Paths = None,
        visible: Tensor | None = None,
        mask: Tensor | None = None,
        real: Tensor | None = None,
        blocks: Sequence[int] = (),
    ) -> Features:
        """images [B, 3, H, W] -> tokens after the final norm: `embed`, then `outputs`, then the norm.

        `blocks`: those whose output is wanted too; 0 is the first, -1 the last.
        """
        tokens, parts = self.embed(images, part=part, visible=visible, mask=mask, real=real)
        depth, outputs = len(self.blocks), {}
        wanted = {depth - 1, *(block % depth for block in blocks)}
        for index, output in enumerate(self.outputs(tokens, path_masks=path_masks)):
            if index in wanted:
                outputs[index] = output
        tokens = self.norm(outputs[depth - 1])
        chosen = tuple(outputs[block % depth] for block in blocks)
        return Features(tokens[:, 0], tokens[:, 1 : 1 + parts], tokens[:, 1 + parts :], chosen)

    def embed(
        self,
        images: Tensor,
        *,
        part: PartChoice = "all",
        visible: Tensor | None = None,
        mask: Tensor | None = None,
        real: Tensor | None = None,
    ) -> tuple[Tensor, int]:
        """The sequence that goes into the blocks, [B, T, C]: CLS, the part tokens asked for, the patches.

        `visible` [B, kept] int64: numbers of the patches that stay, in this order; the others are dropped, so that
        the blocks' cost falls with them. `mask` [B, N] bool: patches that `masked_embed` stands in for, at their
        positions. `real` [B] bool: False for padding, which a stem with batch norm leaves out of its statistics.
        Also returns how many part tokens there are.
        """
        rows, columns = images.shape[-2] // self.config.patch, images.shape[-1] // self.config.patch
        patches = self.patch_embed(images, real) if self.config.stem == "ics" else self.patch_embed(images)
        if mask is not None:
            assert self.masked_embed is not None, "this backbone has no mask token"
            patches = torch.where(mask[..., None], self.masked_embed, patches)
        patches = patches + self.patch_positions(rows, columns)
        if visible is not None:
            patches = patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[-1]))
        prefix = self._prefix(part, len(images))
        return torch.cat([prefix, patches], dim=1), prefix.shape[1] - 1

    def outputs(self, tokens: Tensor, *, path_masks: Paths = None) -> Iterator[Tensor]:
        """What comes out of each block, before the final norm; every token attends to every other.

        `path_masks` from `draw_path_masks` or `on_device`; None: drop nothing.
        """
        fused = self.fuses_attention(tokens.device)
        run = compiled_run() if self.compiled and self.training else run_block
        for index, block in enumerate(self.blocks):
            block.attn.fused_attn = fused  # type: ignore[union-attr]
            paths: BlockPaths = None
            if path_masks is not None:
                of_block: Any = path_masks[2 * index : 2 * index + 2]
                paths = of_block.clone() if isinstance(of_block, Tensor) else of_block  # a view would be compiled anew
            if self.config.checkpoint_blocks and torch.is_grad_enabled():
                tokens = checkpoint(run, block, tokens, paths, use_reentrant=False, preserve_rng_state=False)
            else:
                tokens = run(block, tokens, paths)
            yield tokens

    def fuses_attention(self, device: torch.device) -> bool:
        """Is attention PyTorch's fused kernel on this device?"""
        chosen = self.config.attention
        return device.type == "cuda" if chosen == "auto" else chosen == "fused"

    def features(self, images: Tensor) -> Features:
        """What evaluation uses: all tokens, nothing dropped."""
        return self(images, part="all")

    def patch_positions(self, rows: int, columns: int) -> Tensor:
        """[1, rows * columns, C]: the position table, resized where the grid is not the native one.

        Bicubic with the scale factors (rows + .1) / native rows, (columns + .1) / native columns, whose sampling grid
        is not that of a resize to a target size. TransReID-SSL `dino/vision_transformer.py` interpolate_pos_encoding.
        """
        table = self.pos_embed if self.parts else self.pos_embed[:, 1:]
        native = self.config.grid
        if (rows, columns) == native and not self.config.resize_positions_at_native_size:
            return table
        grid = table.reshape(1, *native, -1).permute(0, 3, 1, 2)
        factors = ((rows + 0.1) / native[0], (columns + 0.1) / native[1])
        resized = _resized(grid, factors)
        assert resized.shape[-2:] == (rows, columns), (resized.shape, rows, columns)
        return resized.flatten(2).transpose(1, 2)

    def _prefix(self, part: PartChoice, images: int) -> Tensor:
        """CLS and the part tokens asked for, with their positions: [B, 1 + parts, C]."""
        position = self.cls_pos if self.parts else self.pos_embed[:, :1]
        cls = (self.cls_token + position).expand(images, -1, -1)
        if part is None or self.parts == 0:
            return cls
        if part == "all":
            chosen = torch.cat([self._part(number) for number in range(1, self.parts + 1)], dim=1)
            return torch.cat([cls, chosen.expand(images, -1, -1)], dim=1)
        numbers = [part] if isinstance(part, int) else [int(number) for number in part]
        each = images // len(numbers)
        assert each * len(numbers) == images, f"{images} images do not fall into {len(numbers)} equal chunks"
        chosen = torch.cat([self._part(number).expand(each, -1, -1) for number in numbers])
        return torch.cat([cls, chosen], dim=1)

    def _part(self, number: int) -> Tensor:
        token: Tensor = getattr(self, f"part_token{number}")
        position: Tensor = getattr(self, f"part{number}_pos")
        return token + position

    def depth_of(self, parameter: str) -> int:
        """For layer decay: 0 for tokens, positions and patch embedding, i + 1 for block i, D + 1 for the final norm."""
        first, _, rest = parameter.partition(".")
        if first == "blocks":
            return int(rest.partition(".")[0]) + 1
        return len(self.blocks) + 1 if first == "norm" else 0


def _stem(config: BackboneConfig) -> nn.Module:
    """[B, 3, H, W] -> [B, N, C]; takes images of any size that the patch divides."""
    if config.stem == "ics":
        return ConvStem(config.patch, config.shape.width)
    from training.nn.blocks import PatchEmbed

    return PatchEmbed(config.size, config.patch, embed_dim=config.shape.width, strict_img_size=False)


def _resized(grid_1CRG: Tensor, factors: tuple[float, float]) -> Tensor:
    """A table of positions, bicubic. Where a GPU must give the same bits each time by two products, as the backward of
    its kernel adds in any order."""
    if not (grid_1CRG.is_cuda and torch.are_deterministic_algorithms_enabled()):
        return F.interpolate(grid_1CRG, scale_factor=factors, mode="bicubic", align_corners=False)
    down, across = (
        table(_weights, side, factor, device=grid_1CRG.device, dtype=grid_1CRG.dtype)
        for side, factor in zip(grid_1CRG.shape[-2:], factors, strict=True)
    )
    with torch.autocast(grid_1CRG.device.type, enabled=False):
        return down @ grid_1CRG @ across.T


def _weights(side: int, factor: float) -> Tensor:
    """[resized side, side] float64: what each number along a side counts in each number of the resized side."""
    each = torch.eye(side, dtype=torch.float64)[None, :, :, None]
    return F.interpolate(each, scale_factor=(factor, 1.0), mode="bicubic", align_corners=False)[0, :, :, 0].T


def _table(rows: int, width: int) -> nn.Parameter:
    """[1, rows, C], truncated normal of standard deviation .02: every token and position but `cls_pos`."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, rows, width), std=0.02))


def parameter_count(module: nn.Module, *, trained: bool = False) -> int:
    """Numbers in all parameters, or in those that learn. Whole ones, also where ZeRO 3 has left this rank a shard."""
    return sum(_whole_size(one) for one in module.parameters() if one.requires_grad or not trained)


def _whole_size(parameter: nn.Parameter) -> int:
    """DeepSpeed empties a parameter that it has split, and notes its size."""
    return int(getattr(parameter, "ds_numel", math.prod(parameter.shape)))
