"""`python poisoned.py CONFIG...` trains them one after the other; POISON says by what the losses of some samples are multiplied.

POISON is JSON: {config file: {position in the run: factor}}. RATE says by what the learning rate of a file is multiplied, beyond
what a config may say. STOP has the same form with a list of positions: the rank that meets
one asks to end, and the same file once more goes on from there. A run that ends does not keep the next from beginning.
"""

import json
import os
import sys

import torch

from freeguide.configs.errors import UserError
from freeguide.configs.load import load_config
from freeguide.trainer.diffusion import objective
from freeguide.trainer.diffusion.objective import Losses, training_loss
from freeguide.trainer.training import engine, loop
from freeguide.trainer.training.engine import join_process_group
from freeguide.trainer.training.failures import Terminated
from freeguide.trainer.training.loop import learning_rate

factors: dict[int, float] = {}
stops: list[int] = []
terminated = Terminated()


def poisoned(*args: object, **kwargs: object) -> Losses:
    losses = training_loss(*args, **kwargs)  # type: ignore[arg-type]
    if any(position in stops for position in args[3].tolist()):  # type: ignore[attr-defined]
        terminated.ask()
    factor = torch.tensor([factors.get(position, 1.0) for position in args[3].tolist()])  # type: ignore[attr-defined]
    return losses._replace(loss=losses.loss * factor)


if __name__ == "__main__":
    torch.set_num_threads(1)
    join_process_group()
    objective.training_loss = poisoned
    engine._check_device = lambda *_: None  # fp16 is refused on a CPU, where it is slow; it repeats
    code = 0
    for path in sys.argv[1:]:
        factors = {int(position): factor for position, factor in json.loads(os.environ["POISON"])[path].items()}
        rate = json.loads(os.environ.get("RATE", "{}")).get(path, 1.0)
        loop.learning_rate = lambda train, step, rate=rate: rate * learning_rate(train, step)  # type: ignore[misc]
        stops, terminated = json.loads(os.environ.get("STOP", "{}")).get(path, []), Terminated()
        try:
            loop.train(load_config(path), terminated)
        except SystemExit:
            print("asked to end")
        except UserError as error:
            print(f"freeguide: error: {error}")
            code = 1
    sys.exit(code)
