"""Executor: what runs the work items of a job, in this process or on the actors of a cluster.

A job says what its items are and how a worker is made; it never asks where that happens. `cluster/runtime/engines.py` has an
executor for each value of `cluster.engine`. Results do not depend on which one it is, as workers publish what they make under names
that follow from the items.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch

from freeguide.configs.errors import UserError

T = TypeVar("T")
Worker = Callable[[T], None]  # made once per process; makes and publishes what an item stands for


@dataclass(frozen=True)
class Resources:
    """What is set aside for one worker or actor."""

    cpus: float
    gpus: float

    @property
    def threads(self) -> int:
        """Threads for torch: part of what makes results repeat to the bit."""
        return max(1, int(self.cpus))

    @property
    def bundle(self) -> dict[str, float]:
        """As Ray counts it."""
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.gpus else "cpu")


class Run(Protocol):
    def __call__(self, items: Sequence[T], make: Callable[[Resources], Worker[T]], gpus: bool = True) -> Iterator[T]:
        """Yield each item once a worker that `make` has made is done with it, in any order. Without `gpus`, no worker gets one.

        Raises the UserError of a worker, with its sentence, and a UserError if an item needs more memory than there is.
        """


@dataclass(frozen=True)
class Executor:
    run: Run  # starts or joins what it runs on when it is first called
    kind: Callable[[], str]  # the kind of device that workers have, see `units.kind_of`
    alike: bool = True  # whether workers have this machine's devices, so that `kind` starts nothing
    at_once: int = 1  # workers at a time, at most


def too_small(error: torch.OutOfMemoryError) -> UserError:
    """What a user is told of a GPU that is too small for an item."""
    found = str(error).split(". ")[0]
    return UserError(f"the GPU's memory is too small for a work unit ({found}); lower sampling.batch")
