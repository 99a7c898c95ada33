"""A driver of `evaluate` in a process of its own: `python drive_evaluate.py TROUBLE key=value ...` (of configs/digits.yaml).

TROUBLE is what the first actor that gets the images from 20 on does once it has published the first w of them: `die`, without a
word; `hang`, until the driver is gone; or `none`. It happens once: the file `trouble` in the current folder says that it has.
"""

import os
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from freeguide.cluster.evaluation.series import Item, Worker
from freeguide.cluster.jobs import evaluate as evaluation
from freeguide.configs.load import load_config

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"


class Troubled(Worker):
    def __init__(self, trouble: str, marker: Path, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.trouble, self.marker = trouble, marker

    def __call__(self, item: Item) -> None:
        if self.trouble != "none" and item.first == 20 and not self.marker.exists():
            super().__call__(replace(item, weights=item.weights[:1]))
            self.marker.touch()
            if self.trouble == "die":
                os._exit(1)
            time.sleep(600)
        super().__call__(item)


if __name__ == "__main__":
    evaluation.Worker = partial(Troubled, sys.argv[1], Path.cwd() / "trouble")  # type: ignore[assignment, misc]
    evaluation.evaluate(load_config(DIGITS, sys.argv[2:], "evaluate"))
