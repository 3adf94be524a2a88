"""Light decoders of masked auto-encoders: what was seen of one region -> a prediction for places in another.

Structure of BootMAE (Dong et al., ECCV 2022; reference `models/modeling_pretrain_bootmae.py`): every block is
self-attention, cross-attention to features of the encoder, MLP (`training.nn.blocks.DecoderBlock`).

Shapes: B images, S seen tokens, Q places asked for, T = S + Q tokens, M tokens of the memory, C channels of the
encoder, W of the decoder, O numbers predicted per place.
"""

import torch
from torch import Tensor, nn

from training.nn.positions import sincos
from training.nn.vision_transformer import BackboneConfig


class Decoder(nn.Module):
    """Seen tokens and a mask token at every place asked for -> tokens at these places; `predict` reads them out.

    Seen tokens bring their position along from the encoder; only mask tokens are told theirs, by the sin-cos code of
    their place.
    """

    def __init__(self, encoder: BackboneConfig, *, width: int, depth: int, heads: int, out: int) -> None:
        from training.nn.blocks import DecoderBlock, LayerNorm

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
