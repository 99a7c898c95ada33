"""One rank of a small training: `python ranks.py CONFIG...` trains the configs one after the other in one process group.

With KILL=N in the environment, rank 0 gets a SIGKILL as it begins step N of the last config.
"""

import os
import signal
import sys

import torch

from freeguide.configs.load import load_config
from freeguide.trainer.training import loop
from freeguide.trainer.training.engine import join_process_group

take_step = loop.take_step


def killed(run: loop.Run, step: int) -> None:
    if step + 1 == int(os.environ["KILL"]) and run.engine.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    take_step(run, step)


if __name__ == "__main__":
    torch.set_num_threads(1)
    join_process_group()
    for path in sys.argv[1:]:
        if "KILL" in os.environ and path == sys.argv[-1]:
            loop.take_step = killed
        loop.train(load_config(path))
