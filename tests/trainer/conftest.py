import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from freeguide.configs.load import load_config
from freeguide.configs.schema import Config
from freeguide.data_pipeline.shards import write_shards
from freeguide.data_pipeline.sources.digits import digits
from freeguide.data_pipeline.store.open import open_store

ROOT = Path(__file__).parents[2]
Launch = Callable[..., list["subprocess.CompletedProcess[str]"]]


@pytest.fixture(scope="session")
def digits_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """scikit-learn's digits as shards in a folder."""
    uri = str(tmp_path_factory.mktemp("digits"))
    write_shards(digits(), open_store(uri), shard_samples=600)
    return uri


@pytest.fixture(scope="session")
def tiny(digits_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """tiny(name, run=..., train={...}) -> the file of a config that trains a very small network on digits."""
    folder = tmp_path_factory.mktemp("configs")

    def make(name: str, run: str | None = None, **groups: dict[str, object]) -> Path:
        config: dict[str, object] = {"name": name, "run": run or str(tmp_path_factory.mktemp("runs") / name)}
        defaults: dict[str, dict[str, object]] = {
            "data": {"uri": digits_uri, "image_size": 8, "channels": 1, "classes": 10},
            "model": {
                "channels": 16,
                "channel_mult": [1, 2],
                "res_blocks": 1,
                "attention": [4],
                "head_channels": 16,
                "dropout": 0.1,
            },
            "train": {
                "steps": 6,
                "global_batch": 12,
                "lr": 1e-3,
                "warmup_steps": 4,
                "ema_decay": 0.9,
                "ema_half_lives": [24],
                "ema_sigma_rel": [0.1],
                "log_every": 2,
                "checkpoint_every": 3,
            },
            "sampling": {"steps": 2},
        }
        config |= {group: defaults.get(group, {}) | groups.get(group, {}) for group in defaults.keys() | groups.keys()}
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(config))
        return path

    return make


def read(path: Path) -> Config:
    return load_config(path)


@pytest.fixture(scope="session")
def launch() -> Launch:
    """launch(world_size, *config files) trains them on that many processes and waits; a failure fails the test.

    Keywords are environment variables, as KILL for `ranks.py`; with check=False a failure is returned.
    """

    def run(world_size: int, *configs: Path, check: bool = True, **variables: str) -> list["subprocess.CompletedProcess[str]"]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **variables,
        }
        command = [sys.executable, str(Path(__file__).parent / "ranks.py"), *map(str, configs)]
        ranks = [
            subprocess.Popen(
                command,
                env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)},
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for r in range(world_size)
        ]
        ended = []
        for rank in ranks:
            output, _ = rank.communicate(timeout=280)
            ended.append(subprocess.CompletedProcess(command, rank.returncode, output))
        if check:
            for rank, process in enumerate(ended):
                assert process.returncode == 0, f"rank {rank}:\n{process.stdout[-4000:]}"
        return ended

    return run
