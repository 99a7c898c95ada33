"""This machine: its GPUs, and the engine that runs work items in this very process, without Ray."""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from threadpoolctl import threadpool_limits

from freeguide.cluster.evaluation.executor import Executor, Resources, T, Worker, too_small
from freeguide.cluster.evaluation.units import kind_here
from freeguide.cluster.runtime.folders import environment
from freeguide.configs.errors import ConfigError
from freeguide.configs.schema import Config


@contextmanager
def here(config: Config, workers: int) -> Iterator[Executor]:
    """One worker in this process, whatever `workers` an engine with more room would start: results are the same to the bit.

    It has the threads and the environment that an actor would have.
    """

    @functools.cache
    def resources() -> Resources:
        return Resources(config.cluster.cpus_per_worker, gpus_here(config.cluster.gpus_per_worker, 1, together=False))

    def run(items: Sequence[T], make: Callable[[Resources], Worker[T]], gpus: bool = True) -> Iterator[T]:
        mine = resources() if gpus else replace(resources(), gpus=0.0)
        with as_worker(config, mine):
            work = make(mine)
        for item in items:
            with as_worker(config, mine):
                work(item)
            yield item

    yield Executor(run, functools.partial(kind_here, config.cluster))


@contextmanager
def as_worker(config: Config, resources: Resources) -> Iterator[None]:
    """The threads and the environment of a worker, until the end of the block. With other threads, BLAS gives other bits."""
    before = torch.get_num_threads()
    with environment(config.cluster.env), threadpool_limits(resources.threads):
        torch.set_num_threads(resources.threads)
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise too_small(error) from error
        finally:
            torch.set_num_threads(before)


def gpus_here(gpus: float, processes: int, together: bool) -> float:
    """GPUs for each process of a private cluster on this machine; `gpus` is the config's number, -1 for one where there are any."""
    count, least = torch.cuda.device_count(), processes if together else 1
    if gpus < 0:
        if 0 < count < least:
            print(f"this machine has {count} GPU for {least} workers, so none is used; set cluster.workers={count}", flush=True)
        return 1.0 if count >= least else 0.0
    if least * gpus > count:
        raise ConfigError(
            f"cluster.gpus_per_worker={gpus:g} for {least} processes needs {least * gpus:g} GPUs and this machine has {count}; "
            "set it to 0, or name a cluster as RAY_ADDRESS"
        )
    return gpus
