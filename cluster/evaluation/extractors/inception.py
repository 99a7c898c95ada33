"""The Inception network of 2015-12-05, the one that "FID" and "IS" mean.

It is Inception-v3 (Szegedy et al. 2015) as TensorFlow published it in that year, with 1008 outputs. It differs from later copies in
three places that all move the numbers: its average pools leave the padding out of the mean, the last block pools by maximum, and
images are enlarged by TensorFlow 1's bilinear rule, which has no half-pixel centres. Levels enter as (x - 128) / 128.

    299x299x3 -> 35x35x192 -> 3 blocks of 35x35 -> 5 of 17x17 -> 3 of 8x8x2048 -> mean = the 2048 features -> 1008 logits

The Inception score takes the logits without their bias, as the original code does. sFID (Nash et al. 2021) takes the first 7
channels of the first 1x1 convolution of TensorFlow's block mixed_6, here Mixed_6d, as 17 x 17 x 7 = 2023 features.

The modules are named as in the converted weight files of pytorch-fid and torch-fidelity, which hold the same bytes.
"""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from freeguide.cluster.evaluation.extractors.features import INCEPTION, Loader, Measured, load_weights, to_rgb
from freeguide.configs.errors import DataError

HASH = "6726825d"  # first digits of the published file's sha256, also in its name
FILE = f"weights-inception-2015-12-05-{HASH}.pth"
SOURCE = (
    f"get it from github.com/toshas/torch-fidelity/releases (v0.2.0, {FILE}) or github.com/mseitzer/pytorch-fid/releases "
    f"(fid_weights, pt_inception-2015-12-05-{HASH}.pth) and keep the name"
)
SIZE = 299  # pixels per side of the network's input
BATCH = 64
SPATIAL = 7  # channels that sFID keeps

Conv = tuple[str, int, tuple[int, int]]  # name, channels out, kernel
Link = tuple[Conv, ...]  # one convolution, or two side by side whose outputs are joined


