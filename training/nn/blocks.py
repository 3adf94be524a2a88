"""What transformers are stacked from: timm's patch embedding and layer norm, a block that can drop its branches, and a
block that also attends to a memory.

Apart from the networks, which import it when they are built: timm takes seconds to load, and settings are read first.
The decoder's block has the structure of BootMAE (Dong et al., ECCV 2022; reference
`models/modeling_pretrain_bootmae.py` Decode_Block).

Shapes: B images, T tokens of W channels, M tokens of the memory of C channels.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp, PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from training.nn.drop_path import BlockPaths, KeptImages

__all__ = ["Attention", "DecoderBlock", "DroppableBlock", "LayerNorm", "PatchEmbed"]


class DroppableBlock(Block):
    """timm's block, either of whose branches may be dropped for some of the images.

    `paths`: for both branches either the images that it is computed for, which saves the others' share; or a factor
    for each image, [2, B], 0 where it is dropped: all are computed then, in shapes that never change.
    """

    attn: Any

    def forward(self, tokens: Tensor, paths: BlockPaths = None) -> Tensor:  # type: ignore[override]
        attending, mixing = (None, None) if paths is None else paths
        tokens = _added(tokens, attending, lambda some: self.ls1(self.attn(self.norm1(some))))
        return _added(tokens, mixing, lambda some: self.ls2(self.mlp(self.norm2(some))))


def _added(tokens_BTC: Tensor, path: Tensor | KeptImages | None, branch: Callable[[Tensor], Tensor]) -> Tensor:
    """The tokens with what a branch makes of them."""
    if path is None:
        return tokens_BTC + branch(tokens_BTC)
    if isinstance(path, Tensor):
        made_BTC = branch(tokens_BTC)
        return tokens_BTC + made_BTC * path.to(made_BTC.dtype)[:, None, None]
    if path.rows is None:
        return torch.add(tokens_BTC, branch(tokens_BTC), alpha=path.factor)
    made_KTC = branch(tokens_BTC.index_select(0, path.rows))
    sums_BTC: Tensor = _AddToRows.apply(tokens_BTC, made_KTC.to(tokens_BTC.dtype), path.rows, path.factor)
    return sums_BTC


class _AddToRows(torch.autograd.Function):
    """`index_add` along the images, which keeps nothing but their places for the backward pass: PyTorch's own keeps all
    that was added, for its shape."""

    @staticmethod
    def forward(ctx: Any, tokens_BTC: Tensor, made_KTC: Tensor, rows_K: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(rows_K)
        ctx.factor = factor
        return tokens_BTC.index_add(0, rows_K, made_KTC, alpha=factor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient_BTC,), (rows_K,) = gradients, ctx.saved_tensors
        return gradient_BTC, gradient_BTC.index_select(0, rows_K) * ctx.factor, None, None


class Attention(nn.Module):
    """Scaled dot-product attention of some tokens to a memory of another width, or to themselves.

    A head has floor(width / heads) channels, so that any number of heads goes with any width (BootMAE: 12 with 512).
    """

    def __init__(self, width: int, memory_width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        inner = width // heads * heads
        self.query = nn.Linear(width, inner)
        self.key_value = nn.Linear(memory_width, 2 * inner)
        self.proj = nn.Linear(inner, width)

    def forward(self, tokens_BTW: Tensor, memory_BMC: Tensor) -> Tensor:
        query = self.query(tokens_BTW).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(memory_BMC).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if tokens_BTW.is_cuda:
            attended = F.scaled_dot_product_attention(query, key, value)
        else:  # plain matrix products are faster on a CPU
            attended = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1) @ value
        mixed: Tensor = self.proj(attended.transpose(1, 2).flatten(-2))
        return mixed


class DecoderBlock(nn.Module):
    """x + self-attention, x + cross-attention to the memory, x + MLP; a layer norm in front of each."""

    def __init__(self, width: int, memory_width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)  # eps 1e-6
        self.attn = Attention(width, width, heads)
        self.norm2 = LayerNorm(width)
        self.norm_memory = LayerNorm(memory_width)
        self.cross = Attention(width, memory_width, heads)
        self.norm3 = LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio))

    def forward(self, tokens_BTW: Tensor, memory_BMC: Tensor) -> Tensor:
        calm = self.norm1(tokens_BTW)
        tokens_BTW = tokens_BTW + self.attn(calm, calm)
        tokens_BTW = tokens_BTW + self.cross(self.norm2(tokens_BTW), self.norm_memory(memory_BMC))
        mixed: Tensor = tokens_BTW + self.mlp(self.norm3(tokens_BTW))
        return mixed
