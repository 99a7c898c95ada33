"""DINOv2 ViT-L/14 (Oquab et al. 2023), whose Frechet distance agrees better with people's judgement than Inception's.

FD-DINOv2 (Stein et al. 2023) is the Frechet distance of the 1024 features of the class token. Images are resized to 224x224 by
bicubic interpolation with antialiasing, then normalised with ImageNet's mean and deviation. The position embedding was learned on
a 37x37 grid of patches and is interpolated to 16x16.

The modules are named as in the published checkpoint. No hash of that file is published, so a row carries the sha256 of the file
that was used.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from freeguide.cluster.evaluation.extractors.features import Loader, Measured, load_weights, to_rgb
from freeguide.cluster.evaluation.extractors.roles import DINOV2

FILE = "dinov2_vitl14_pretrain.pth"
SOURCE = f"get it from dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/{FILE} and keep the name"
SIZE, PATCH = 224, 14  # pixels per side of the input and of a patch
GRID = 37  # patches per side at which the position embedding was learned
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, for levels in [0, 1]
BATCH = 32


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Scale(nn.Module):
    """A learned factor per channel of a residual branch (LayerScale)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.ls1 = Scale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = Mlp(width)
        self.ls2 = Scale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class Patches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # (N, patches, width), row by row


class VisionTransformer(nn.Module):
    """Input (N, 3, 224, 224), normalised -> the class token after the last norm, (N, width). Defaults: ViT-L."""

    def __init__(self, width: int = 1024, depth: int = 24, heads: int = 16) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, GRID * GRID + 1, width))
        self.mask_token = nn.Parameter(torch.zeros(1, width))  # of the training; in the file, so here
        self.patch_embed = Patches(width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.patch_embed(x)], dim=1)
        x = x + self._positions(SIZE // PATCH)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)[:, 0]

    def _positions(self, side: int) -> Tensor:
        """The position embedding for side x side patches, (1, 1 + side^2, width)."""
        grid = self.pos_embed[:, 1:].reshape(1, GRID, GRID, -1).permute(0, 3, 1, 2)
        # The published code enlarges the factor by 0.1 / GRID against rounding; features were always computed with it.
        factor = (side + 0.1) / GRID
        grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


@dataclass(frozen=True, eq=False)
class DinoV2:
    """An extractor without classes: it gives FD-DINOv2 and no Inception score."""

    network: VisionTransformer
    hash: str  # sha256 of the weight file
    name: str = DINOV2
    resize: str = f"bicubic-antialias-{SIZE}"
    channels: int = 3
    has_classes: bool = False

    @property
    def width(self) -> int:
        return int(self.network.norm.normalized_shape[0])

    def measure(self, images: NDArray[np.uint8], device: str = "cpu") -> Measured:
        """Images uint8 (N, H, W, 1 or 3) -> features (N, 1024)."""
        network = self.network.to(device)
        with torch.inference_mode():
            parts = [
                network(to_input(to_rgb(images[start : start + BATCH], self.name).to(device))).cpu()
                for start in range(0, len(images), BATCH)
            ]
        return Measured(torch.cat(parts).numpy())


def from_bytes(data: bytes, where: str) -> DinoV2:
    """DINOv2 with the weights in `data`. Raises DataError if they are of another network."""
    with torch.device("meta"):  # 1.2 GB that need not be initialised first
        network = VisionTransformer()
    return DinoV2(network, load_weights(data, network, where))


LOADER = Loader("*dinov2_vitl14*", FILE, from_bytes, SOURCE)


def to_input(x: Tensor) -> Tensor:
    """Levels 0 .. 255, float32 (N, 3, H, W) -> the network's input (N, 3, 224, 224). Overshoots of the resize are kept."""
    x = F.interpolate(x, (SIZE, SIZE), mode="bicubic", antialias=True) / 255.0
    mean, std = (torch.tensor(values, device=x.device).reshape(1, 3, 1, 1) for values in (MEAN, STD))
    return (x - mean) / std
