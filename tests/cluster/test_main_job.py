"""The main job on S3 and Ray, small: prepare, train, evaluate, generate, each again, and each as a submitted job."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import webdataset
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from freeguide.cluster.evaluation.rows import from_json
from freeguide.configs.load import load_config
from freeguide.data_pipeline.closure import NAME, ROOMS
from freeguide.data_pipeline.store.base import Store
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stored import load_manifest
from freeguide.trainer.checkpoints import search
from freeguide.trainer.checkpoints.values import load
from tests.cluster.conftest import started_head

ROOT = Path(__file__).parents[2]
SMALL = [
    "run=s3://lab/runs/small",
    "data.uri=s3://lab/data/digits",
    "model.channels=16",
    "model.head_channels=16",
    "train.steps=8",
    "train.global_batch=16",
    "train.checkpoint_every=4",
    "train.log_every=4",
    "sampling.steps=3",
    "evaluate.images=60",
    "evaluate.unit=20",
    "evaluate.w=[0,1]",
    "evaluate.grid=2",
    "evaluate.evaluator_epochs=2",
    "generate.images=50",
    "generate.unit=20",
    "generate.w=0.5",
    "train.sample_w=0.5",
]
DIGITS = "configs/digits.yaml"


@pytest.mark.timeout(900)  # a dozen commands, each of which starts Python, and most of them Ray's workers
def test_the_whole_job_runs_and_nothing_is_done_twice(freeguide, ray_head, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    address, dashboard = ray_head
    job = {"RAY_ADDRESS": address}

    def ok(command: str, *more: str, **environment: str) -> str:
        ended = freeguide(command, DIGITS, *SMALL, *more, **(job | environment))
        assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
        return ended.stdout

    assert "1797 images 8x8x1, 10 classes" in ok("prepare")
    run = open_store("s3://lab/runs/small")

    assert "trained to step 8" in ok("train")
    found = search.find(run)
    stems = {key.rsplit("-", 1)[0] for key in found.files}
    assert (found.step, stems) == (8, {f"{Path(found.key).parent}/rank-{r:05d}" for r in range(2)})
    assert_tensorboard_shows_the_run(run, tmp_path / "events")
    before = {info.key: info.etag for info in run.list()}
    assert "nothing to do" in ok("train", RAY_ADDRESS="127.0.0.1:1")  # a cluster that does not exist is not asked
    assert {info.key: info.etag for info in run.list()} == before

    assert "resuming from step 8 of 10" in ok("train", "train.steps=10", "cluster.workers=1", "train.zero_stage=1")
    assert search.find(run).step == 10

    state = freeguide("inspect", "s3://lab/runs/small")
    assert state.returncode == 0, state.stderr
    assert "checkpoints  [4, 8, 10]" in state.stdout
    assert "step         10" in state.stdout

    first = ok("evaluate")
    assert "6 work units, 0 of them done" in first
    report = tmp_path / "runs" / "digits"
    files = {path.name: path.read_bytes() for path in report.iterdir()}
    assert {
        "report.json",
        "table.md",
        "fid_over_w.png",
        "frontier.png",
        "samples.png",
        "samples_w0.png",
        "index.html",
    } <= files.keys()
    rows = json.loads(files["report.json"])["rows"]
    assert [(row["w"], row["n"], row["nfe"], row["checkpoint_step"]) for row in rows] == [(0, 60, 3, 10), (1, 60, 6, 10)]
    assert "6 work units, 6 of them done" in ok("evaluate", RAY_ADDRESS="127.0.0.1:1")
    again = {path.name: path.read_bytes() for path in report.iterdir()}
    assert {name for name in files if files[name] != again[name]} <= {"times.json"}

    exported = safetensors.torch.load(open_store("s3://lab").get(ok("export").strip().rsplit("s3://lab/", 1)[1]))
    averaged = load(run, search.find(run))
    assert exported.keys() == averaged.keys()
    assert all(torch.equal(exported[name], averaged[name]) for name in averaged)
    card = next(run.get(info.key).decode() for info in run.list("export/") if info.key.endswith(".md"))
    assert "`ema` of step 10" in card
    assert "FID-digits" in card
    assert "class 10 is the null class" in card

    uri = ok("generate").strip().rsplit(" ", 1)[1]
    made = open_store(uri)
    with np.load(io.BytesIO(made.get("samples.npz")), allow_pickle=False) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    assert (images.shape, images.dtype, labels.tolist()) == ((50, 8, 8, 1), np.uint8, [i % 10 for i in range(50)])
    assert load_manifest(made).samples == 50
    local = tmp_path / "shards"
    local.mkdir()
    for shard in load_manifest(made).shards:
        (local / Path(shard.key).name).write_bytes(made.get(shard.key))
    read = list(webdataset.WebDataset(sorted(map(str, local.iterdir())), shardshuffle=False).decode("l8"))
    assert [int(sample["cls"]) for sample in read] == labels.tolist()
    assert all(np.array_equal(sample["png"], image[..., 0]) for sample, image in zip(read, images, strict=True))
    assert uri in ok("generate", RAY_ADDRESS="127.0.0.1:1")

    submitted = ok("train", "run=s3://lab/runs/submitted", "--submit", dashboard, RAY_ADDRESS="")
    assert "trained to step 8" in submitted
    assert search.find(open_store("s3://lab/runs/submitted")).step == 8
    shutil.rmtree(tmp_path / "runs")
    measured = ok("evaluate", "run=s3://lab/runs/submitted", "evaluate.w=[0]", "--submit", dashboard, RAY_ADDRESS="")
    assert "report: runs/digits/index.html" in measured.splitlines()[-1]
    assert (report / "index.html").stat().st_size > 0
    assert [row["checkpoint_step"] for row in json.loads((report / "report.json").read_text())["rows"]] == [8]


def assert_tensorboard_shows_the_run(run: Store, folder: Path) -> None:
    folder.mkdir()
    for info in run.list("events/"):
        (folder / Path(info.key).name).write_bytes(run.get(info.key))
    log = EventAccumulator(str(folder))
    log.Reload()
    tags = log.Tags()
    assert {"train/loss", "train/gradient_norm", "train/lr", "speed/images_per_second", "speed/data_wait_percent"} <= {
        *tags["scalars"]
    }
    assert [event.step for event in log.Scalars("train/loss")] == list(range(1, 9))
    assert {"data/bytes", "data/gets", "data/get_s_p95", "data/ready_batches", "data/waited_s"} <= {*tags["scalars"]}
    assert log.Scalars("data/bytes")[-1].value > 0
    assert any(tag.startswith("loss_by_logsnr/") for tag in tags["scalars"])
    assert tags["images"] == ["samples/w=0.5"]
    assert [image.step for image in log.Images("samples/w=0.5")] == [8]


def test_a_submitted_job_that_fails_gives_its_exit_code_and_its_sentence(freeguide, ray_head) -> None:  # type: ignore[no-untyped-def]
    ended = freeguide("train", DIGITS, *SMALL, "data.uri=s3://no-such-bucket/data", "--submit", ray_head[1])
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert "freeguide: error: " in ended.stdout
    assert "no-such-bucket" in ended.stdout


def test_a_cluster_that_is_too_small_is_one_sentence(freeguide, ray_head) -> None:  # type: ignore[no-untyped-def]
    many = ["data.uri=s3://lab/data/too-small", "data.shard_samples=50", "cluster.cpus_per_worker=99"]
    ended = freeguide("prepare", DIGITS, *many, RAY_ADDRESS=ray_head[0])
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert ended.stderr.startswith("freeguide: error: the cluster is too small for 1 process of 99 CPU, it has room for 0")
    assert len(ended.stderr.splitlines()) == 1


def test_rays_own_submit_runs_the_same_command(ray_head, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """`ray job submit --working-dir . -- python -m cluster ...` from a checkout, without the distribution installed."""
    copy = tmp_path / "checkout"
    copy.mkdir()
    for room in (NAME, *ROOMS):
        (copy / room).symlink_to(ROOT / room)
    ended = subprocess.run(
        [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", ray_head[1], "--working-dir", ".", "--",
         "python", "-m", "cluster", "prepare", DIGITS, "data.uri=s3://lab/data/digits"],
        cwd=copy, env=os.environ, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "1797 images 8x8x1" in ended.stdout


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("before", ["a local run", "another program's token"])
def test_both_documented_submits_work_for_a_user_who_has_set_nothing(s3: str, tmp_path: Path, before: str) -> None:
    home, programs = tmp_path / "home", Path(sys.executable).parent
    home.mkdir()
    clean = {name: value for name, value in os.environ.items() if name.startswith("AWS_")} | {
        "HOME": str(home), "PATH": f"{programs}:/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONPATH": str(ROOT),
    }  # fmt: skip

    def say(*words: str, **more: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(words, cwd=ROOT, env=clean | more, capture_output=True, text=True, timeout=200)

    if before == "a local run":
        alone = "from freeguide.cluster.runtime.session import session; from freeguide.configs.load import load_config"
        assert (
            say(str(programs / "python"), "-c", f"{alone}\nwith session(load_config('configs/digits.yaml'), 1): pass").returncode
            == 0
        )
        assert not list(home.rglob("auth_token"))
    else:
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text("0123456789abcdef0123456789abcdef")
    with started_head(tmp_path, clean) as (_, url):
        command = ["prepare", "configs/digits.yaml", f"data.uri=s3://lab/{tmp_path.name}", "run=s3://lab/run"]
        ours = say(str(programs / "python"), "-m", "cluster", *command, "--submit", url)
        assert ours.returncode == 0, ours.stdout + ours.stderr
        assert "1797 images 8x8x1" in ours.stdout
        mode = {} if before == "a local run" else {"RAY_AUTH_MODE": "token"}
        copy = tmp_path / "checkout"
        copy.mkdir()
        for room in (NAME, *ROOMS):
            shutil.copytree(ROOT / room, copy / room)
        ray = [str(programs / "ray"), "job", "submit", "--address", url, "--working-dir", str(copy), "--"]
        rays = say(*ray, "python", "-m", "cluster", *command, **mode)
        assert rays.returncode == 0, rays.stdout + rays.stderr
        assert "1797 images 8x8x1" in rays.stdout
        if mode:
            (home / ".ray" / "auth_token").unlink()
            refused = say(str(programs / "python"), "-m", "cluster", *command, "--submit", url)
            assert refused.returncode == 2
            sentence = f"freeguide: error: the cluster at {url} wants a token, and there is none here; set RAY_AUTH_TOKEN"
            assert refused.stderr.startswith(sentence)
            assert len(refused.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["digits", "imagenet64", "imagenet128", "image_folder"])
def test_inspect_prints_what_a_config_means(freeguide, name: str) -> None:  # type: ignore[no-untyped-def]
    ended = freeguide("inspect", f"configs/{name}.yaml")
    assert ended.returncode == 0, ended.stderr
    config = load_config(ROOT / "configs" / f"{name}.yaml")
    assert f"global batch              {config.train.global_batch} = {config.cluster.workers} workers" in ended.stdout
    if name == "imagenet64":
        # The published network has 295.9 M parameters; fixed variance takes 3 output channels away, the null class adds a row.
        assert "parameters                295,900,035" in ended.stdout
        assert "219.314 GFLOP" in ended.stdout


ODD = ["with space.png", "umläut é.jpg", "emoji 🦜.webp", "-rf.png", "no extension", "deep/er/x.JPEG", "quote'\".png", "#.bmp"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_flat_folder_of_odd_pictures_goes_all_the_way_to_a_report_and_is_scored(  # type: ignore[no-untyped-def]
    freeguide, tmp_path: Path
) -> None:
    """Bright above, dark below, of mixed sizes, modes and codecs, some deeper than others, with strays beside them."""
    random, images = np.random.default_rng(0), tmp_path / "my photos"
    for number in range(160):
        name = f"{number:03d} {ODD[number % len(ODD)]}" if number % len(ODD) != 5 else f"deep/er/{number}.JPEG"
        height, width = random.integers(30, 90, 2)
        pixels = np.linspace(255, 0, height)[:, None, None] * np.ones((height, width, 3)) * random.uniform(0.5, 1, 3)
        noisy = Image.fromarray(np.clip(pixels + random.normal(0, 10, pixels.shape), 0, 255).astype(np.uint8))
        codec = {"jpg": "JPEG", "JPEG": "JPEG", "webp": "WEBP", "bmp": "BMP"}.get(name.rpartition(".")[2], "PNG")
        mode = ("RGB", "L", "P", "RGBA")[number % 4] if codec == "PNG" else "RGB"
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        noisy.convert(mode).save(images / name, codec)
    (images / "notes.txt").write_text("none of them")
    (images / ".DS_Store").write_bytes(b"\0")
    network = ["model.channels=8", "model.head_channels=8", "model.channel_mult=[1,1]", "model.attention=[]", "model.res_blocks=1"]
    steps = ["train.steps=4", "train.global_batch=8", "train.checkpoint_every=2", "train.precision=fp32", "train.warmup_steps=0"]
    measured = ["sampling.steps=3", "evaluate.images=70", "evaluate.unit=40", "evaluate.w=[0]", "evaluate.evaluator_epochs=3"]
    places = [f"data.path={images}", "data.class_depth=0", f"data.uri={tmp_path}/data", f"run={tmp_path}/run"]
    places += ["evaluate.dataset=photos", "cluster.engine=local"]  # not called after the folder "data"

    def ok(command: str, *more: str) -> "subprocess.CompletedProcess[str]":
        ended = freeguide(command, "configs/image_folder.yaml", *places, *network, *steps, *measured, *more)
        assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
        assert "Traceback" not in ended.stdout + ended.stderr
        return ended  # type: ignore[no-any-return]

    assert "160 images 32x32x3, 1 class," in ok("prepare").stdout
    assert "WARNING: evaluate.w" not in ok("inspect").stdout
    assert "trained to step 4" in ok("train").stdout
    log = EventAccumulator(str(next((tmp_path / "run" / "events").glob("events.out.tfevents.*"))))
    log.Reload()
    (grid,) = [image for tag in log.Tags()["images"] if tag.startswith("samples/") for image in log.Images(tag)][-1:]
    assert grid.width > 2 * grid.height  # four lines of ten
    ended = ok("evaluate")
    assert "training the evaluator on 160 real images, to tell how they are turned, as they have no classes" in ended.stdout
    assert "guidance" not in ended.stderr
    report = tmp_path / "runs" / "image_folder"
    (row,) = from_json((report / "report.json").read_text())
    assert (row.fid_name, row.dataset, row.n, row.w) == ("FID-photos-rotations", "photos", 70, 0.0)
    assert (row.inception_score, row.accuracy, row.precision is None) == (None, None, False)
    assert not (report / "frontier.png").exists()
    assert "photos-rotations tells no classes apart: there is no Inception score" in (report / "index.html").read_text()
    ended = ok("fit-evaluator")
    assert "rotation accuracy on held-out images, FID-photos-rotations" in ended.stdout
    assert "WARNING" not in ended.stderr
    weights = ended.stdout.rsplit("evaluate.extractor=", 1)[1].split()[0]
    generated = open_store(ok("generate", "generate.images=70").stdout.strip().rsplit(" ", 1)[1])
    scored = subprocess.run(
        [sys.executable, "-m", "cluster", "score", generated.uri, "--reference", f"{tmp_path}/data", "--extractor", weights],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    (fid,) = [float(line.split()[1]) for line in scored.stdout.splitlines() if line.startswith("fid ")]
    assert fid == pytest.approx(row.fid, rel=1e-3)  # of the same images, in other blocks
    assert "inception_score" not in scored.stdout
    assert "accuracy" not in scored.stdout
