"""A generated set: every image by its number, nothing made twice, nothing held whole, and good to train on."""

import json
import os
import resource
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import botocore.exceptions
import numpy as np
import pytest
import torch
import webdataset
import yaml

from freeguide.cluster.evaluation.executor import Resources
from freeguide.cluster.evaluation.series import Series
from freeguide.cluster.evaluation.units import Unit
from freeguide.cluster.jobs import generate as generation
from freeguide.cluster.jobs.generate import NPZ, _check_disk, _Generate, generate, write_npz
from freeguide.cluster.runtime.engines import ENGINES
from freeguide.configs.errors import CheckpointError, ConfigError, StoreError
from freeguide.configs.load import load_config
from freeguide.configs.schema import Config, DataConfig
from freeguide.configs.stored import to_yaml
from freeguide.data_pipeline.manifest import Schema, ShardIndex, build_manifest
from freeguide.data_pipeline.scan import scan_all
from freeguide.data_pipeline.shards import Sample, Source, pack_shard, write_shards
from freeguide.data_pipeline.store.base import Retry, Store
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.store.s3 import S3Store
from freeguide.data_pipeline.stored import NAME, load_manifest, save_manifest
from freeguide.trainer.checkpoints import search
from freeguide.trainer.rounding import to_uint8
from freeguide.trainer.sampler import Sampler, image_labels
from freeguide.trainer.weights import Weights
from tests.cluster.untrained import LOCAL, through, write_run

ROOT = Path(__file__).parents[2]
HERE = Resources(cpus=torch.get_num_threads(), gpus=0)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """A run with the first weights of a network of two blocks, and 10 images of it asked for in units of 4."""
    noise = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8)
    write_shards(Source(Schema(8, 1, 10), 20, lambda i: Sample(noise[i], i % 10), "noise"), open_store(f"{tmp_path}/data"))
    small = ["model.channels=16", "model.head_channels=16", "sampling.steps=2", "sampling.labels=random", "sampling.batch=3"]
    asked = ["generate.images=10", "generate.unit=4", "generate.w=0.5", f"run={tmp_path}/run", f"data.uri={tmp_path}/data"]
    config = load_config(ROOT / "configs" / "digits.yaml", [*small, *asked, *LOCAL], "generate")
    write_run(config)
    return config


@pytest.fixture
def made(in_process: list[Unit]) -> list[Unit]:
    """The units that were made."""
    return in_process


def test_image_i_is_made_from_its_number_and_the_set_says_of_what(config: Config, made: list[Unit]) -> None:
    store = open_store(generate(config))
    manifest = load_manifest(store)
    assert [shard.samples for shard in manifest.shards] == [4, 4, 2]
    said = json.loads(manifest.source)
    assert (said["generate"]["w"], said["sampling"]["seed"], said["step"]) == (0.5, 0, 8)
    assert (said["run"], said["sampling"]["checkpoint"]) == (config.run, [search.find(open_store(config.run)).sha256])
    files = sorted(str(Path(store.uri, shard.key)) for shard in manifest.shards)
    read = list(webdataset.WebDataset(files, shardshuffle=False).decode("l8"))
    assert [int(sample["__key__"]) for sample in read] == list(range(10))
    labels = image_labels(config, torch.arange(10))
    assert len(labels.unique()) > 2
    assert [int(sample["cls"]) for sample in read] == labels.tolist()
    index = torch.arange(4, 8)
    again = to_uint8(Sampler.load(config.run).sample(index, labels[4:8], 0.5))
    assert np.array_equal(np.stack([sample["png"] for sample in read[4:8]]), again[..., 0])
    arrays = np.load(Path(store.uri, NPZ), allow_pickle=False)
    assert np.array_equal(arrays["arr_0"][..., 0], np.stack([sample["png"] for sample in read]))
    assert arrays["arr_1"].tolist() == labels.tolist()
    assert arrays["arr_0"].std() > 10, "the images are all alike, so the comparisons above have no power"


