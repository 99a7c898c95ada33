"""Engines: where the work items of a job run. `cluster.engine` names one."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

from freeguide.cluster.evaluation.executor import Executor, Resources, T, Worker
from freeguide.cluster.evaluation.units import kind_here
from freeguide.cluster.runtime.here import here
from freeguide.configs.schema import Config


@contextmanager
def on_ray(config: Config, workers: int) -> Iterator[Executor]:
    """The pool of `workers` actors, once there is an item to run: a job that finds everything done does not wait for Ray."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def connected() -> Executor:
            from freeguide.cluster.runtime.pool import pool

            return stack.enter_context(pool(config, workers))

        def run(items: Sequence[T], make: Callable[[Resources], Worker[T]], gpus: bool = True) -> Iterator[T]:
            return connected().run(items, make, gpus)

        if os.environ.get("RAY_ADDRESS", "local") in ("", "local"):
            yield Executor(run, functools.partial(kind_here, config.cluster), alike=True, at_once=workers)
        else:
            yield Executor(run, lambda: connected().kind(), alike=False, at_once=workers)


# What `cluster.engine` may be: from a config and how many workers its job asks for to what runs the job's items.
ENGINES: dict[str, Callable[[Config, int], AbstractContextManager[Executor]]] = {"ray": on_ray, "local": here}


def executor(config: Config, workers: int) -> AbstractContextManager[Executor]:
    """What runs the work items of a job on up to `workers` workers, until the end of the block.

    Its `run` raises ConfigError if this machine or the cluster has too few resources, or if the cluster does not answer.
    """
    return ENGINES[config.cluster.engine](config, workers)
