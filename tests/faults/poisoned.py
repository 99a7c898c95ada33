"""`python poisoned.py CONFIG...` trains them one after the other; the loss of the samples at the positions POISON=3,17 is NaN."""

import os
import sys

import torch

from configs.errors import UserError
from configs.load import load_config
from trainer import loop
from trainer.diffusion.objective import Losses, training_loss
from trainer.engine import join_process_group

POISON = torch.tensor([int(position) for position in os.environ["POISON"].split(",")])


def poisoned(*args: object, **kwargs: object) -> Losses:
    losses = training_loss(*args, **kwargs)  # type: ignore[arg-type]
    bad = torch.isin(args[3], POISON)  # type: ignore[call-overload]
    return losses._replace(loss=losses.loss * torch.where(bad, float("nan"), 1.0))


if __name__ == "__main__":
    torch.set_num_threads(1)
    join_process_group()
    loop.training_loss = poisoned
    try:
        for path in sys.argv[1:]:
            loop.train(load_config(path))
    except UserError as error:
        sys.exit(f"freeguide: error: {error}")
