"""Exponential moving average of the fp32 weights, kept where the weights are: each rank averages the fragments it owns.

After step k: ema <- decay * ema + (1 - decay) * weights. One fused update a step, without communication, at every ZeRO stage.
"""

import torch
from torch import Tensor

from trainer.engine import Engine


class Ema:
    """The average of `engine`'s master weights; starts at their current values, as ADM's does."""

    def __init__(self, engine: Engine, decay: float) -> None:
        self.decay = decay
        self.fragments = engine.owned()
        self._weights = [engine.values(f, "master") for f in self.fragments]
        self.values: list[Tensor] = [w.clone() for w in self._weights]

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights after one optimizer step."""
        torch._foreach_lerp_(self.values, self._weights, 1.0 - self.decay)
