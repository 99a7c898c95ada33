"""A training on raw latents, and that the memory of a worker changes nothing of what it learns."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from freeguide.configs.errors import CheckpointError
from freeguide.configs.load import load_config
from freeguide.data_pipeline.manifest import Schema
from freeguide.data_pipeline.shards import Sample, Source, write_shards
from freeguide.data_pipeline.store.open import open_store
from freeguide.trainer.checkpoints import search
from freeguide.trainer.checkpoints.values import load
from freeguide.trainer.training.loop import preflight


@pytest.fixture(scope="module")
def latents_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """400 float16 latents of 4 x 4 x 4, each class around a mean of its own, with the spread of an autoencoder's: about 5."""
    values = np.random.default_rng(0).normal(0, 5, (400, 4, 4, 4)).astype(np.float16)
    means = np.random.default_rng(1).normal(0, 5, (10, 4, 4, 4)).astype(np.float16)
    source = Source(Schema(4, 4, 10, dtype="float16"), 400, lambda i: Sample(values[i] + means[i % 10], i % 10), "latents")
    uri = str(tmp_path_factory.mktemp("latents"))
    write_shards(source, open_store(uri), shard_samples=100)
    return uri


def test_a_run_on_latents_trains_resumes_with_another_cache(
    latents_uri: str, tiny: Callable[..., Path], launch: Callable[..., object]
) -> None:
    data = {"uri": latents_uri, "image_size": 4, "channels": 4, "dtype": "float16", "flip": False, "latent_scale": 0.18215}
    options = {"zero_stage": 2, "precision": "fp32", "checkpoint_every": 3}
    model = {"network": "dit", "channels": 32, "depth": 2, "heads": 2}

    def config(name: str, run: str | None = None, cache_mib: int = 512, steps: int = 6) -> Path:
        groups = {
            "data": data | {"cache_mib": cache_mib},
            "train": options | {"steps": steps},
            "sampling": {"steps": 2, "clip": False},
        }
        return tiny(name, run=run, model=model, **groups)

    straight, begun = config("latents"), config("latents-begun", steps=3)
    run = load_config(begun).run
    resumed = config("latents-resumed", run=run, cache_mib=1)
    launch(1, straight, begun, resumed)
    ends = [open_store(load_config(path).run) for path in (straight, resumed)]
    for kind in ("master", "ema"):
        first, second = (load(store, search.find(store, 6), kind) for store in ends)
        assert all(torch.equal(first[name], second[name]) for name in first)
    early = load(ends[1], search.find(ends[1], 3), "master")
    moved = [name for name in first if not torch.equal(early[name], first[name])]
    assert len(moved) == len(first)
    assert all(torch.isfinite(values).all() for values in first.values())

    settings = load_config(resumed)
    with pytest.raises(CheckpointError, match=r"started with data\.latent_scale=0\.18215, now it is 1\.0"):
        preflight(replace(settings, data=replace(settings.data, latent_scale=1.0)))
