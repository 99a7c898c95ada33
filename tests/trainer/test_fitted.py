"""The number of classes follows the data; a config that states another one is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from freeguide.cluster.evaluation.series import as_trained
from freeguide.cluster.jobs.prepare import index, prepare
from freeguide.configs.errors import ConfigError, DataError
from freeguide.configs.load import load_config
from freeguide.configs.schema import Config
from freeguide.data_pipeline.order import choose_order
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stored import load_manifest
from freeguide.trainer.diffusion.objective import OBJECTIVES
from freeguide.trainer.training.loop import assemble, fitted, preflight, run_identity
from tests.cluster.untrained import write_run

Tiny = Callable[..., Path]


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    """Overrides for a folder of 3 classes."""
    for label, name in enumerate(("ant", "bee", "cat")):
        for item in range(4):
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            pixels = np.full((8, 8, 3), 40 * label + item, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{item}.png")
    places = [f"run={tmp_path}/run", f"data.uri={tmp_path}/data", f"data.path={tmp_path}/images", "data.image_size=8"]
    return [
        *places,
        "train.global_batch=4",
        "model.channels=16",
        "model.channel_mult=[1]",
        "model.attention=[]",
        "model.head_channels=16",
    ]


def test_the_classes_are_those_of_the_folder(pictures: list[str]) -> None:
    config = load_config("image_folder", pictures, "prepare")
    assert config.data.classes == 0
    manifest = prepare(config)
    assert (manifest.schema.classes, manifest.schema.class_names) == (3, ("ant", "bee", "cat"))
    assert fitted(config, manifest).data.classes == 3
    assert preflight(config) == 0
    # A config that states the number is the same run, as all were that older versions began.
    stated = load_config("image_folder", [*pictures, "data.classes=3"])
    order = choose_order(manifest, 4, 0)
    assert run_identity(fitted(config, manifest), manifest, order) == run_identity(fitted(stated, manifest), manifest, order)
    for command in (prepare, preflight):
        with pytest.raises((ConfigError, DataError), match=r"data.classes(=| is )10.*3"):
            command(load_config("image_folder", [*pictures, "data.classes=10"], "prepare"))


def test_the_objective_refuses_options_before_anything_is_read_and_names_those_of_a_run(
    pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config("image_folder", pictures, "prepare")
    manifest = prepare(config)
    order = choose_order(manifest, 4, 0)
    plain = run_identity(config, manifest, order)
    assert {key for key in plain if key.startswith("diffusion.")} == {f"diffusion.{name}" for name in vars(config.diffusion)}

    def refuse(config: Config) -> None:
        raise ConfigError(f"train.lr={config.train.lr} is too brave; halve it")

    brave = replace(OBJECTIVES["joint"], identity=lambda config: {"train.lr": config.train.lr}, check=refuse)
    monkeypatch.setitem(OBJECTIVES, "joint", brave)
    for begin in (preflight, assemble):
        with pytest.raises(ConfigError, match=r"is too brave; halve it$"):
            begin(replace(config, data=replace(config.data, uri="/nowhere")))
    named = run_identity(config, manifest, order)
    assert named["train.lr"] == config.train.lr
    assert not [key for key in named if key.startswith("diffusion.")]


def test_a_run_is_sampled_with_the_classes_that_it_was_trained_on(pictures: list[str]) -> None:
    manifest = prepare(load_config("image_folder", pictures, "prepare"))
    write_run(fitted(load_config("image_folder", pictures), manifest))
    assert as_trained(load_config("image_folder", pictures, "generate"), "generate").config.data.classes == 3
    with pytest.raises(ConfigError, match=r"was trained with data\.classes=3, now it is 10; set data\.classes=3"):
        as_trained(load_config("image_folder", [*pictures, "data.classes=10"], "generate"), "generate")


def test_tars_have_as_many_classes_as_they_are_said_to_have(pictures: list[str]) -> None:
    config = load_config("image_folder", pictures, "prepare")
    made = prepare(config)
    assert index(config).schema == made.schema
    open_store(config.data.uri).delete("manifest.json")
    assert index(config).schema.classes == made.schema.classes  # counted
    open_store(config.data.uri).delete("manifest.json")
    stated = replace(config, data=replace(config.data, classes=5))
    assert index(stated).schema.classes == load_manifest(open_store(config.data.uri)).schema.classes == 5
