"""A driver of `pool.run` in a process of its own: `python drive_pool.py STORE IMAGES WEIGHTS DEATHS REFUSALS SECONDS`.

Lists are in JSON; a unit takes SECONDS. Prints the finished units as JSON, or the sentence of a UserError with exit code 2.
"""

import functools
import json
import os
import sys
import time
from pathlib import Path

from freeguide.cluster.evaluation import units
from freeguide.cluster.evaluation.executor import Resources
from freeguide.cluster.evaluation.units import Unit
from freeguide.cluster.runtime.engines import executor
from freeguide.configs.errors import DataError, UserError
from freeguide.configs.load import load_config
from freeguide.data_pipeline.store.base import Store
from freeguide.data_pipeline.store.open import open_store

ROOT = Path(__file__).parents[2]


class Count:
    """Publishes its unit. Dies once, without a word, at each unit whose `first` is in `deaths`, or every time where its negative
    is; refuses those in `refusals`.
    """

    def __init__(self, store: Store, deaths: list[int], refusals: list[int], seconds: float, _: Resources) -> None:
        self.store, self.deaths, self.refusals, self.seconds = store, deaths, refusals, seconds

    def __call__(self, unit: Unit) -> None:
        time.sleep(self.seconds)
        if unit.first in self.deaths and not self.store.exists(f"died/{unit.first}"):
            self.store.put(f"died/{unit.first}", b"")
            os._exit(1)
        if unit.first and -unit.first in self.deaths:
            self.store.put(f"died/{unit.first}-{os.getpid()}", b"")
            os._exit(1)
        if unit.first in self.refusals:
            raise DataError(f"unit {unit.first} is refused; leave it out")
        self.store.put(f"made/{unit.w:g}-{unit.first}-{os.getpid()}", b"")
        self.store.put(unit.key("npz"), b"done")


def main() -> int:
    store, images = open_store(sys.argv[1]), int(sys.argv[2])
    weights, deaths, refusals = map(json.loads, sys.argv[3:6])
    make = functools.partial(Count, store, deaths, refusals, float(sys.argv[6]))
    config = load_config(ROOT / "configs" / "digits.yaml", ["cluster.actors=2"])
    try:
        with executor(config, 2) as engine:
            done = list(engine.run(units.split(weights, images, 10), make))
    except UserError as error:
        print(error)
        return 2
    print(json.dumps([[u.w, u.first, u.last] for u in sorted(done)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
