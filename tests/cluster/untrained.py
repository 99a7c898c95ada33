"""What an evaluation needs, without training: digits, an evaluator of one epoch, checkpoints of a small network's first weights."""

import dataclasses
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from freeguide.cluster.evaluation import reference
from freeguide.cluster.evaluation.executor import Executor
from freeguide.cluster.evaluation.extractors import evaluator
from freeguide.cluster.runtime.here import here
from freeguide.configs.load import load_config
from freeguide.configs.schema import Config
from freeguide.configs.stored import to_yaml
from freeguide.data_pipeline.scan import scan_all
from freeguide.data_pipeline.shards import write_shards
from freeguide.data_pipeline.sources.digits import digits
from freeguide.data_pipeline.store.base import Store
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stored import load_manifest
from freeguide.trainer.checkpoints.manifest import FORMAT, folder_of
from freeguide.trainer.checkpoints.values import EMA
from freeguide.trainer.networks.build import build_network

DIGITS = Path(__file__).parents[2] / "configs" / "digits.yaml"
HALF_LIFE = "half_life_50"  # a second average that the checkpoints hold
THREADS = torch.get_num_threads()  # they decide bits, and other tests may leave others
LOCAL = ["cluster.engine=local", f"cluster.cpus_per_worker={THREADS}"]
SMALL = [
    *("model.channels=8", "model.head_channels=8", "model.channel_mult=[1]", "model.attention=[]"),
    *("sampling.steps=6", "sampling.interval=[-2,3]"),
    *("evaluate.images=60", "evaluate.unit=20", "evaluate.w=[0,0.5,4]", "evaluate.grid=2", "cluster.actors=1"),
]


def write_lab(folder: Path) -> None:
    """The data and what they are measured with, so that no test waits for a yardstick."""
    store = open_store(str(folder / "data"))
    write_shards(digits(), store, shard_samples=600)
    manifest = load_manifest(store)
    judge = evaluator.fit_evaluator(*scan_all(store, manifest), 10, 1, name="digits")
    (folder / "evaluator.safetensors").write_bytes(judge.to_bytes())
    real = reference.from_manifest(store, manifest, judge, "digits")
    # Without features of real images there is no precision, recall or KID, which take longest.
    (folder / "reference.npz").write_bytes(dataclasses.replace(real, features=None).to_bytes(judge))


def options(lab: Path, run: Path | str) -> list[str]:
    """Overrides of `configs/digits.yaml` for a run in that lab, with a very small network."""
    measured = [f"evaluate.extractor={lab}/evaluator.safetensors", f"evaluate.reference={lab}/reference.npz"]
    return [f"run={run}", f"data.uri={lab}/data", *measured, *SMALL]


def small(lab: Path, run: Path | str, *overrides: str) -> Config:
    """A config of that lab for jobs that run in this process."""
    return load_config(DIGITS, [*options(lab, run), *LOCAL, *overrides], "evaluate")


def through(wrap: Callable[[Iterator[Any]], Iterator[Any]]) -> Callable[[Config, int], AbstractContextManager[Executor]]:
    """The local engine, whose finished items go through `wrap`: for `engines.ENGINES`."""

    @contextmanager
    def engine(config: Config, workers: int) -> Iterator[Executor]:
        with here(config, workers) as own:
            yield dataclasses.replace(own, run=lambda items, make, gpus=True: wrap(own.run(items, make, gpus)))

    return engine


def write_run(config: Config, seed: int = 0, step: int = 8) -> Store:
    """A whole checkpoint of `step` in `config.run`, as training leaves it, with weights drawn by `seed`; its averages differ."""
    store, data = open_store(config.run), config.data
    network = build_network(config.model, image_size=data.image_size, channels=data.channels, classes=data.classes, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    content, pieces = b"", []
    for name, weight in network.named_parameters():
        # The last layer begins at zero, where every w gives the same images.
        noise = 0.1 * torch.randn(weight.shape, generator=generator)
        for kind, scale in ((EMA, 1.0), (HALF_LIFE, 0.8), ("master", 1.2)):
            values = (weight.detach() + scale * noise).numpy().tobytes()
            pieces.append([kind, name, 0, weight.numel(), len(content), zlib.crc32(values)])
            content += values
    key = f"{folder_of(step)}/rank-00000.safetensors"
    manifest = {
        "format": FORMAT,
        "step": step,
        "adam_steps": step,
        "world_size": 1,
        "zero_stage": 1,
        "identity": {"data.fingerprint": load_manifest(open_store(data.uri)).fingerprint},
        "shapes": {name: tuple(weight.shape) for name, weight in network.named_parameters()},
        "files": [{"key": key, "bytes": len(content), "pieces": pieces}],
    }
    store.put(key, content)
    store.put("config.yaml", to_yaml(config).encode())
    store.put(f"{folder_of(step)}/manifest.json", json.dumps(manifest).encode())
    return store
