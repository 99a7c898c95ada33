"""The averages of a training's fp32 weights, kept where the weights are: each rank averages the fragments it owns.

One fused update a step and profile, at every ZeRO stage, without communication.
"""

from collections.abc import Container, Sequence

import torch
from torch import Tensor

from freeguide.trainer.checkpoints.profiles import Profile
from freeguide.trainer.training.engine import Engine


class Ema:
    """The averages of `engine`'s master weights. They start at the present weights, as ADM's does.

    `fragments` are the parts of the parameters that this rank averages, `values[name]` the average of each of them.
    """

    def __init__(self, engine: Engine, profiles: Sequence[Profile]) -> None:
        self.profiles = tuple(profiles)
        self.fragments = engine.owned()
        self._weights = [engine.values(f, "master") for f in self.fragments]
        self.values: dict[str, list[Tensor]] = {p.name: [w.clone() for w in self._weights] for p in self.profiles}

    def drop(self, names: Container[str]) -> None:
        """Keep these averages no more."""
        self.profiles = tuple(p for p in self.profiles if p.name not in names)
        self.values = {p.name: self.values[p.name] for p in self.profiles}

    @torch.no_grad()
    def update(self, update: int) -> None:
        """Follow the weights after optimizer step number `update` = 1, 2, ..."""
        for profile in self.profiles:
            if self._weights:  # with more ranks than values a rank may own none
                torch._foreach_lerp_(self.values[profile.name], self._weights, 1.0 - profile.kept(update))
