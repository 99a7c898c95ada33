"""What the networks share: how they are conditioned, how they attend, where they stay in fp32, how they drop activations.

**Conditioning on the noise level.** The paper gives ADM a continuous time and does not say how log-SNR enters it. Ours is the
embedding that Salimans & Ho (arXiv 2202.00512) use with the same cosine schedule: the bounded transform

    u(logsnr) = (2 / pi) arctan(exp(-logsnr / 2))  in (0, 1),

followed by ADM's own sinusoidal features of t = 1000 u. Where ADM counts 1000 steps of the cosine schedule, t is that count made
continuous; training log-SNRs are uniform in u, so the features resolve them evenly; no log-SNR can leave the range.

**Precision.** Weights may be bf16. The arithmetic of the log-SNR embedding, of group norms, of the softmax, and of the output
layer is fp32 all the same: eps must not be rounded to 8 bits, because sampling magnifies its error by exp(-logsnr / 2). Each fp32
layer is a module that reads its own weights only, as ZeRO stage 3 gathers weights module by module.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from freeguide.trainer.diffusion.randomness import keep_mask, mask_keys

STREAMS = 64  # layers with dropout whose keys are made together


@dataclass(frozen=True)
class DropoutKey:
    """What decides which activations a training forward drops: the seed and the samples, never the batch or the rank."""

    seed: int  # seed of the run
    index: Tensor  # (B,) int64: global index of each sample of the batch
    keys: Tensor = field(init=False)  # (B, STREAMS, 2), of `mask_keys`

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", mask_keys(self.seed, self.index, STREAMS))


def drop(h: Tensor, p: float, key: DropoutKey | None, stream: int) -> Tensor:
    """Inverted dropout of `h` (B, ...) with probability `p`; `stream` numbers the layer. Nothing is drawn for p = 0 or no key."""
    if key is None or p == 0:
        return h
    keep = keep_mask(key.seed, key.index, tuple(h.shape[1:]), p, stream, key.keys[:, stream] if stream < STREAMS else None)
    return h * keep / (1 - p)


def logsnr_features(logsnr: Tensor, n: int) -> Tensor:
    """Sinusoidal features of 1000 u(logsnr): (B,) -> (B, n) fp32, `n` even; cosines first, frequencies 10000^(-2k/n) as in ADM."""
    u = torch.atan(torch.exp(-0.5 * logsnr.float())) * (2 / math.pi)
    octave = torch.arange(n // 2, dtype=torch.float32, device=logsnr.device) / (n // 2)
    phase = 1000 * u[:, None] * torch.exp(-math.log(10_000) * octave)
    return torch.cat([phase.cos(), phase.sin()], dim=1)


class Conditioning(nn.Module):
    """Log-SNR (B,) and labels (B,) -> SiLU(MLP(features) + class row): (B, width) in the dtype of the weights.

    `rows` is the number of class ids: classes + 1, the last of them the null id of an unconditional forward, or 0 for none.
    Networks only ever use the sum through a SiLU, so that is taken here, once.
    """

    def __init__(self, features: int, width: int, rows: int) -> None:
        super().__init__()
        self.features = features
        self.hidden = Linear32(features, width)
        self.out = Linear32(width, width)
        self.classes = nn.Embedding(rows, width) if rows else None

    def forward(self, logsnr: Tensor, labels: Tensor | None) -> Tensor:
        emb = self.out(F.silu(self.hidden(logsnr_features(logsnr, self.features))))
        if self.classes is not None and labels is not None:
            emb = emb + self.classes(labels)
        return F.silu(emb).to(self.hidden.weight.dtype)


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Self-attention of tokens: queries, keys and values side by side (B, N, 3C) -> (B, N, C).

    The channels are split into q, k, v first and into heads second: ADM's "new attention order". The older order is the same
    function with the rows of the projection permuted.
    """
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class GroupNorm(nn.GroupNorm):
    """Group norm in fp32 that gives back the dtype it was given.

    ADM's 32 groups wherever they divide the channels into groups of 4 or more, so in every published network. Smaller networks
    get the largest number of groups that does: a group of one channel would erase any condition that is added to a channel.
    """

    def __init__(self, channels: int) -> None:
        most = max(1, min(32, channels // 4))
        super().__init__(next(groups for groups in range(most, 0, -1) if channels % groups == 0), channels)

    def forward(self, h: Tensor) -> Tensor:
        return F.group_norm(h.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(h.dtype)


class Linear32(nn.Linear):
    """A linear layer whose arithmetic and output are fp32, whatever the dtype of its weights, under autocast too."""

    def forward(self, h: Tensor) -> Tensor:
        with _without_autocast(h):
            return F.linear(h.float(), self.weight.float(), self.bias.float())


class Conv32(nn.Conv2d):
    """A convolution whose arithmetic and output are fp32, whatever the dtype of its weights, under autocast too."""

    def forward(self, h: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        with _without_autocast(h):
            return F.conv2d(h.float(), self.weight.float(), bias, self.stride, self.padding)


def _without_autocast(h: Tensor) -> AbstractContextManager[object]:
    device = h.device.type
    return torch.autocast(device, enabled=False) if device in ("cpu", "cuda") else nullcontext()


def zeroed(layer: nn.Module) -> nn.Module:
    """The same layer with all parameters 0, so that what it ends contributes nothing before training."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
