"""The network of the paper: ADM, the U-Net of Dhariwal & Nichol (arXiv 2105.05233), with log-SNR in the place of time.

    z (B, C, H, W), logsnr (B,), labels (B,)  ->  eps (B, C, H, W)

A convolution, `levels` of residual blocks that halve the feature map between them, a middle, and the same way back, where each
block also sees the encoder's feature map of its own depth. Blocks attend where the feature map has one of the sizes named in the
configuration. Log-SNR and class enter every residual block as scale and shift of a group norm. One class table serves the
conditional and the unconditional network, as section 3.2 of the paper proposes: the null class is one more id, `classes`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from freeguide.configs.errors import ConfigError
from freeguide.configs.schema import ModelConfig
from freeguide.trainer.networks.layers import Conditioning, Conv32, DropoutKey, GroupNorm, attend, drop, zeroed

OPTIONS = (  # of `ModelConfig`
    *("channels", "channel_mult", "res_blocks", "attention", "heads", "head_channels"),
    *("resblock_updown", "scale_shift_norm", "dropout", "learn_sigma"),
)

Resize = Callable[[Tensor], Tensor]


def halve(h: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, H/2, W/2): means of 2x2 pixels."""
    return F.avg_pool2d(h, 2)


def double(h: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, C, 2H, 2W): every pixel four times."""
    return F.interpolate(h, scale_factor=2, mode="nearest")


class ResBlock(nn.Module):
    """norm, SiLU, (resize), conv, norm conditioned on `emb`, SiLU, dropout, zero conv; added to the (resized) input.

    `stream` is the block's own number in its network; it keys the dropout masks.
    """

    def __init__(self, model: ModelConfig, in_width: int, out_width: int, resize: Resize | None = None) -> None:
        super().__init__()
        self.p = model.dropout
        self.stream = 0
        self.resize = resize
        self.scale_shift_norm = model.scale_shift_norm
        self.in_norm = GroupNorm(in_width)
        self.in_conv = nn.Conv2d(in_width, out_width, 3, padding=1)
        self.emb = nn.Linear(4 * model.channels, (2 if model.scale_shift_norm else 1) * out_width)
        self.out_norm = GroupNorm(out_width)
        self.out_conv = zeroed(nn.Conv2d(out_width, out_width, 3, padding=1))
        self.skip = nn.Identity() if in_width == out_width else nn.Conv2d(in_width, out_width, 1)

    def forward(self, x: Tensor, emb: Tensor, dropout: DropoutKey | None) -> Tensor:
        h = F.silu(self.in_norm(x))
        if self.resize is not None:
            h, x = self.resize(h), self.resize(x)
        h = self.in_conv(h)
        condition = self.emb(emb)[:, :, None, None]
        if self.scale_shift_norm:
            scale, shift = condition.chunk(2, dim=1)
            h = self.out_norm(h) * (1 + scale) + shift
        else:
            h = self.out_norm(h + condition)
        h = drop(F.silu(h), self.p, dropout, self.stream)
        return self.skip(x) + self.out_conv(h)


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map, added to its input."""

    def __init__(self, model: ModelConfig, width: int) -> None:
        super().__init__()
        self.heads = width // model.head_channels if model.head_channels else model.heads
        self.norm = GroupNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = zeroed(nn.Linear(width, width))

    def forward(self, x: Tensor, emb: Tensor, dropout: DropoutKey | None) -> Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (B, H W, C)
        h = self.proj(attend(self.qkv(tokens), self.heads))
        return x + h.transpose(1, 2).unflatten(2, x.shape[2:])


class ResizeConv(nn.Module):
    """The change of resolution where `resblock_updown` is off: a strided convolution, or doubling and a convolution."""

    def __init__(self, width: int, *, down: bool) -> None:
        super().__init__()
        self.down = down
        self.conv = nn.Conv2d(width, width, 3, stride=2 if down else 1, padding=1)

    def forward(self, x: Tensor, emb: Tensor, dropout: DropoutKey | None) -> Tensor:
        return self.conv(x if self.down else double(x))


def resize_layer(model: ModelConfig, width: int, *, down: bool) -> nn.Module:
    if model.resblock_updown:
        return ResBlock(model, width, width, halve if down else double)
    return ResizeConv(width, down=down)


class Stage(nn.ModuleList):
    """Layers in order; every layer is called as layer(h, emb, dropout).

    With `recompute` only their inputs are kept, and each runs again in the backward pass.
    """

    def forward(self, h: Tensor, emb: Tensor, dropout: DropoutKey | None, recompute: bool) -> Tensor:
        for layer in self:
            if recompute and torch.is_grad_enabled():
                # The layers draw nothing from torch's generators: dropout masks come back from their key.
                h = checkpoint(layer, h, emb, dropout, use_reentrant=False, preserve_rng_state=False)
            else:
                h = layer(h, emb, dropout)
        return h


def number_streams(network: nn.Module) -> None:
    """Give every residual block its own dropout stream: 0, 1, 2, ... in the order of construction."""
    for stream, block in enumerate(module for module in network.modules() if isinstance(module, ResBlock)):
        block.stream = stream