@pytest.mark.parametrize("w", [0.0, 0.5])
def test_images_of_one_class_are_made_and_guidance_of_them_is_said_to_mean_nothing(
    tmp_path: Path, made: list[Unit], capsys: pytest.CaptureFixture[str], w: float
) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1), np.uint8)
    write_shards(Source(Schema(8, 1, 1), 20, lambda i: Sample(noise[i], 0), "noise"), open_store(f"{tmp_path}/data"))
    small = ["model.channels=16", "model.head_channels=16", "sampling.steps=2", "generate.images=5", "data.classes=1"]
    if not w:
        small.append("diffusion.p_uncond=0")  # which can be sampled at w = 0
    asked = [f"generate.w={w}", f"run={tmp_path}/run", f"data.uri={tmp_path}/data"]
    config = load_config(ROOT / "configs" / "digits.yaml", [*small, *asked, *LOCAL], "generate")
    write_run(config)
    images, labels = scan_all(store := open_store(generate(config)), load_manifest(store))
    assert (len(images), labels.tolist()) == (5, [0] * 5)
    assert images.std() > 10
    assert ("WARNING: generate.w=0.5: guidance goes" in capsys.readouterr().err) == (w > 0)


def test_a_set_that_was_cut_off_goes_on_to_the_same_bits(
    config: Config, made: list[Unit], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = open_store(generate(config))
    expected = {info.key: whole.get(info.key) for info in whole.list()}
    config.run = f"{tmp_path}/again"
    write_run(config)

    def interrupted(done: Iterator[Unit]) -> Iterator[Unit]:
        for unit in done:
            made.append(unit)
            yield unit
            if unit.first == 4:
                raise StoreError("the store is gone.")

    made.clear()
    with monkeypatch.context() as patch:
        patch.setitem(ENGINES, "local", through(interrupted))
        with pytest.raises(StoreError):
            generate(config)
    again = open_store(generate(config))
    assert [unit.first for unit in made] == [0, 4, 8]
    found = {info.key: again.get(info.key) for info in again.list()}
    assert found.keys() == expected.keys()
    assert {key for key in found if found[key] != expected[key]} == {NAME}  # which names the run
    assert load_manifest(again).fingerprint == load_manifest(whole).fingerprint
    made.clear()
    generate(config)
    assert made == []


def test_the_npz_can_be_left_out_and_added_later(config: Config, made: list[Unit]) -> None:
    config.generate.npz = False
    store = open_store(generate(config))
    assert not store.exists(NPZ)
    assert load_manifest(store).samples == 10
    config.generate.npz = True
    made.clear()
    assert generate(config) == store.uri
    assert made == []
    assert len(np.load(Path(store.uri, NPZ), allow_pickle=False)["arr_0"]) == 10


@pytest.mark.slow
def test_a_generated_set_trains_a_network(config: Config, made: list[Unit], tmp_path: Path) -> None:
    uri = generate(config)
    steps = ["train.steps=2", "train.global_batch=4", "train.sample_every=0", "cluster.workers=1"]
    child = load_config(ROOT / "configs" / "digits.yaml", [f"data.uri={uri}", f"run={tmp_path}/student", *steps])
    child.model, child.sampling = config.model, config.sampling
    (tmp_path / "student.yaml").write_text(yaml.safe_dump(yaml.safe_load(to_yaml(child))))
    ended = subprocess.run(
        [sys.executable, "-m", "trainer", str(tmp_path / "student.yaml")],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "step 2/2" in ended.stdout + ended.stderr
    assert open_store(f"{tmp_path}/student").list("checkpoints/")


def test_what_the_run_was_trained_with_wins_over_the_config(config: Config, made: list[Unit]) -> None:
    uri = generate(config)
    other = replace(config, diffusion=replace(config.diffusion, p_uncond=0.2), model=replace(config.model, channels=32))
    assert generate(other) == uri


@pytest.mark.parametrize(
    ("p_uncond", "w", "words"),
    [
        (0.0, 0.5, "leaves the network without an unconditional mode, so generate.w=0.5 cannot be sampled"),
        (1.0, 0.5, "trains no class at all, so generate cannot sample one at any w"),
        (1.0, 0.0, "trains no class at all, so generate cannot sample one at any w"),
    ],
)
def test_a_run_that_lacks_one_of_the_two_modes_is_refused(config: Config, p_uncond: float, w: float, words: str) -> None:
    write_run(replace(config, diffusion=replace(config.diffusion, p_uncond=p_uncond)))
    config.generate.w = w
    with pytest.raises(ConfigError, match=words):
        generate(config)


def test_an_average_that_was_not_kept_and_other_images_are_refused(config: Config) -> None:
    with pytest.raises(CheckpointError, match=r"holds no average half_life_7; set .* to one of ema, half_life_50, master$"):
        generate(replace(config, sampling=replace(config.sampling, ema="half_life_7")))
    with pytest.raises(ConfigError, match=r"was trained with data\.image_size=8, now it is 16; set data\.image_size=8"):
        generate(replace(config, data=replace(config.data, image_size=16)))


def test_a_disk_that_is_too_small_is_said_before_a_single_image(tmp_path: Path) -> None:
    for uri, size in (("s3://lab/x", "12288000.0"), (f"{tmp_path}/not/yet", "24576000.0")):
        with pytest.raises(ConfigError, match=rf"takes {size} GB.*set TMPDIR to a larger disk, or generate\.npz=false"):
            _check_disk(open_store(uri), Schema(64, 3, 10), 10**12)


@pytest.mark.parametrize(("same", "free", "fits"), [(True, 250, True), (True, 150, False), (False, 150, True), (False, 50, False)])
def test_the_npz_needs_twice_its_size_where_its_way_and_its_place_are_one_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, same: bool, free: int, fits: bool
) -> None:
    monkeypatch.setattr("freeguide.cluster.jobs.generate._disk_of", lambda folder: (same or folder == tmp_path, free))
    if fits:
        _check_disk(open_store(str(tmp_path)), Schema(10, 1, 2), 1)
    else:
        with pytest.raises(ConfigError, match="set TMPDIR to a larger disk"):
            _check_disk(open_store(str(tmp_path)), Schema(10, 1, 2), 1)


def test_a_disk_that_fills_while_the_npz_is_written_loses_nothing(
    config: Config, made: list[Unit], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    temp, checked = tmp_path / "tmp", list[int]()
    temp.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temp))
    monkeypatch.setattr("freeguide.cluster.jobs.generate._check_disk", lambda *_: checked.append(len(made)))
    write = generation.write_npz

    def on_a_full_disk(*arguments: object) -> None:
        """A file may grow to 500 bytes: less than the ten images, and the kernel refuses the rest as it does on a full disk."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))
        try:
            write(*arguments)  # type: ignore[arg-type]
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(generation, "write_npz", on_a_full_disk)
    with pytest.raises(
        ConfigError, match=rf"{NPZ} could not be written in {temp} \(File too large\); .* same command again"
    ) as error:
        generate(config)
    assert "\n" not in str(error.value)
    assert checked == [0, 3], "once before the first image, and again when the shards had taken their room"
    assert list(temp.iterdir()) == []
    monkeypatch.setattr(generation, "write_npz", write)
    made.clear()
    store = open_store(generate(config))
    assert made == []
    assert len(np.load(Path(store.uri, NPZ), allow_pickle=False)["arr_0"]) == 10


def test_the_npz_is_written_without_holding_the_images(tmp_path: Path) -> None:
    store, random = open_store(str(tmp_path)), np.random.default_rng(0)
    one = random.integers(0, 256, (64, 64, 3), np.uint8)
    shards = []
    for number in range(15):
        packed = pack_shard([Sample(np.roll(one, i, 0), i) for i in range(40)], 40 * number)
        shards.append(packed.index(f"{number}.tar", store.put(f"{number}.tar", packed.data)))
    manifest = build_manifest(Schema(64, 3, 40), shards)
    tracemalloc.start()
    write_npz(store, manifest)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3e6, "a shard is 0.6 MB and all images are 7.4 MB"
    arrays = np.load(tmp_path / NPZ, mmap_mode="r", allow_pickle=False)
    assert arrays["arr_0"].shape == (600, 64, 64, 3)
    assert np.array_equal(arrays["arr_0"][567], np.roll(one, 7, 0))


def test_files_go_to_a_folder_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 5000)
    store = open_store(str(tmp_path / "store"))
    assert store.put_file("a/b", tmp_path / "file") == store.stat("a/b").etag
    assert store.get("a/b") == (tmp_path / "file").read_bytes()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StoreError, match="No space left on device"):
        store.put_file("c", tmp_path / "file")
    assert [info.key for info in store.list()] == ["a/b"]
    assert sorted(path.name for path in (tmp_path / "store").iterdir()) == ["a"]


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """A place on S3 whose uploads go in parts of 5 MiB, the least that S3 allows."""
    monkeypatch.setattr("freeguide.data_pipeline.store.s3.MULTIPART", 5 * 2**20)
    store: Store = open_store("s3://lab/files", Retry(base_s=0.01))
    assert isinstance(store, S3Store)
    return store


def test_a_fault_within_an_upload_costs_one_part(bucket: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = np.random.default_rng(0).integers(0, 256, 11 * 2**20, np.uint8).tobytes()
    (tmp_path / "file").write_bytes(data)
    sent, upload = list[int](), S3Store._upload_part

    def flaky(store: S3Store, request: dict[str, int]) -> object:
        sent.append(request["PartNumber"])
        if sent.count(2) == request["PartNumber"] - 1 == 1:
            raise botocore.exceptions.ReadTimeoutError(endpoint_url="")
        return upload(store, request)

    monkeypatch.setattr(S3Store, "_upload_part", flaky)
    for put in (lambda: bucket.put_file("large", tmp_path / "file"), lambda: bucket.put("large", bytearray(data))):
        sent.clear()
        etag = put()
        assert sorted(sent) == [1, 2, 2, 3]
        assert bucket.get("large") == data
        assert bucket.stat("large").etag == etag
    assert bucket.put_file("small", ROOT / "LICENSE") == bucket.stat("small").etag


def test_an_upload_that_fails_leaves_nothing_behind(bucket: S3Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(bytes(6 * 2**20))
    refused = botocore.exceptions.ClientError({"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": 403}}, "")
    monkeypatch.setattr(S3Store, "_upload_part", lambda *_: (_ for _ in ()).throw(refused))
    with pytest.raises(StoreError, match=r"do not allow this .*at s3://lab/files/none"):
        bucket.put_file("none", tmp_path / "file")
    assert not bucket.exists("none")
    assert "Uploads" not in bucket._client().list_multipart_uploads(Bucket="lab")


def test_generated_latents_have_the_scale_and_the_type_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(Series, "load", lambda *_: SimpleNamespace(sample=lambda index, labels, w: x[index]))
    data = DataConfig(uri="", image_size=8, channels=4, classes=10, dtype="float16", latent_scale=0.18215)
    store, unit = open_store(str(tmp_path)), Unit(0.5, 0, 5)
    _Generate(Series(Config(data=data), Weights(str(tmp_path), 6, "ema", (), ""), store), HERE)(unit)
    manifest = build_manifest(Schema(8, 4, 10, dtype="float16"), [ShardIndex.from_bytes(store.get(unit.key("tar.npz")))])
    save_manifest(store, manifest)
    write_npz(store, manifest)
    expected = (x / 0.18215).numpy().astype(np.float16)
    arrays = np.load(tmp_path / "samples.npz", allow_pickle=False)
    for found, labels in ((arrays["arr_0"], arrays["arr_1"]), scan_all(store, load_manifest(store))):
        assert found.dtype == np.float16
        assert np.array_equal(found, expected)
        assert labels.tolist() == [0, 1, 2, 3, 4]
