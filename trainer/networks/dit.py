"""DiT: a transformer over image patches, conditioned by adaptive layer norm (Peebles & Xie, arXiv 2212.09748).

An image becomes tokens of `patch` x `patch` pixels with fixed sine-cosine positions. Every block reads the condition c (log-SNR
and class) as six vectors per sample (adaLN-Zero): a shift and a scale after each of its two layer norms, and a gate on each of
its two branches,

    x <- x + g1 * attention((1 + s1) * norm(x) + b1),     x <- x + g2 * mlp((1 + s2) * norm(x) + b2).

The gates start at 0: an untrained block is the identity. Signature, class table and null class are those of ADM.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from freeguide.configs.errors import ConfigError
from freeguide.configs.schema import ModelConfig
from freeguide.trainer.networks.layers import Conditioning, DropoutKey, Linear32, attend, zeroed

OPTIONS = ("channels", "heads", "depth", "patch", "learn_sigma")  # of `ModelConfig`; `channels` are those of a token


def sine_cosine_positions(tokens_per_side: int, width: int) -> Tensor:
    """Fixed positions (N^2, width) of an N x N grid, row by row: features of the column, then of the row. 4 divides `width`."""
    omega = 10_000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    phase = torch.arange(tokens_per_side, dtype=torch.float64)[:, None] * omega
    axis = torch.cat([phase.sin(), phase.cos()], dim=1).float()  # (N, width / 2)
    return torch.cat([axis.repeat(tokens_per_side, 1), axis.repeat_interleave(tokens_per_side, dim=0)], dim=1)


def norm(x: Tensor) -> Tensor:
    """Layer norm without weights, in fp32, in the dtype it was given."""
    return F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)


class Block(nn.Module):
    """One DiT block with adaLN-Zero: x (B, N, C), SiLU'd condition (B, C) -> (B, N, C)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        b1, s1, g1, b2, s2, g2 = self.modulation(emb)[:, None].chunk(6, dim=2)
        x = x + g1 * self.proj(attend(self.qkv(norm(x) * (1 + s1) + b1), self.heads))
        h = F.gelu(self.expand(norm(x) * (1 + s2) + b2), approximate="tanh")
        return x + g2 * self.contract(h)


class DiT(nn.Module):
    """The transformer. `trainer.networks.build.build_network` seeds the weights; call that. Raises ConfigError as `ADM`.

    DiT-XL/2 has `channels=1152, depth=28, heads=16, patch=2`, and the published ones `learn_sigma=true`.

    Set `recompute` to trade memory for a second forward of every block in the backward pass (activation checkpointing).
    """

    positions: Tensor

    def __init__(self, model: ModelConfig, *, image_size: int, channels: int, classes: int) -> None:
        _check(model, image_size)
        super().__init__()
        self.recompute = False
        self.patch = model.patch
        self.grid = image_size // model.patch
        self.conditioning = Conditioning(256, model.channels, classes + 1)
        self.embed = nn.Linear(channels * model.patch**2, model.channels)
        self.register_buffer("positions", sine_cosine_positions(self.grid, model.channels), persistent=False)
        self.blocks = nn.ModuleList(Block(model.channels, model.heads) for _ in range(model.depth))
        self.out_modulation = nn.Linear(model.channels, 2 * model.channels)
        self.out = Linear32(model.channels, (2 if model.learn_sigma else 1) * channels * model.patch**2)
        self.initialise()

    def initialise(self) -> None:
        """DiT's initialisation: Xavier-uniform matrices, N(0, 0.02^2) in the condition's MLP and table, zero gates and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        assert self.conditioning.classes is not None
        for embedding in (self.conditioning.hidden, self.conditioning.out, self.conditioning.classes):
            nn.init.normal_(embedding.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, Block):
                zeroed(module.modulation)
        zeroed(self.out_modulation)
        zeroed(self.out)

    def forward(self, z: Tensor, logsnr: Tensor, labels: Tensor, dropout: DropoutKey | None = None) -> Tensor:
        """As `ADM.forward`: (B, C, H, W), (B,), (B,) -> (B, C, H, W) fp32. DiT has no dropout: the key is not used."""
        emb = self.conditioning(logsnr, labels)
        x = self.embed(F.pixel_unshuffle(z, self.patch).flatten(2).transpose(1, 2).to(self.embed.weight.dtype))
        x = x + self.positions.to(x.dtype)
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, emb, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, emb)
        shift, scale = self.out_modulation(emb).float()[:, None].chunk(2, dim=2)
        h = self.out(norm(x.float()) * (1 + scale) + shift)  # (B, N, C' patch^2)
        return F.pixel_shuffle(h.transpose(1, 2).unflatten(2, (self.grid, self.grid)), self.patch)


def _check(model: ModelConfig, image_size: int) -> None:
    for option in ("channels", "depth", "heads", "patch"):
        if (value := getattr(model, option)) < 1:
            raise ConfigError(f"model.{option} is {value}: set it to at least 1")
    if image_size % model.patch:
        raise ConfigError(f"model.patch is {model.patch}: set it to a divisor of data.image_size, which is {image_size}")
    if model.channels % model.heads:
        raise ConfigError(f"model.heads is {model.heads}: set it to a divisor of model.channels, which is {model.channels}")
    if model.channels % 4:
        raise ConfigError(f"model.channels is {model.channels}: set it to a multiple of 4, as positions take a quarter each")
