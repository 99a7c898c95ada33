"""Work units: made by whichever actor is free, published once. In sampling, a unit is the images of one w in one range of indices.

A unit's name says what it holds, and its object appears whole or not at all. So a job begins by listing what is there and makes
the rest; killed actors, nodes and drivers cost the units in hand, and the same command again goes on. Everything downstream
reads units in the order of their names, never in the order in which they were made.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from freeguide.cluster.evaluation.executor import Executor, Resources, T, Worker
from freeguide.configs.errors import ConfigError
from freeguide.configs.schema import ClusterConfig
from freeguide.data_pipeline import closure
from freeguide.data_pipeline.store.base import Store
from freeguide.trainer.networks.kernels import choose_kernels

MAKING = "freeguide.cluster.evaluation.series:Worker"  # decides what a unit holds: images, and what extractors say of them
MEASURING = "freeguide.cluster.evaluation.fold:RowWorker"  # decides the values of a row, given its units
KIND = "sampled_on.txt"  # in a run: the kind of device that sampled it last


@dataclass(frozen=True, order=True)
class Unit:
    """Images [first, last) at guidance weight w."""

    w: float
    first: int
    last: int

    def key(self, suffix: str) -> str:
        return f"units/w{self.w:g}/{self.first:09d}-{self.last:09d}.{suffix}"


def split(weights: Sequence[float], images: int, unit: int) -> list[Unit]:
    """All units of a job in their one order: by w, then by index."""
    return [Unit(w, first, min(first + unit, images)) for w in sorted(weights) for first in range(0, images, unit)]


def missing(store: Store, units: Sequence[Unit], suffix: str) -> list[Unit]:
    """The units that have not been published yet."""
    present = {info.key for info in store.list("units/")} if units else set()
    return [u for u in units if u.key(suffix) not in present]


def kind_of(device: torch.device) -> str:
    """What rounds alike: the model of the device, the torch that computes on it, and whether it shortens fp32 to TF32."""
    torch_version = f"torch {torch.__version__}"
    if device.type != "cuda":
        return f"CPU with {torch.backends.cpu.get_cpu_capability()}, {torch_version}"
    short = (
        torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32 or os.environ.get("NVIDIA_TF32_OVERRIDE") == "1"
    )
    return f"{torch.cuda.get_device_name(device)}, {torch_version}" + (", TF32" if short else "")


def on_one_kind(run: Store, executor: Executor, work: Callable[[str, Executor], T]) -> T:
    """`work(kind, executor)` with the kind of device that this command's workers have: of this machine, or as one of them says.

    Where nodes differ, it is the kind of one of them: `check_kind` stops the others. On a cluster, work begins with the kind that
    the run was sampled on before, so that it asks nobody if all is there already. If it has items to run after all and finds
    another kind, it begins again with that.
    """
    if executor.alike:
        return work(executor.kind(), executor)
    kind = run.get(KIND, 2**16).decode(errors="replace") if run.exists(KIND) else executor.kind()

    def run_on_it(items: Sequence[Any], make: Callable[[Resources], Worker[Any]], gpus: bool = True) -> Iterator[Any]:
        if (there := executor.kind()) != kind:
            raise _OtherKind(there)
        return executor.run(items, make, gpus)

    try:
        done = work(kind, dataclasses.replace(executor, run=run_on_it))
    except _OtherKind as other:
        kind = str(other)
        done = work(kind, executor)
    run.put(KIND, kind.encode())
    return done


class _OtherKind(Exception):
    """The cluster has devices of the kind that this names."""


def check_kind(begun: str, here: str) -> None:
    """Raises ConfigError on another kind of device than the one that was begun with."""
    if begun and begun != here:
        raise ConfigError(
            f"this was begun on {begun} and an actor has {here}: images of both would stand in one row; give the command to a "
            "cluster, or a part of it, whose nodes have one kind of device"
        )


def kind_with(gpu: bool) -> str:
    """The kind of a worker in this process, with a GPU or without."""
    choose_kernels()
    return kind_of(torch.device("cuda" if gpu else "cpu"))


def kind_here(options: ClusterConfig) -> str:
    """The kind of workers on this machine."""
    gpus = options.gpus_per_worker
    return kind_with(gpus > 0 or (gpus < 0 and torch.cuda.is_available()))


def code_version() -> str:
    """Version of the package and a hash of the code that decides a row: numbers name their code."""
    try:
        number = version("freeguide")
    except PackageNotFoundError:
        number = "source"
    return f"{number}+{closure.code_version(MAKING, MEASURING)}"
