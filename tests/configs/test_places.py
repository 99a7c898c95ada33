"""Locations in a config: absolute where the command is typed, one place or one sentence."""

import os
from pathlib import Path
from typing import Annotated, get_args, get_origin

import pytest

from freeguide.configs.errors import ConfigError
from freeguide.configs.load import load_config
from freeguide.configs.places import locations
from freeguide.configs.schema import LOCATION, options
from freeguide.configs.stored import to_yaml
from freeguide.configs.sweep import sweep

MINIMAL = "name: a\nrun: runs/a\ndata: {uri: data/a}\n"
# Texts that name no place. A new option of text has to be a `Uri`, or stand here.
TEXTS = {"name", "sampling.ema", "evaluate.extractor_hash", "evaluate.dinov2_hash", "evaluate.dataset"} | {
    "data.shards",
    "data.label_key",
}


@pytest.fixture
def minimal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


def test_every_location_is_absolute_wherever_the_process_stands_later(
    minimal: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(
        minimal,
        [
            *("data.path=./images/../pictures/", "data.disk_cache=~/cache", "data.mixture={one: 1, 's3://bucket/two': 2}"),
            *("evaluate.extractor=own.safetensors", "evaluate.reference=file:///stats/a%20b.npz", "evaluate.dinov2=d.pth"),
            *("evaluate.dinov2_reference=r.npz", "evaluate.others=[rows.json, s3://bucket/rows.json]"),
            "evaluate.sweep={run: [runs/a, s3://bucket/b]}",
        ],
        "evaluate",
    )
    assert list(locations(config)) == [
        ("run", f"{tmp_path}/runs/a"),
        ("data.uri", f"{tmp_path}/data/a"),
        ("data.path", f"{tmp_path}/pictures"),
        ("data.mixture", f"{tmp_path}/one"),
        ("data.mixture", "s3://bucket/two"),
        ("data.disk_cache", f"{tmp_path}/home/cache"),
        ("evaluate.extractor", f"{tmp_path}/own.safetensors"),
        ("evaluate.reference", "/stats/a b.npz"),
        ("evaluate.dinov2", f"{tmp_path}/d.pth"),
        ("evaluate.dinov2_reference", f"{tmp_path}/r.npz"),
        ("evaluate.others", f"{tmp_path}/rows.json"),
        ("evaluate.others", "s3://bucket/rows.json"),
        ("evaluate.sweep", f"{tmp_path}/runs/a"),
        ("evaluate.sweep", "s3://bucket/b"),
    ]
    assert config.data.mixture == {f"{tmp_path}/one": 1, "s3://bucket/two": 2}
    assert [series.run for series in sweep(config)] == [f"{tmp_path}/runs/a", "s3://bucket/b"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "stored.yaml").write_text(to_yaml(config))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_config(tmp_path / "stored.yaml", [], "evaluate") == config


def test_a_location_that_is_not_given_stays_empty(minimal: Path) -> None:
    assert [key for key, _ in locations(load_config(minimal))] == ["run", "data.uri"]


def test_every_text_of_the_schema_is_a_location_or_known_to_be_none() -> None:
    def texts(kind: object) -> bool:
        if get_origin(kind) is Annotated:
            return LOCATION not in kind.__metadata__ and texts(get_args(kind)[0])  # type: ignore[attr-defined]
        return kind is str or any(texts(part) for part in get_args(kind))

    found = {key for key, kind in options().items() if texts(kind)}
    assert found - {"cluster.env", "cluster.shared_folders", "train.deepspeed", "evaluate.sweep"} == TEXTS


@pytest.mark.parametrize("key", ["run", "data.uri", "data.path", "data.disk_cache", "evaluate.extractor", "evaluate.others"])
@pytest.mark.parametrize(
    "uri",
    [
        *("s3://bucket//x", "s3:/bucket/x", "s3://[b/x", "s3://", "~nouser/x", "file://x", "http://host/x", "gs://bucket/x"),
        *("C:\\x", "a\nb", "a\0b", "s3://bucket/a/../b"),
    ],
)
def test_a_location_that_means_no_place_is_refused_before_anything_else(minimal: Path, key: str, uri: str) -> None:
    text = '"' + uri.replace("\\", "\\\\").replace("\n", "\\n").replace("\0", "\\0") + '"'
    value = f"[{text}]" if key == "evaluate.others" else text
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, [f"{key}={value}"])
    message = str(caught.value)
    assert message.startswith(f"{key}: ")
    assert message.isprintable()
    assert not message.endswith(".")
    assert os.listdir(minimal.parent) == ["minimal.yaml"]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("data.mixture={a: 1, ./a: 2}", "data.mixture=.*: names one place twice"),
        ("data.disk_cache=s3://bucket/cache", "data.disk_cache=s3://bucket/cache: the cache is a folder"),
        ("data.uri=''", "data.uri"),
        ("evaluate.others=['']", "evaluate.others: "),
        ("evaluate.sweep={run: ['s3:/b']}", "evaluate.sweep: s3:/b"),
    ],
)
def test_locations_that_contradict_their_use_are_refused(minimal: Path, override: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config(minimal, [override], "evaluate")
