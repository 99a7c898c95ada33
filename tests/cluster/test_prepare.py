"""The prepare job on a Ray cluster: the same bytes from any number of actors, also where actors and drivers die."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from freeguide.cluster.evaluation.extractors.load import load_extractor
from freeguide.cluster.jobs.prepare import FEW, index, prepare
from freeguide.configs.errors import DataError
from freeguide.configs.load import load_config
from freeguide.configs.schema import Config, DataConfig
from freeguide.data_pipeline.decode import fit
from freeguide.data_pipeline.scan import scan_all
from freeguide.data_pipeline.shards import Sample, Source, write_shards
from freeguide.data_pipeline.sources.labels import read_class_names
from freeguide.data_pipeline.sources.open import SOURCES, Kind, open_source
from freeguide.data_pipeline.store.base import Access, Store
from freeguide.data_pipeline.store.open import access_to, create_bucket, open_store
from freeguide.data_pipeline.store.s3 import S3Store
from freeguide.data_pipeline.stored import load_manifest
from tests.data_pipeline.conftest import image_folder, write_noise

ROOT = Path(__file__).parents[2]
IMAGES = 96
SHARDS = 24


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 images of 20 x 16 in 4 class folders."""
    path, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for item in range(IMAGES):
        (path / f"class{item % 4}").mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 16, 3), dtype=np.uint8)).save(path / f"class{item % 4}" / f"{item:03d}.png")
    return path


@pytest.fixture
def config(images: Path) -> Callable[..., Config]:
    def make(uri: str, *more: str) -> Config:
        return load_config(ROOT / "configs" / "image_folder.yaml", options(images, uri, *more), "prepare")

    return make


def options(images: Path, uri: str, *more: str) -> list[str]:
    own = [
        f"data.path={images}",
        f"data.uri={uri}",
        "data.classes=4",
        "data.image_size=8",
        f"data.shard_samples={IMAGES // SHARDS}",
    ]
    return [*own, *more]


def content(store: Store) -> dict[str, bytes]:
    return {info.key: store.get(info.key) for info in store.list()}


