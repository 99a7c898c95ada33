"""The noise-aware classifier p(c | z, logsnr) of classifier guidance (Dhariwal & Nichol, arXiv 2105.05233, section 4).

It is ADM's encoder with an attention pool in the place of the decoder (CLIP's: the mean of the pixels queries them all). The
paper compares against guidance by the gradient of such a classifier (section 3.1). ADM's published one at 64x64 has
`channels=128, res_blocks=4` and otherwise the defaults of `ModelConfig`, without dropout.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freeguide.configs.schema import ModelConfig
from freeguide.trainer.networks.adm import Encoder, check_adm, number_streams
from freeguide.trainer.networks.layers import Conditioning, DropoutKey, GroupNorm, Linear32, attend


class AttentionPool(nn.Module):
    """(B, C, S, S) -> logits (B, classes) fp32: the mean pixel joins the pixels as a token, attends, and is projected."""

    def __init__(self, width: int, size: int, heads: int, classes: int) -> None:
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(torch.randn(1 + size**2, width) / width**0.5)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = Linear32(width, classes)

    def forward(self, h: Tensor) -> Tensor:
        pixels = h.flatten(2).transpose(1, 2)  # (B, S S, C)
        tokens = torch.cat([pixels.mean(dim=1, keepdim=True), pixels], dim=1) + self.position
        return self.proj(attend(self.qkv(tokens), self.heads)[:, 0])


class Classifier(nn.Module):
    """ADM's noise-aware classifier. `trainer.networks.build.build_classifier` seeds the weights. Raises ConfigError as `ADM`.

    Set `recompute` to trade memory for a second forward of every layer in the backward pass (activation checkpointing).
    """

    def __init__(self, model: ModelConfig, *, image_size: int, channels: int, classes: int) -> None:
        check_adm(model, image_size)
        super().__init__()
        self.recompute = False
        self.conditioning = Conditioning(model.channels, 4 * model.channels, 0)
        self.encoder = Encoder(model, image_size=image_size, channels=channels)
        self.out_norm = GroupNorm(self.encoder.width)
        heads = self.encoder.width // model.head_channels if model.head_channels else model.heads
        self.pool = AttentionPool(self.encoder.width, self.encoder.size, heads, classes)
        number_streams(self)

    def forward(self, z: Tensor, logsnr: Tensor, dropout: DropoutKey | None = None) -> Tensor:
        """Logits (B, classes) fp32 for noisy images z (B, C, H, W) fp32 of log-SNR (B,) fp32; `dropout` as in `ADM.forward`."""
        h, _ = self.encoder(z, self.conditioning(logsnr, None), dropout, self.recompute)
        return self.pool(F.silu(self.out_norm(h)))
