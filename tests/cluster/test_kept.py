"""What an evaluation leaves behind: checked when it is used, never of two kinds, and safe from places that cannot be written."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from freeguide.cluster.evaluation import units, yardstick
from freeguide.cluster.evaluation.report.page import LATEST
from freeguide.cluster.evaluation.rows import from_json
from freeguide.cluster.evaluation.units import check_kind, kind_of
from freeguide.cluster.jobs.evaluate import evaluate, fetch_report
from freeguide.cluster.jobs.generate import generate
from freeguide.cluster.runtime.engines import ENGINES
from freeguide.configs.errors import CheckpointError, ConfigError, DataError, UserError
from freeguide.configs.schema import Config
from freeguide.data_pipeline.store.base import Denied, Store
from freeguide.data_pipeline.store.folder import FolderStore
from freeguide.data_pipeline.store.open import open_store
from freeguide.trainer.weights import weights_of
from tests.cluster.untrained import small, through, write_run


@pytest.fixture(autouse=True)
def here(in_process: list[Any], words_only: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    monkeypatch.chdir(tmp_path)
    return in_process


def flip(store: Store, part: str) -> str:
    """Turn one bit in the middle of the one object whose key holds `part`; its key."""
    key = next(info.key for info in store.list() if part in info.key)
    data = bytearray(store.get(key))
    data[len(data) // 2] ^= 1
    store.put(key, bytes(data))
    return key


def test_one_flipped_bit_in_whatever_an_evaluation_uses_is_one_sentence(lab: Path, tmp_path: Path) -> None:
    config = small(lab, tmp_path / "run", "evaluate.w=[0.5]", "evaluate.images=40")
    write_run(config)
    evaluate(config)
    store = open_store(config.run)
    before = {info.key: store.get(info.key) for info in store.list()}
    rows = [key for key in before if "/rows/" in key]
    for part in ("/rows/w0.5", "/units/w0.5/000000020"):
        if "/units/" in part:
            store.delete(rows[0])
        key = flip(store, part)
        with pytest.raises(
            DataError, match=rf"{key} is damaged \(its checksum does not fit\); delete it and give the command again"
        ):
            evaluate(config)
        store.put(key, before[key])
    there = open_store(str(lab))
    for key, words in (("evaluator.safetensors", "fit the evaluator again"), ("reference.npz", "save mu and sigma")):
        kept = there.get(key)
        flip(there, key)
        with pytest.raises(DataError, match=rf"{key} is damaged \(its checksum does not fit\); .*{words}") as error:
            evaluate(config)
        assert "\n" not in str(error.value)
        there.put(key, kept)
    evaluate(config)


def test_damaged_weights_are_made_again_from_their_checkpoint_or_refused(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(lab, tmp_path / "run")
    store = write_run(config)
    chosen = weights_of(config)
    chosen.keep()
    whole = chosen.read()
    data = store.get(chosen.key)
    zeros = data[:2000] + bytes(3000) + data[5000:]
    for damaged in (zeros, data[:-1], b"", bytes(len(data))):
        store.put(chosen.key, damaged)
        again = chosen.read()
        assert all(torch.equal(again[name], whole[name]) for name in whole)
        said = capsys.readouterr().err
        assert said.startswith(f"WARNING: {store.uri}/{chosen.key} is ")
        assert said.endswith("its values are made again from the checkpoint\n")
    for info in store.list("checkpoints/"):
        store.delete(info.key)
    store.put(chosen.key, zeros)
    with pytest.raises(CheckpointError, match=r"is damaged .*; delete it and sample a checkpoint that is still there"):
        chosen.read()
    store.put(chosen.key, safetensors.torch.save(whole, {"freeguide": '{"of": [], "data": ""}'}))  # as older versions kept it
    assert chosen.read().keys() == whole.keys()
    assert "was kept without a checksum and its checkpoint is gone: its values are read as they are" in capsys.readouterr().err


def test_a_damaged_index_of_a_generated_shard_is_named(lab: Path, tmp_path: Path) -> None:
    config = small(lab, tmp_path / "run", "generate.images=20", "generate.unit=10")
    store = write_run(config)
    generate(config)
    manifest = next(info.key for info in store.list("generate/") if info.key.endswith("manifest.json"))
    store.delete(manifest)
    flip(store, "000000010.tar.npz")
    with pytest.raises(DataError, match=r"000000010\.tar\.npz is damaged \(its checksum does not fit\)"):
        generate(config)


def test_a_working_folder_that_cannot_be_written_costs_a_warning_and_not_the_results(
    lab: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small(lab, tmp_path / "run", "evaluate.w=[0.5]", "evaluate.images=20")
    write_run(config)
    (tmp_path / "runs").write_text("a file where a folder should be")
    evaluate(config)
    told = capsys.readouterr()
    assert "| w |" in told.out or "FID" in told.out
    assert told.err.splitlines()[-1].startswith("WARNING: runs/digits cannot be written (")
    place = told.err.splitlines()[-1].rsplit(" is in ", 1)[1]
    (row,) = from_json((Path(place) / "report.json").read_text())
    assert row.w == 0.5
    assert open_store(config.run).exists(LATEST)
    (tmp_path / "runs").unlink()
    assert from_json((fetch_report(config) / "report.json").read_text()) == [row]


def test_reports_of_other_rows_stand_beside_each_other(lab: Path, tmp_path: Path) -> None:
    config = small(lab, tmp_path / "run", "evaluate.w=[0.5]", "evaluate.images=20")
    store = write_run(config)
    evaluate(config)
    evaluate(small(lab, tmp_path / "run", "evaluate.w=[0, 4]", "evaluate.images=20"))
    evaluate(config)
    reports = [info.key for info in store.list("evaluate/") if info.key.endswith("/report/report.json")]
    assert sorted([row.w for row in from_json(store.get(key).decode())] for key in reports) == [[0.0, 4.0], [0.5]]


def test_the_kind_of_device_names_units_and_stands_in_the_row(lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(lab, tmp_path / "run", "evaluate.w=[0.5]", "evaluate.images=20")
    store = write_run(config)
    (row,) = from_json((evaluate(config) / "report.json").read_text())
    assert row.device == kind_of(torch.device("cpu"))
    assert row.device.startswith("CPU with ")
    assert torch.__version__ in row.device
    monkeypatch.setattr(units, "kind_of", lambda device: "a faster one")
    (other,) = from_json((evaluate(config) / "report.json").read_text())
    assert other.device == "a faster one"
    made = {info.key.split("/units/")[0] for info in store.list("evaluate/") if "/units/" in info.key}
    assert len(made) == 2
    with pytest.raises(ConfigError, match="begun on A and an actor has B: images of both would stand in one row; give the command"):
        check_kind("A", "B")


def test_an_evaluator_of_data_that_may_only_be_read_stands_beside_the_run(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    put = FolderStore.create

    def refuse(self: FolderStore, key: str, data: bytes) -> bytes:
        if self.uri.startswith(str(lab / "data")):
            raise Denied(f"{self.uri}/{key} may not be written; change the rights.")
        return put(self, key, data)

    monkeypatch.setattr(FolderStore, "create", refuse)
    data, run = open_store(str(lab / "data")), open_store(str(tmp_path / "run"))
    places = [data.child("evaluators/x"), run.child("evaluators/x")]
    there = yardstick._put(places, "evaluator.safetensors", lambda: b"weights")
    assert there.uri == f"{run.uri}/evaluators/x"
    assert "evaluator.safetensors goes to" in capsys.readouterr().out
    found = yardstick._holding(places, "evaluator.safetensors")
    assert found is not None
    assert found.uri == there.uri
    monkeypatch.undo()
    second = yardstick._put(places, "evaluator.safetensors", lambda: b"other weights")  # written by another job meanwhile
    assert second.get("evaluator.safetensors") == b"other weights"
    yardstick._put(places, "evaluator.safetensors", lambda: b"third weights")
    assert second.get("evaluator.safetensors") == b"other weights"


def test_references_of_strangers_are_statistics_or_refused(lab: Path, tmp_path: Path) -> None:
    config = small(lab, tmp_path / "run")
    write_run(config)
    eye = np.eye(64)
    for arrays, words in (
        ({"mu": np.zeros(64), "sigma": eye, "n": np.uint64(2**63)}, "says that its statistics are of 9223372036854775808 images"),
        ({"mu": np.zeros(64), "sigma": eye, "n": np.float64(np.nan)}, "says that its statistics are of nan images"),
        ({"mu": np.zeros(64), "sigma": -eye}, "a negative variance"),
        ({"mu": np.full(64, 1e30), "sigma": eye}, "values beyond 1e\\+15"),
        ({"mu": np.zeros(64, np.longdouble) + np.longdouble("1e4000"), "sigma": eye}, "NaN or infinity"),
        ({"mu": np.zeros(64), "sigma": eye, "dataset": np.array(["a"] * 5)}, "holds dataset as <U1 .5,., not as a name"),
    ):
        np.savez(tmp_path / "mine.npz", **arrays)
        with pytest.raises(UserError, match=words) as error:
            evaluate(small(lab, tmp_path / "run", f"evaluate.reference={tmp_path}/mine.npz"))
        assert "\n" not in str(error.value)
    assert os.path.isfile(tmp_path / "mine.npz")


def test_kept_weights_of_old_steps_go_unless_something_unfinished_needs_them(
    lab: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    brief = ["sampling.steps=2", "sampling.interval=[]", "evaluate.w=[0.5]", "evaluate.images=10", "evaluate.unit=5"]

    def at(step: int, *more: str) -> Config:
        return small(lab, tmp_path / "run", *brief, f"sampling.checkpoint={step}", "generate.images=4", "generate.unit=2", *more)

    store = open_store(at(0).run)

    def kept() -> list[int]:
        return [int(info.key.split("-")[1]) for info in store.list("weights/") if info.key.endswith("s")]

    def broken_off(done: Iterator[Any]) -> Iterator[Any]:
        yield next(done)
        raise DataError("broken off")

    for step in (1, 2, 3):
        write_run(at(0), seed=step, step=step)
    with monkeypatch.context() as patch:
        patch.setitem(ENGINES, "local", through(broken_off))
        with pytest.raises(DataError, match="broken off"):
            evaluate(at(1))
        with pytest.raises(DataError, match="broken off"):
            generate(at(2))
    begun = weights_of(at(1)).read()
    for step in (1, 2):
        for info in store.list(f"checkpoints/step-{step:08d}"):
            store.delete(info.key)  # as the training does that goes on
    for step in (4, 5):
        write_run(at(0), seed=step, step=step)
        evaluate(at(step))
        assert kept() == [1, 2, 4, 5][: step - 1]
    evaluate(at(3))
    assert kept() == [1, 2, 4, 5]  # those of 3 went as soon as they were not needed
    assert all(torch.equal(value, begun[name]) for name, value in weights_of(at(1)).read().items())
    done = (evaluate(at(1)) / "report.json").read_bytes()
    assert kept() == [2, 4, 5]
    generate(at(2))
    assert kept() == [4, 5]
    assert (evaluate(at(1)) / "report.json").read_bytes() == done  # its rows are there
    with pytest.raises(CheckpointError, match="no whole checkpoint of step 2, only of 3, 4, 5"):
        generate(at(2, "generate.images=6"))