@pytest.fixture(scope="module")
def expected(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What one process writes, without Ray."""
    store = open_store(str(tmp_path_factory.mktemp("expected")))
    write_shards(image_folder(images, 8, 3, 4), store, shard_samples=IMAGES // SHARDS)
    return content(store)


@pytest.fixture
def on_cluster(ray_head: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_head[0])


def test_few_shards_are_written_without_a_cluster(
    config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # nobody answers there
    manifest = prepare(config(str(tmp_path), f"data.shard_samples={IMAGES // FEW}"))
    assert (len(manifest.shards), manifest.samples) == (FEW, IMAGES)


@pytest.mark.parametrize("actors", [1, 2])
def test_any_number_of_actors_writes_the_same_bytes(
    actors: int, on_cluster: None, config: Callable[..., Config], tmp_path: Path, expected: dict[str, bytes]
) -> None:
    manifest = prepare(config(str(tmp_path), f"cluster.actors={actors}"))
    assert len(manifest.shards) == SHARDS
    assert content(open_store(str(tmp_path))) == expected


def test_an_actor_that_dies_costs_its_shard_in_hand_only(
    on_cluster: None, config: Callable[..., Config], tmp_path: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is the first to read image 50 dies at it, without a word."""
    original = SOURCES["folder"].open

    def deadly(data: DataConfig) -> Source:
        source = original(data)

        def read(item: int) -> Sample:
            if item == 50:
                try:
                    (tmp_path / "died").mkdir()
                except FileExistsError:
                    pass
                else:
                    os._exit(1)
            return source.read(item)

        return Source(source.schema, source.items, read, source.identity)

    monkeypatch.setitem(SOURCES, "folder", Kind(deadly))
    prepare(config(str(tmp_path / "data"), "cluster.actors=2"))
    assert (tmp_path / "died").exists()
    assert content(open_store(str(tmp_path / "data"))) == expected


def test_a_driver_killed_in_the_middle_goes_on_when_run_again(
    ray_head: tuple[str, str], images: Path, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    uri = str(tmp_path / "data")
    hangs = [sys.executable, str(Path(__file__).with_name("drive_prepare.py")), *options(images, uri)]
    command = [sys.executable, "-m", "cluster", "prepare", str(ROOT / "configs" / "image_folder.yaml"), *options(images, uri)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": ray_head[0], "OMP_NUM_THREADS": "1"}
    store = open_store(uri)

    def finished() -> set[str]:
        return {info.key for info in store.list("parts/") if info.key.endswith(".npz")}

    with subprocess.Popen(hangs, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as first:
        deadline = time.monotonic() + 120
        while not finished() and time.monotonic() < deadline:
            time.sleep(0.1)
        first.send_signal(signal.SIGKILL)
    assert 0 < len(finished()) < SHARDS
    assert not store.exists("manifest.json")
    again = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"shard {SHARDS}/{SHARDS}" in again.stdout
    assert content(store) == expected


def test_unreadable_images_stop_the_job_with_one_sentence(
    on_cluster: None, config: Callable[..., Config], images: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "images"
    for item in range(IMAGES):
        (bad / "a").mkdir(parents=True, exist_ok=True)
        (bad / "a" / f"{item}.png").write_bytes(b"no image" if item < 3 else (images / "class0" / "000.png").read_bytes())
    arguments = [f"data.path={bad}", "data.classes=1"]
    with pytest.raises(DataError, match=r"images cannot be read, the first is .*/a/\d\.png: its image is neither"):
        prepare(config(str(tmp_path / "data"), *arguments))
    manifest = prepare(config(str(tmp_path / "data"), *arguments, "data.bad_images=0.04"))
    assert manifest.samples == IMAGES - 3


def test_foreign_tars_become_shards_of_ours(config: Callable[..., Config], images: Path, tmp_path: Path) -> None:
    """index, then prepare with source=webdataset: every image once, in another order."""
    ours = open_store(str(tmp_path / "first"))
    write_shards(image_folder(images, 16, 3, 4), ours, shard_samples=30)
    ours.delete("manifest.json")
    index(config(str(tmp_path / "first"), "data.image_size=16"))
    prepare(config(str(tmp_path / "second"), "data.source=webdataset", f"data.path={tmp_path / 'first'}", "data.shard_samples=20"))
    store = open_store(str(tmp_path / "second"))
    found, labels = scan_all(store, load_manifest(store))
    assert found.shape == (IMAGES, 8, 8, 3)
    assert np.bincount(labels).tolist() == [IMAGES // 4] * 4
    before, _ = scan_all(ours, load_manifest(ours))
    assert sorted(image.tobytes() for image in found) == sorted(fit(image, 8).tobytes() for image in before)
    assert [image.tobytes() for image in found] != [fit(image, 8).tobytes() for image in before]


def test_index_joins_data_sets_into_a_mixture(config: Callable[..., Config], tmp_path: Path) -> None:
    for name, shard in (("a", 48), ("b", 12)):
        prepare(config(str(tmp_path / name), f"data.shard_samples={shard}"))
    weights = f"data.mixture={{{tmp_path / 'a'}: 3, {tmp_path / 'b'}: 1}}"
    mixture = index(config(str(tmp_path / "mixed"), weights))
    assert [(part.uri, part.weight, part.samples) for part in mixture.parts] == [
        (str(tmp_path / "a"), 3, IMAGES),
        (str(tmp_path / "b"), 1, IMAGES),
    ]
    assert load_manifest(open_store(str(tmp_path / "mixed"))).fingerprint == mixture.fingerprint


def test_whatever_is_read_in_the_bucket_of_the_data_is_asked_for_as_the_data_are(
    s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bucket in ("s3://theirs", "s3://mine"):
        create_bucket(bucket)
    place = tmp_path.name
    theirs, mine = f"s3://theirs/{place}", f"s3://mine/{place}"
    write_noise(open_store(theirs), 60, shard_samples=20)
    for bucket in (theirs, mine):
        open_store(bucket).put("names.txt", "\n".join(map(str, range(10))).encode())
    public = open_store("s3://theirs")
    assert isinstance(public, S3Store)
    for info in public.list():
        public._client().put_object_acl(Bucket="theirs", Key=info.key, ACL="public-read")
    public._client().put_bucket_acl(Bucket="theirs", ACL="public-read")
    asked: list[tuple[str, Access]] = []
    client = S3Store._client

    def seen(self: S3Store) -> object:
        asked.append((self.bucket, self.access))
        return client(self)

    monkeypatch.setattr(S3Store, "_client", seen)
    paid = Access(request_payer=True, unsigned=True)

    def accesses(bucket: str) -> set[Access]:
        return {access for where, access in asked if where == bucket}

    options: dict[str, Any] = {"request_payer": True, "unsigned": True, "image_size": 8, "channels": 3, "classes": 10}
    data = DataConfig(uri=f"{mine}/data", path=theirs, source="webdataset", **options)
    source = open_source(data)
    source.read(0)
    assert accesses("theirs") == {paid}
    prepare(Config(name="x", data=data, run=""))
    assert accesses("theirs") == {paid}
    assert accesses("mine") == {Access(request_payer=True)}
    asked.clear()
    for where in (theirs, mine):
        assert len(read_class_names(DataConfig(uri=theirs, class_names=f"{where}/names.txt", **options))) == 10
    assert (accesses("theirs"), accesses("mine")) == ({paid}, {Access()})
    asked.clear()
    mine_too = DataConfig(uri=theirs, **options)
    with pytest.raises(DataError, match="does not exist; fit an evaluator"):
        load_extractor(f"{theirs}/shards/000000.safetensors", access=access_to(mine_too, theirs))
    assert accesses("theirs") == {paid}
    assert access_to(mine_too, str(tmp_path)) == access_to(DataConfig(uri=str(tmp_path), **options), mine) == Access()
