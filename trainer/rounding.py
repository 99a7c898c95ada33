"""The one way from a sample in [-1, 1] to the eight bits that are measured and looked at.

Rounding is part of the measurement: at an FID of 1 to 2 half a grey level of bias is visible. Every metric row names the rule.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from freeguide.configs.errors import DataError

ROUNDING = "round-half-up"


def to_uint8(x: Tensor) -> NDArray[np.uint8]:
    """Samples (N, C, H, W) in [-1, 1] as uint8 images (N, H, W, C): floor(127.5 x + 128), clipped to 0 .. 255.

    -1 gives 0, 1 gives 255, and every 8-bit level k that training saw as k / 127.5 - 1 comes back as k. Computed in float32.
    Raises DataError for NaN or infinity, which clipping would turn into a plausible grey.
    """
    x = x.detach().to("cpu", torch.float32)
    finite = torch.isfinite(x).flatten(1).all(dim=1)
    if not finite.all():
        image = int(torch.nonzero(~finite)[0, 0])
        raise DataError(f"sample {image} of {len(x)} is not finite, so the network has diverged; sample from an earlier checkpoint")
    levels = (x * 127.5 + 128.0).clamp(0.0, 255.0).to(torch.uint8)
    return np.ascontiguousarray(levels.permute(0, 2, 3, 1).numpy())
