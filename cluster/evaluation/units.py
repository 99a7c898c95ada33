"""Work units: made by whichever actor is free, published once. In sampling, a unit is the images of one w in one range of indices.

A unit's name says what it holds, and its object appears whole or not at all. So a job begins by listing what is there and makes
the rest; killed actors, nodes and drivers cost the units in hand, and the same command again goes on. Everything downstream
reads units in the order of their names, never in the order in which they were made.
"""

import contextlib
import functools
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TypeVar, cast

import ray
import torch

from freeguide.cluster.runtime.session import Resources
from freeguide.configs.errors import ConfigError, UserError
from freeguide.configs.schema import Config
from freeguide.data_pipeline import closure
from freeguide.data_pipeline.store.base import Store
from freeguide.trainer.networks.kernels import choose_kernels

MAKING = "freeguide.cluster.evaluation.series:Worker"  # decides what a unit holds: images, and what extractors say of them
MEASURING = "freeguide.cluster.evaluation.fold:Folder"  # decides the values of a row, given its units
KIND = "sampled_on.txt"  # in a run: the kind of device that sampled it last
DEATHS = 5  # actors that one unit may cost
_LEAVE_S = 1.0  # longest wait for Ray Data's threads: some of them stay on purpose

T = TypeVar("T")
Connect = Callable[[], Resources]  # starts or joins the cluster, if that has not been done
Worker = Callable[[T], None]  # made once per actor; makes and publishes units


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


def run(units: Sequence[T], make_worker: Callable[[], Worker[T]], config: Config, resources: Resources) -> Iterator[T]:
    """Make `units`, of any kind, on up to `cluster.actors` actors that Ray Data places, restarts and retries; yields finished ones.

    Raises the UserError of an actor, with its sentence, and a UserError where a unit has cost DEATHS actors their lives.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = [{"unit": number} for number in range(len(units))]
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Actor,  # type: ignore[arg-type]
        # A worker may carry the index of a large source.
        fn_constructor_args=(ray.put((make_worker, list(units), _Begun.remote())),),  # type: ignore[attr-defined]
        compute=ray.data.ActorPoolStrategy(
            min_size=1, max_size=config.cluster.actors, initial_size=min(config.cluster.actors, len(rows))
        ),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus or None,
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)  # it reports what `progress` says already
    before, results = set(threading.enumerate()), cast("Generator[dict[str, Any]]", iter(done.iter_rows()))
    try:
        with contextlib.closing(results):
            for row in results:
                if row["error"]:
                    raise UserError(row["error"])
                yield units[int(row["unit"])]
    finally:
        # Where a thread of Ray Data lets go of its last references after `ray.shutdown`, Ray ends the whole process without a word.
        deadline = time.monotonic() + _LEAVE_S
        for thread in set(threading.enumerate()) - before:
            thread.join(max(0.0, deadline - time.monotonic()))


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class _Begun:
    """How often each unit was begun. Ray Data would give a unit that ends every actor to another one for ever; and a limit to its
    retries counts those, too, that find a lost node before Ray knows that it is lost.
    """

    def __init__(self) -> None:
        self._times: Counter[int] = Counter()

    def begin(self, number: int) -> int:
        self._times[number] += 1
        return self._times[number]


class _Actor:
    """One actor of the pool: networks are loaded here once."""

    def __init__(self, job: Any) -> None:
        self._make_worker, self._units, self._begun = ray.get(job)

    @cached_property
    def _work(self) -> Worker[Any]:
        made: Worker[Any] = self._make_worker()
        return made

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["unit"])
        if ray.get(self._begun.begin.remote(number)) > DEATHS:
            sentence = (
                f"{self._units[number]} was begun {DEATHS} times, and each time its actor died: see Ray's worker logs (mostly "
                "too little memory: lower sampling.batch or evaluate.unit), then give the same command again"
            )
            return row | {"error": sentence}
        try:
            self._work(self._units[number])
        except UserError as error:  # as data: Ray would wrap it, log its traceback and drop its type
            return row | {"error": str(error)}
        except torch.OutOfMemoryError as error:
            found = str(error).split(". ")[0]
            return row | {"error": f"the GPU's memory is too small for a work unit ({found}); lower sampling.batch"}
        return row | {"error": ""}


def kind_of(device: torch.device) -> str:
    """What rounds alike: the model of the device, the torch that computes on it, and whether it shortens fp32 to TF32."""
    torch_version = f"torch {torch.__version__}"
    if device.type != "cuda":
        return f"CPU with {torch.backends.cpu.get_cpu_capability()}, {torch_version}"
    short = (
        torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32 or os.environ.get("NVIDIA_TF32_OVERRIDE") == "1"
    )
    return f"{torch.cuda.get_device_name(device)}, {torch_version}" + (", TF32" if short else "")


def on_one_kind(config: Config, run: Store, connect: Connect, work: Callable[[str, Connect], T]) -> T:
    """`work(kind, connect)` with the kind of device that this command's actors have: of this machine, or as one of them says.

    Where nodes differ, it is the kind of one of them: `check_kind` stops the others. On a cluster, work begins with the kind that
    the run was sampled on before, so that it asks nobody if all is there already. If it connects after all and finds another
    kind, it begins again with that.
    """
    gpus = config.cluster.gpus_per_worker
    if os.environ.get("RAY_ADDRESS", "local") in ("", "local"):
        return work(_kind(bool(gpus > 0 or (gpus < 0 and torch.cuda.is_available()))), connect)
    kind = run.get(KIND, 2**16).decode(errors="replace") if run.exists(KIND) else _kind_there(connect())

    @functools.cache
    def connected() -> Resources:
        resources = connect()
        if (here := _kind_there(resources)) != kind:
            raise _OtherKind(here)
        return resources

    try:
        done = work(kind, connected)
    except _OtherKind as other:
        kind = str(other)
        done = work(kind, connect)
    run.put(KIND, kind.encode())
    return done


class _OtherKind(Exception):
    """The cluster has devices of the kind that this names."""


def _kind_there(resources: Resources) -> str:
    task = ray.remote(_kind).options(num_cpus=resources.cpus, num_gpus=resources.gpus or None)
    return str(ray.get(task.remote(bool(resources.gpus))))


def check_kind(begun: str, here: str) -> None:
    """Raises ConfigError on another kind of device than the one that was begun with."""
    if begun and begun != here:
        raise ConfigError(
            f"this was begun on {begun} and an actor has {here}: images of both would stand in one row; give the command to a "
            "cluster, or a part of it, whose nodes have one kind of device"
        )


def _kind(gpu: bool) -> str:
    choose_kernels()
    return kind_of(torch.device("cuda" if gpu else "cpu"))


def code_version() -> str:
    """Version of the package and a hash of the code that decides a row: numbers name their code."""
    try:
        number = version("freeguide")
    except PackageNotFoundError:
        number = "source"
    return f"{number}+{closure.code_version(MAKING, MEASURING)}"
