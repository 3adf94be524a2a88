"""Light decoders of masked auto-encoders: what was seen of one region -> a prediction for places in another.

Structure of BootMAE (Dong et al., ECCV 2022; reference `models/modeling_pretrain_bootmae.py` Decode_Block): every
block is self-attention, cross-attention to features of the encoder, MLP.

Shapes: B images, S seen tokens, Q places asked for, T = S + Q tokens, M tokens of the memory, C channels of the
encoder, W of the decoder, O numbers predicted per place.
"""

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm, Mlp
from torch import Tensor, nn

from training.nn.positions import sincos
from training.nn.vision_transformer import BackboneConfig


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
            found = F.scaled_dot_product_attention(query, key, value)
        else:  # plain matrix products are faster on a CPU
            found = (query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)).softmax(dim=-1) @ value
        mixed: Tensor = self.proj(found.transpose(1, 2).flatten(-2))
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


class Decoder(nn.Module):
    """Seen tokens and a mask token at every place asked for -> tokens at these places; `predict` reads them out.

    Seen tokens bring their position along from the encoder; only mask tokens are told theirs, by the sin-cos code of
    their place.
    """

    def __init__(self, encoder: BackboneConfig, *, width: int, depth: int, heads: int, out: int) -> None:
        super().__init__()
        channels, mlp_ratio = encoder.shape.width, encoder.shape.mlp_ratio
        self.embed = nn.Linear(channels, width)
        self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))
        self.blocks = nn.ModuleList(DecoderBlock(width, channels, heads, mlp_ratio) for _ in range(depth))
        self.norm = LayerNorm(width)
        self.predict = nn.Linear(width, out)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=encoder.init_std)
                nn.init.zeros_(module.bias)

    def forward(self, seen_BSC: Tensor, memory_BMC: Tensor, places_BQ2: Tensor) -> Tensor:
        """[B, S + Q, W], normalised: the seen tokens as they came out, then those of the places."""
        code_BQW = sincos(places_BQ2, self.mask_token.shape[-1]).to(self.mask_token)
        tokens_BTW = torch.cat([self.embed(seen_BSC), self.mask_token + code_BQW], dim=1)
        for block in self.blocks:
            tokens_BTW = block(tokens_BTW, memory_BMC)
        normalised: Tensor = self.norm(tokens_BTW)
        return normalised
