"""The pool: work items on actors that Ray Data places, restarts and retries.

Killed actors and nodes cost the items in hand, which go to other actors. An item that ends every actor ends the job.
"""

import contextlib
import functools
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import ray
import torch

from freeguide.cluster.evaluation.executor import Executor, Resources, T, Worker, too_small
from freeguide.cluster.evaluation.units import kind_with
from freeguide.cluster.runtime.session import session
from freeguide.configs.errors import UserError
from freeguide.configs.schema import Config

DEATHS = 5  # actors that one item may cost
_LEAVE_S = 1.0  # longest wait for Ray Data's threads: some of them stay on purpose


@contextmanager
def pool(config: Config, actors: int) -> Iterator[Executor]:
    """Up to `actors` actors on the cluster of `session`."""
    with session(config, actors) as resources:

        def run_on_actors(items: Sequence[T], make: Callable[[Resources], Worker[T]], gpus: bool = True) -> Iterator[T]:
            return run(items, make, actors, resources if gpus else replace(resources, gpus=0.0))

        yield Executor(run_on_actors, functools.cache(lambda: _kind_there(resources)), alike=False, at_once=actors)


def run(items: Sequence[T], make: Callable[[Resources], Worker[T]], actors: int, resources: Resources) -> Iterator[T]:
    """Run `items` on up to `actors` actors with `resources` each; yields finished ones.

    Raises the UserError of an actor, with its sentence, and a UserError where an item has cost DEATHS actors their lives.
    """
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    rows = [{"item": number} for number in range(len(items))]
    job = functools.partial(make, resources), list(items), _Begun.remote()  # type: ignore[attr-defined]
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        _Actor,  # type: ignore[arg-type]
        fn_constructor_args=(ray.put(job),),  # a worker may carry the index of a large source
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=actors, initial_size=min(actors, len(rows))),
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
                yield items[int(row["item"])]
    finally:
        # Where a thread of Ray Data lets go of its last references after `ray.shutdown`, Ray ends the whole process without a word.
        deadline = time.monotonic() + _LEAVE_S
        for thread in set(threading.enumerate()) - before:
            thread.join(max(0.0, deadline - time.monotonic()))


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class _Begun:
    """How often each item was begun. Ray Data would give an item that ends every actor to another one for ever; and a limit to its
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
        self._make, self._items, self._begun = ray.get(job)

    @cached_property
    def _work(self) -> Worker[Any]:
        made: Worker[Any] = self._make()
        return made

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["item"])
        if ray.get(self._begun.begin.remote(number)) > DEATHS:
            sentence = (
                f"{self._items[number]} was begun {DEATHS} times, and each time its actor died: see Ray's worker logs (mostly "
                "too little memory: lower sampling.batch or evaluate.unit), then give the same command again"
            )
            return row | {"error": sentence}
        try:
            self._work(self._items[number])
        except UserError as error:  # as data: Ray would wrap it, log its traceback and drop its type
            return row | {"error": str(error)}
        except torch.OutOfMemoryError as error:
            return row | {"error": str(too_small(error))}
        return row | {"error": ""}


def _kind_there(resources: Resources) -> str:
    """The kind of device of one of the actors; where nodes differ, `check_kind` stops the others."""
    task = ray.remote(kind_with).options(num_cpus=resources.cpus, num_gpus=resources.gpus or None)
    return str(ray.get(task.remote(bool(resources.gpus))))
