"""Two of the same command at once: both end well with the same result, or one ends with one sentence.

The second runs while the first stands between two of its steps, where it does most harm.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch

from freeguide.cluster.evaluation import series as sweep
from freeguide.cluster.jobs import generate as generation
from freeguide.cluster.jobs.evaluate import evaluate
from freeguide.cluster.jobs.export import export
from freeguide.cluster.jobs.generate import generate
from freeguide.configs.errors import DataError
from freeguide.configs.schema import Config
from freeguide.data_pipeline.scan import scan_all
from freeguide.data_pipeline.shards import PackedShard, pack_shard
from freeguide.data_pipeline.store.folder import FolderStore
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stored import load_manifest
from tests.cluster.untrained import small, write_run

BRIEF = ["sampling.steps=2", "sampling.interval=[]", "evaluate.w=[0.5]", "evaluate.images=20", "evaluate.unit=10"]
BRIEF += ["generate.images=4", "generate.unit=2"]


@pytest.fixture(autouse=True)
def here(in_process: list[Any], words_only: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def config(lab: Path, tmp_path: Path) -> Config:
    config = small(lab, tmp_path / "run", *BRIEF)
    write_run(config)
    return config


def once(second: Callable[[], object]) -> Callable[[], None]:
    """`second`, in the first of all calls; it makes calls of its own."""
    calls = list[int]()

    def call() -> None:
        calls.append(1)
        if len(calls) == 1:
            second()

    return call


@pytest.mark.parametrize("alike", [True, False], ids=["alike", "rounded otherwise"])
def test_two_that_generate_one_set(alike: bool, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    made = dict[str, bytes]()

    def second() -> None:
        store = open_store(generate(config))
        made.update({info.key: store.get(info.key) for info in store.list()})

    meanwhile = once(second)

    def packed(samples: Any, first: int, dtype: str) -> PackedShard:
        mine = list(samples)
        before = len(made)
        meanwhile()
        if not alike and len(made) > before:
            mine[0].image[0, 0] ^= 1
        return pack_shard(mine, first, dtype)

    monkeypatch.setattr(generation, "pack_shard", packed)
    if alike:
        generate(config)
    else:
        with pytest.raises(DataError, match=r"000000000-000000002\.tar holds other images than these: another command makes them"):
            generate(config)
    place = next(Path(config.run).glob("generate/*"))
    store = open_store(str(place))
    assert made
    assert {info.key: store.get(info.key) for info in store.list()} == made
    assert len(scan_all(store, load_manifest(store))[1]) == 4


def test_two_that_evaluate_one_run_on_devices_that_round_otherwise_fold_the_same_units(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, to_npz = list[tuple[bytes, dict[str, bytes]]](), sweep.to_npz
    run = open_store(config.run)

    def units() -> dict[str, bytes]:
        return {info.key: run.get(info.key) for info in run.list("evaluate/") if "/units/" in info.key}

    meanwhile = once(lambda: made.append(((evaluate(config) / "report.json").read_bytes(), units())))

    def packed(arrays: dict[str, Any]) -> bytes:
        before = len(made)
        meanwhile()
        return to_npz(arrays | {"features": np.nextafter(arrays["features"], 9)} if len(made) > before else arrays)

    monkeypatch.setattr(sweep, "to_npz", packed)
    assert ((evaluate(config) / "report.json").read_bytes(), units()) == made[0]


def test_two_that_export_one_thing_both_end_well_and_of_two_things_one_is_refused(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, said = FolderStore.put, list[str]()

    def during(second: Callable[[], object]) -> Callable[..., str]:
        meanwhile = once(second)

        def interleaved(self: FolderStore, key: str, data: bytes) -> str:
            etag = put(self, key, data)
            if key.startswith("export/") and key.endswith(".safetensors"):
                meanwhile()  # the card of the first is not there yet
            return etag

        return interleaved

    def other() -> None:
        write_run(config, seed=1)  # another training has taken the run meanwhile
        with pytest.raises(DataError) as error:
            export(config)
        said.append(str(error.value))

    for second in (lambda: export(config), other):
        monkeypatch.setattr(FolderStore, "put", during(second))
        path = Path(export(config))
        assert hashlib.sha256(path.read_bytes()).hexdigest() in path.with_suffix(".md").read_text()
    assert said[0].startswith("Another export writes to ")
    monkeypatch.undo()
    newest = Path(export(config)).read_bytes()
    assert safetensors.torch.load(newest).keys()
    assert hashlib.sha256(newest).hexdigest() in path.with_suffix(".md").read_text()
    assert not list(Path(config.run).rglob("begun"))
