"""What `inspect` and `--dry-run` say of cost: for the machine at hand, in the precision that is used."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from freeguide.cluster.jobs import inspect as module
from freeguide.cluster.jobs.inspect import inspect
from freeguide.cluster.jobs.prepare import prepare
from freeguide.configs.load import load_config
from freeguide.trainer.training.loop import misfits

SMALL = ["model.channels=16", "model.channel_mult=[1]", "model.attention=[]", "model.head_channels=16", "data.image_size=8"]


def said(capsys: pytest.CaptureFixture[str], name: str) -> str:
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{name} ")]
    return line


@pytest.fixture
def places(tmp_path: Path) -> list[str]:
    return [f"run={tmp_path}/run", f"data.uri={tmp_path}/data", f"data.path={tmp_path}/images"]


@pytest.mark.parametrize(("training", "sampling"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_each_cost_is_priced_in_its_own_precision_on_the_gpu_at_hand(
    places: list[str], training: str, sampling: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA L40")
    inspect(load_config("imagenet64", [*places, f"train.precision={training}", f"sampling.precision={sampling}"]))
    lines = capsys.readouterr().out.splitlines()
    hours = {}
    for name, precision in (("cost of the training", training), ("evaluation", sampling)):
        (line,) = [line for line in lines if line.startswith(name)]
        found = re.search(r"([\d.,e+]+) EFLOP.*?, ([\d.,e+]+) GPU-hours at 40% of the (\w+) peak of NVIDIA L40; ", line)
        assert found, line
        assert found[3] == precision
        hours[name] = float(found[2].replace(",", "")) * 3600 * 0.4 / (float(found[1].replace(",", "")) * 1e18)
    peak = {"bf16": 181e12, "fp32": 90.5e12}
    assert 1 / hours["cost of the training"] == pytest.approx(peak[training], rel=0.02)
    assert 1 / hours["evaluation"] == pytest.approx(peak[sampling], rel=0.02)


def test_a_gpu_that_is_not_known_is_said_to_be_unknown(
    places: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA L400")
    inspect(load_config("imagenet64", places))
    assert "not known: GPU-hours at 40% of the bf16 peak of NVIDIA L400 (it has no entry); " in said(capsys, "cost of the training")


def test_a_small_network_is_tried_on_the_cpu_and_a_large_one_is_not(
    places: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "cpu_flops", lambda precision: {"bf16": 2e12, "fp32": 1e12}[precision])
    inspect(load_config("image_folder", [*places, *SMALL, "train.precision=fp32"]))
    assert "hours on this CPU in fp32, as this network ran; " in said(capsys, "cost of the training")
    monkeypatch.setattr(module, "build_network", lambda *_, **__: torch.nn.Linear(10_000, 10_000, device="meta"))
    inspect(load_config("imagenet64", places))
    assert "hours on this CPU at 40% of its matrix products in bf16; " in said(capsys, "cost of the training")


def test_without_data_the_classes_are_said_to_be_assumed_and_with_them_they_are_known(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config("image_folder", [*places, *SMALL, "train.precision=fp32"], "prepare")
    inspect(config)
    assert "WARNING: the number of classes is not known before the data are there, and taken for 1000" in capsys.readouterr().out
    for name in "ab":
        (tmp_path / "images" / name).mkdir(parents=True)
        for item in range(30):
            Image.fromarray(np.full((8, 8, 3), item, np.uint8)).save(tmp_path / "images" / name / f"{item}.png")
    prepare(config)
    capsys.readouterr()
    inspect(config)
    lines = capsys.readouterr().out.splitlines()
    assert not any("not known" in line for line in lines)
    assert [line for line in lines if line.startswith("WARNING: ")] == [f"WARNING: {sentence}" for sentence in misfits(config, 60)]


def test_guidance_of_data_with_one_class_is_said_to_mean_nothing(
    places: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "images").mkdir()
    for item in range(30):
        Image.fromarray(np.full((8, 8, 3), item, np.uint8)).save(tmp_path / "images" / f"{item}.png")
    small = [*places, *SMALL, "train.steps=10", "train.global_batch=10"]
    prepare(load_config("image_folder", small, "prepare"))
    capsys.readouterr()
    inspect(load_config("image_folder", [*small, "evaluate.w=[0,1]"]))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING: ")]
    assert "evaluate.w=[0.0, 1.0]: guidance goes from all images towards those of a class" in line
    assert line.endswith("; evaluate.w=[0] would do")
    inspect(load_config("image_folder", [*small, "evaluate.w=[0]"]))
    assert "WARNING" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("steps", "batch", "samples", "sentences"),
    [
        (100_000, 128, 600, ["train.steps=100000 of 128 images .* 21,333 times.*; train.steps=4687 looks 1,000 times"]),
        (400_000, 2048, 1_281_167, []),
        (600, 128, 1797, []),
        (10, 2048, 600, ["train.global_batch=2048 is more than the 600 samples .*; train.global_batch=128 would do"]),
        (100_000, 64, 3, ["train.global_batch=64 is more .*; train.global_batch=1 would do", "train.steps=46 looks"]),
    ],
)
def test_steps_and_batch_that_are_absurd_for_the_data_get_a_better_number(
    places: list[str], steps: int, batch: int, samples: int, sentences: list[str]
) -> None:
    config = load_config("image_folder", [*places, f"train.steps={steps}", f"train.global_batch={batch}"])
    found = list(misfits(config, samples))
    assert len(found) == len(sentences)
    for sentence, wanted in zip(found, sentences, strict=True):
        assert re.search(wanted, sentence), sentence
