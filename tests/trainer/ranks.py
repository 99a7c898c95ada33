"""One rank of a small training: `python ranks.py CONFIG...` trains the configs one after the other in one process group."""

import sys

import torch

from configs.load import load_config
from trainer.engine import join_process_group
from trainer.loop import train

if __name__ == "__main__":
    torch.set_num_threads(1)
    join_process_group()
    for path in sys.argv[1:]:
        train(load_config(path))
