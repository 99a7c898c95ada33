"""A training to disturb, and what one can see of it."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from freeguide.configs.load import load_config
from freeguide.data_pipeline.shards import write_shards
from freeguide.data_pipeline.sources.digits import digits
from freeguide.data_pipeline.store.open import open_store
from freeguide.trainer.checkpoints import search

ROOT = Path(__file__).parents[2]
STEPS, EVERY, BATCH = 120, 20, 12
PATIENCE = 600.0  # seconds after which a drill is given up; a machine may be slow
Ranks = list["subprocess.Popen[bytes]"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """config(name, **train options) -> the file of a config that trains a very small network on digits."""
    data = str(tmp_path_factory.mktemp("digits"))
    write_shards(digits(), open_store(data), shard_samples=600)

    def make(name: str, **train: object) -> Path:
        folder = tmp_path_factory.mktemp(name)
        options = {"steps": STEPS, "global_batch": BATCH, "lr": 1e-3, "zero_stage": 2, "checkpoint_every": EVERY, "log_every": 5}
        content = {
            "name": name,
            "run": str(folder / "run"),
            "data": {"uri": data, "image_size": 8, "channels": 1, "classes": 10},
            "model": {"channels": 16, "channel_mult": [1, 2], "res_blocks": 1, "attention": [4], "head_channels": 16},
            "train": options | train,
            "sampling": {"steps": 2},
            "cluster": {"workers": 2},
        }
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return make


@pytest.fixture
def start() -> Iterator[Callable[..., Ranks]]:
    """start(config, world_size, script=...) starts `python -m trainer` on each rank; whatever is left is killed in the end."""
    started: Ranks = []

    def run(path: Path, world_size: int = 2, script: tuple[str, ...] = ("-m", "trainer"), **environment: str) -> Ranks:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
        shared |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
        ranks = []
        for rank in range(world_size):
            with open(path.parent / f"rank{rank}.log", "ab") as log:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, *script, str(path)],
                        env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=log,
                        stderr=log,
                        cwd=ROOT,
                    )
                )
        started.extend(ranks)
        return ranks

    yield run
    for process in started:
        process.kill()
        process.wait()


def ended(ranks: Ranks) -> list[int]:
    return [rank.wait(timeout=PATIENCE) for rank in ranks]


def output(path: Path, rank: int = 0) -> str:
    return (path.parent / f"rank{rank}.log").read_text()


def saved(path: Path) -> list[int]:
    return search.describe(open_store(load_config(path).run))["checkpoints"]  # type: ignore[no-any-return]


def wait_for(condition: Callable[[], object], ranks: Ranks = ()) -> float:  # type: ignore[assignment]
    """Seconds until `condition` holds; a rank that ends before it fails the drill."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < PATIENCE, "it never happened"
        assert all(rank.poll() is None for rank in ranks), "a rank ended by itself"
        time.sleep(0.01)
    return time.monotonic() - began