class Encoder(nn.Module):
    """ADM's way down and its middle: z (B, C, H, W) -> the deepest features, and the stack of feature maps for the way up.

    `skip_widths` are the channels of that stack, `width` and `size` the channels and pixels of the deepest features.
    """

    def __init__(self, model: ModelConfig, *, image_size: int, channels: int) -> None:
        super().__init__()
        width, size = model.channel_mult[0] * model.channels, image_size
        self.in_conv = nn.Conv2d(channels, width, 3, padding=1)
        self.stages = nn.ModuleList()
        self.skip_widths = [width]
        for level, mult in enumerate(model.channel_mult):
            if level > 0:
                self.stages.append(Stage([resize_layer(model, width, down=True)]))
                self.skip_widths.append(width)
                size //= 2
            for _ in range(model.res_blocks):
                stage = Stage([ResBlock(model, width, mult * model.channels)])
                width = mult * model.channels
                if size in model.attention:
                    stage.append(Attention(model, width))
                self.stages.append(stage)
                self.skip_widths.append(width)
        self.middle = Stage([ResBlock(model, width, width), Attention(model, width), ResBlock(model, width, width)])
        self.width, self.size = width, size

    def forward(self, z: Tensor, emb: Tensor, dropout: DropoutKey | None, recompute: bool) -> tuple[Tensor, list[Tensor]]:
        h = self.in_conv(z.to(self.in_conv.weight.dtype))
        skips = [h]
        for stage in self.stages:
            h = stage(h, emb, dropout, recompute)
            skips.append(h)
        return self.middle(h, emb, dropout, recompute), skips


class ADM(nn.Module):
    """The U-Net. `trainer.networks.build.build_network` seeds the weights; call that.

    Set `recompute` to trade memory for a second forward of every layer in the backward pass (activation checkpointing).
    Raises ConfigError for options that do not fit each other or the images.
    """

    def __init__(self, model: ModelConfig, *, image_size: int, channels: int, classes: int) -> None:
        check_adm(model, image_size)
        super().__init__()
        self.recompute = False
        self.conditioning = Conditioning(model.channels, 4 * model.channels, classes + 1)
        self.encoder = Encoder(model, image_size=image_size, channels=channels)
        self.decoder = nn.ModuleList()
        skip_widths, width, size = list(self.encoder.skip_widths), self.encoder.width, self.encoder.size
        for level, mult in reversed(list(enumerate(model.channel_mult))):
            for block in range(model.res_blocks + 1):
                stage = Stage([ResBlock(model, width + skip_widths.pop(), mult * model.channels)])
                width = mult * model.channels
                if size in model.attention:
                    stage.append(Attention(model, width))
                if level > 0 and block == model.res_blocks:
                    stage.append(resize_layer(model, width, down=False))
                    size *= 2
                self.decoder.append(stage)
        self.out_norm = GroupNorm(width)
        self.out_conv = zeroed(Conv32(width, (2 if model.learn_sigma else 1) * channels, 3, padding=1))
        number_streams(self)

    def forward(self, z: Tensor, logsnr: Tensor, labels: Tensor, dropout: DropoutKey | None = None) -> Tensor:
        """The network's prediction for noisy images.

        Args:
            z: (B, C, H, W) fp32, noisy images of section 2 of the paper.
            logsnr: (B,) fp32, their log-SNR.
            labels: (B,) int64 in 0 .. classes; `classes` is the null class.
            dropout: what keys the dropout masks of a training forward; None drops nothing.

        Returns:
            (B, C, H, W) fp32; (B, 2 C, H, W) with `learn_sigma`, the prediction first.
        """
        emb = self.conditioning(logsnr, labels)
        h, skips = self.encoder(z, emb, dropout, self.recompute)
        for stage in self.decoder:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb, dropout, self.recompute)
        return self.out_conv(F.silu(self.out_norm(h.float())))


def check_adm(model: ModelConfig, image_size: int) -> None:
    """Raises ConfigError if the options fit neither each other nor the images."""
    if model.channels < 2 or model.channels % 2:
        raise ConfigError(f"model.channels is {model.channels}: set it to an even number of at least 2")
    if not model.channel_mult or min(model.channel_mult) < 1:
        raise ConfigError(f"model.channel_mult is {list(model.channel_mult)}: give one whole number of at least 1 for each level")
    if model.res_blocks < 1:
        raise ConfigError(f"model.res_blocks is {model.res_blocks}: set it to at least 1")
    if not 0 <= model.dropout < 1:
        raise ConfigError(f"model.dropout is {model.dropout}: set it to a probability of at least 0 and below 1")
    levels = len(model.channel_mult)
    if image_size % 2 ** (levels - 1):
        raise ConfigError(
            f"data.image_size is {image_size}, which model.channel_mult halves {levels - 1} times: "
            f"use images divisible by {2 ** (levels - 1)} or fewer levels"
        )
    sizes = [image_size >> level for level in range(levels)]
    for size in model.attention:
        if size not in sizes:
            raise ConfigError(
                f"model.attention names feature maps of {size} pixels, which do not occur: "
                f"choose among {', '.join(map(str, sizes))} (data.image_size and its halves, one for each level)"
            )
    attended = {mult for mult, size in zip(model.channel_mult, sizes, strict=True) if size in model.attention}
    option = "head_channels" if model.head_channels else "heads"
    divisor = getattr(model, option)
    for width in sorted(mult * model.channels for mult in attended | {model.channel_mult[-1]}):
        if divisor < 1 or width % divisor:
            raise ConfigError(f"model.{option} is {divisor}: set it to a divisor of {width}, a width at which the network attends")