class BasicConv(nn.Module):
    """Convolution without bias, batch norm, ReLU. Padding keeps the size, except with `valid`."""

    def __init__(self, width_in: int, width: int, kernel: tuple[int, int], stride: int = 1, valid: bool = False) -> None:
        super().__init__()
        padding = (0, 0) if valid else (kernel[0] // 2, kernel[1] // 2)
        self.conv = nn.Conv2d(width_in, width, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Chains of convolutions side by side and a pool; their outputs are joined in that order.

    `pool` is "average" or "max", each followed by a 1x1 convolution to `pooled` channels, or "halve": then the pool and the last
    convolution of each chain take every second pixel, without padding.
    """

    def __init__(self, width_in: int, chains: tuple[tuple[Link, ...], ...], pool: str, pooled: int = 0) -> None:
        super().__init__()
        self.pool = pool
        self.names = [[[name for name, _, _ in link] for link in chain] for chain in chains]
        for chain in chains:
            width = width_in
            for link in chain:
                last = pool == "halve" and link is chain[-1]
                for name, width_out, kernel in link:
                    self.add_module(name, BasicConv(width, width_out, kernel, 2 if last else 1, valid=last))
                width = sum(width_out for _, width_out, _ in link)
        if pooled:
            self.branch_pool = BasicConv(width_in, pooled, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for chain in self.names:
            y = x
            for link in chain:
                y = torch.cat([self.get_submodule(name)(y) for name in link], dim=1)
            outputs.append(y)
        if self.pool == "average":
            outputs.append(self.branch_pool(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)))
        elif self.pool == "max":
            outputs.append(self.branch_pool(F.max_pool2d(x, 3, stride=1, padding=1)))
        else:
            outputs.append(F.max_pool2d(x, 3, stride=2))
        return torch.cat(outputs, dim=1)


class InceptionV3(nn.Module):
    """Input (N, 3, 299, 299) in [-1, 1) -> features (N, 2048), unbiased logits (N, 1008), spatial features (N, 2023)."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv(3, 32, (3, 3), stride=2, valid=True)
        self.Conv2d_2a_3x3 = BasicConv(32, 32, (3, 3), valid=True)
        self.Conv2d_2b_3x3 = BasicConv(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = BasicConv(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = BasicConv(80, 192, (3, 3), valid=True)
        self.Mixed_5b = _block_35(192, 32)
        self.Mixed_5c = _block_35(256, 64)
        self.Mixed_5d = _block_35(288, 64)
        self.Mixed_6a = Mixed(288, (_chain("branch3x3", 384, 3), _double_3x3()), "halve")
        self.Mixed_6b = _block_17(128)
        self.Mixed_6c = _block_17(160)
        self.Mixed_6d = _block_17(160)
        self.Mixed_6e = _block_17(192)
        self.Mixed_7a = Mixed(768, (_numbered("branch3x3", (192, 1), (320, 3)), _separable_7x7x3()), "halve")
        self.Mixed_7b = _block_8(1280, "average")
        self.Mixed_7c = _block_8(2048, "max")
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))
        branch = self.Mixed_6d.get_submodule("branch1x1")(x)[:, :SPATIAL]
        spatial = branch.permute(0, 2, 3, 1).flatten(1)  # TensorFlow's order, so that its statistics fit
        x = self.Mixed_6e(self.Mixed_6d(x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))
        features = x.mean(dim=(2, 3))
        return features, features @ self.fc.weight.T, spatial


@dataclass(frozen=True, eq=False)
class Inception:
    """An extractor. It is called `inception-2015-12-05`, and its distances FID, only if its weights are the published ones."""

    network: InceptionV3
    hash: str  # sha256 of the weight file
    resize: str = f"tf1-bilinear-{SIZE}"
    channels: int = 3
    width: int = 2048
    has_classes: bool = True

    @property
    def name(self) -> str:
        return INCEPTION if self.hash.startswith(HASH) else f"other-inception-{self.hash[:8]}"

    def measure(self, images: NDArray[np.uint8], device: str = "cpu") -> Measured:
        """Images uint8 (N, H, W, 1 or 3) -> features (N, 2048), probabilities (N, 1008), spatial features (N, 2023)."""
        network = self.network.to(device)
        parts: list[list[Tensor]] = []
        with torch.inference_mode():
            for start in range(0, len(images), BATCH):
                x = tf1_bilinear(to_rgb(images[start : start + BATCH], self.name).to(device), SIZE)
                features, logits, spatial = network((x - 128.0) / 128.0)
                parts.append([features.cpu(), logits.softmax(dim=1).cpu(), spatial.cpu()])
        features, probabilities, spatial = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
        return Measured(features, probabilities, spatial)


def from_bytes(data: bytes, where: str, prefix: str = HASH) -> Inception:
    """Inception with the weights in `data`, whose sha256 must begin with `prefix`. Raises DataError otherwise."""
    found = hashlib.sha256(data).hexdigest()
    if not found.startswith(prefix):
        raise DataError(f"{where} is not the file of 2015-12-05 (its sha256 is {found[:8]}..., not {prefix}...); {SOURCE}")
    network = InceptionV3()
    return Inception(network, load_weights(data, network, where))


LOADER = Loader("*inception-2015-12-05*", FILE, from_bytes, SOURCE)


def tf1_bilinear(x: Tensor, size: int) -> Tensor:
    """x (N, C, H, W) float32 -> (N, C, size, size) by TensorFlow 1's bilinear rule, rounding for rounding.

    Output pixel i reads at i H / size, without the half-pixel shift of later versions; beyond the last pixel it repeats that one.
    """
    for dim in (3, 2):  # along the rows first, as TensorFlow does
        pixels = x.shape[dim]
        position = torch.arange(size, dtype=torch.float32, device=x.device) * (torch.tensor(float(pixels)) / size)
        low = position.floor()
        shape = [1] * 4
        shape[dim] = size
        weight = (position - low).reshape(shape)
        index = low.long().clamp(max=pixels - 1)
        near, far = x.index_select(dim, index), x.index_select(dim, (index + 1).clamp(max=pixels - 1))
        x = near + (far - near) * weight
    return x


# --- the blocks ---


def _chain(name: str, width: int, kernel: int) -> tuple[Link, ...]:
    return (((name, width, (kernel, kernel)),),)


def _numbered(name: str, *convolutions: tuple[int, int | tuple[int, int]]) -> tuple[Link, ...]:
    """name_1, name_2, ... of the widths and kernels given."""
    return tuple(
        ((f"{name}_{i}", width, kernel if isinstance(kernel, tuple) else (kernel, kernel)),)
        for i, (width, kernel) in enumerate(convolutions, 1)
    )


def _double_3x3() -> tuple[Link, ...]:
    return _numbered("branch3x3dbl", (64, 1), (96, 3), (96, 3))


def _separable_7x7x3() -> tuple[Link, ...]:
    return _numbered("branch7x7x3", (192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3))


def _block_35(width_in: int, pooled: int) -> Mixed:
    chains = (_chain("branch1x1", 64, 1), _numbered("branch5x5", (48, 1), (64, 5)), _double_3x3())
    return Mixed(width_in, chains, "average", pooled)


def _block_17(width: int) -> Mixed:
    wide, tall = (1, 7), (7, 1)
    single = _numbered("branch7x7", (width, 1), (width, wide), (192, tall))
    double = _numbered("branch7x7dbl", (width, 1), (width, tall), (width, wide), (width, tall), (192, wide))
    return Mixed(768, (_chain("branch1x1", 192, 1), single, double), "average", 192)


def _block_8(width_in: int, pool: str) -> Mixed:
    def fork(name: str) -> Link:
        return (f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1))

    single = (*_numbered("branch3x3", (384, 1)), fork("branch3x3_2"))
    double = (*_numbered("branch3x3dbl", (448, 1), (384, 3)), fork("branch3x3dbl_3"))
    return Mixed(width_in, (_chain("branch1x1", 320, 1), single, double), pool, 192)
