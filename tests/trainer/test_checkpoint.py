"""Checkpoints exist whole or not at all, and whatever is wrong with one is found before a weight is touched."""

import copy
import dataclasses
import errno
import json
import logging
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from freeguide.configs.errors import CheckpointError, StoreError, UserError
from freeguide.configs.load import load_config
from freeguide.configs.schema import TrainConfig
from freeguide.data_pipeline.order import choose_order
from freeguide.data_pipeline.store.base import ObjectInfo
from freeguide.data_pipeline.store.folder import FolderStore
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stored import load_manifest
from freeguide.trainer.checkpoints import averages, search
from freeguide.trainer.checkpoints.manifest import KINDS, SNAPSHOTS, Checkpoint, checksummed, read_manifest
from freeguide.trainer.checkpoints.profiles import profiles
from freeguide.trainer.checkpoints.values import load
from freeguide.trainer.training import loop
from freeguide.trainer.training.ema import Ema
from freeguide.trainer.training.engine import Engine, join_process_group
from freeguide.trainer.training.loop import run_identity
from freeguide.trainer.training.resume import resume
from freeguide.trainer.training.writer import Writer

ROOT = Path(__file__).parents[2]
IDENTITY = {"seed": 0, "data.fingerprint": "abc"}
TRAIN = TrainConfig(
    precision="fp32",
    zero_stage=0,
    global_batch=4,
    ema_decay=0.9,
    ema_half_lives=[40],
    ema_sigma_rel=[0.05, 0.1],
    keep_checkpoints=2,
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """A real engine of one process on a network of two layers."""
    join_process_group()
    torch.manual_seed(0)
    yield Engine(torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Linear(5, 2)), TRAIN)
    dist.destroy_process_group()


class Training:
    """Weights that move at random, as a training would, and all that a checkpoint holds of them."""

    def __init__(self, engine: Engine, store: FolderStore, train: TrainConfig = TRAIN) -> None:
        self.engine, self.store, self.train = engine, store, train
        self.generator = torch.Generator().manual_seed(1)
        self.ema = Ema(engine, profiles(train))
        self._begin(0)

    def _begin(self, step: int) -> None:
        self.step = step
        self.writer = Writer(self.store, self.engine, self.ema, IDENTITY, self.train, step)
        self.writer.claim()

    def move(self, steps: int = 1) -> None:
        for _ in range(steps):
            with torch.no_grad():
                for f in self.engine.fragments:
                    for kind in KINDS:
                        self.engine.values(f, kind).add_(torch.randn(f.numel, generator=self.generator))
            self.step += 1
            self.ema.update(self.step)

    def save(self, steps: int = 1) -> None:
        self.move(steps)
        self.writer.start(self.step, [])
        self.writer.finish()

    def state(self) -> dict[str, Tensor]:
        held = {f"{kind} {f.name}": self.engine.values(f, kind) for kind in KINDS for f in self.engine.fragments}
        for name, values in self.ema.values.items():
            held |= {f"{name} {f.name}": v for f, v in zip(self.ema.fragments, values, strict=True)}
        return {name: values.clone() for name, values in held.items()}

    def resume(self) -> int:
        found = resume(self.store, self.engine, self.ema, IDENTITY)
        self._begin(found.step if found else 0)
        return self.step


@pytest.fixture
def training(engine: Engine, tmp_path: Path) -> Training:
    return Training(engine, FolderStore(tmp_path / "run"))


def rank_file(folder: Path) -> Path:
    (found,) = folder.glob("rank-00000-*.safetensors")
    return found


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_every_value_and_counter_comes_back_to_the_bit(training: Training) -> None:
    training.engine.loaded(17, {})
    training.move(3)
    training.writer.start(training.step, [2], undone=1)
    training.writer.finish()
    saved = training.state()
    training.move()
    training.engine.loaded(0, {})
    assert not same(saved, training.state())
    found = resume(training.store, training.engine, training.ema, IDENTITY)
    assert found is not None
    assert same(saved, training.state())
    assert (found.step, found.bad_steps, found.undone, training.engine.counters()["adam_steps"]) == (3, [2], 1, 17)


def test_a_run_can_go_back_before_a_step_and_what_came_after_exists_no_more(training: Training) -> None:
    for _ in range(2):
        training.save()
    good = training.state()
    training.save()
    assert resume(training.store, training.engine, training.ema, IDENTITY, before=2) is None  # two are kept
    found = resume(training.store, training.engine, training.ema, IDENTITY, before=3)
    assert found is not None
    assert found.step == 2
    assert same(good, training.state())
    training.writer.discard(after=2)
    assert search.find(training.store).step == 2
    assert [snapshot.step for snapshot in search.newest(training.store, SNAPSHOTS)] == [2, 1]
    assert not [info.key for info in training.store.list() if "step-00000003" in info.key]


def test_a_rank_file_is_a_safetensors_file_that_others_can_read(training: Training) -> None:
    training.save()
    tensors = safetensors.torch.load(rank_file(training.store.folder / "checkpoints/step-00000001").read_bytes())
    for f in training.engine.fragments:
        assert torch.equal(tensors[f"exp_avg|{f.name}|0"], training.engine.values(f, "exp_avg"))
    assert len(tensors) == len(training.engine.fragments) * (len(KINDS) + 2)


def test_no_run_begins_at_step_0(training: Training) -> None:
    assert training.resume() == 0


# --- damage ---


def truncated(rank: Path, manifest: Path) -> None:
    rank.write_bytes(rank.read_bytes()[:-1])


def flipped(rank: Path, manifest: Path) -> None:
    data = bytearray(rank.read_bytes())
    data[-7] ^= 1
    rank.write_bytes(data)


def missing(rank: Path, manifest: Path) -> None:
    rank.unlink()


def swapped(rank: Path, manifest: Path) -> None:
    """The file of another step: of the right size, and a whole file in itself."""
    rank.write_bytes(rank_file(rank.parent.parent / "step-00000002").read_bytes())


def pickled_rank(rank: Path, manifest: Path) -> None:
    rank.write_bytes(pickle.dumps(_Bomb()).ljust(rank.stat().st_size, b"\0"))


def pickled_manifest(rank: Path, manifest: Path) -> None:
    manifest.write_bytes(pickle.dumps(_Bomb()))


def garbage(rank: Path, manifest: Path) -> None:
    manifest.write_bytes(b"\xff\x00garbage")


def half(rank: Path, manifest: Path) -> None:
    manifest.write_bytes(manifest.read_bytes()[: manifest.stat().st_size // 2])


def wrong_type(rank: Path, manifest: Path) -> None:
    manifest.write_text('["not", "a", "checkpoint"]')


def edited(change: Callable[[dict[str, Any]], None], summed: bool = True) -> Callable[[Path, Path], None]:
    """`change` of a manifest's content, whose checksum stays as it was; or not `summed`: there is none, as in older manifests."""

    def damage(rank: Path, manifest: Path) -> None:
        content = json.loads(manifest.read_text())
        change(content)
        if not summed:
            del content["sha256"]
        manifest.write_text(json.dumps(content))

    damage.__name__ = change.__name__
    return damage


def names_a_file_outside(content: dict[str, Any]) -> None:
    content["files"][0]["key"] = "../../etc/passwd"


def lacks_a_piece(content: dict[str, Any]) -> None:
    del content["files"][0]["pieces"][0]


def has_a_piece_too_long(content: dict[str, Any]) -> None:
    content["files"][0]["pieces"][0][3] = 10**12


def has_other_adam_steps(content: dict[str, Any]) -> None:
    content["adam_steps"] += 1


def has_pieces_of_swapped_kinds(content: dict[str, Any]) -> None:
    one, other = (next(p for p in content["files"][0]["pieces"] if p[0] == kind) for kind in ("exp_avg", "exp_avg_sq"))
    one[0], other[0] = other[0], one[0]


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was opened",))


DAMAGES = [truncated, flipped, missing, swapped, pickled_rank, pickled_manifest, garbage, half, wrong_type]
DAMAGES += [edited(change, summed=False) for change in (names_a_file_outside, lacks_a_piece, has_a_piece_too_long)]
DAMAGES += [edited(change) for change in (has_other_adam_steps, has_pieces_of_swapped_kinds)]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_a_damaged_newest_checkpoint_falls_back_loudly(
    training: Training, damage: Callable[[Path, Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    training.save(2)
    before = training.state()
    training.save()
    folder = training.store.folder / "checkpoints" / "step-00000003"
    damage(rank_file(folder), folder / "manifest.json")
    with caplog.at_level(logging.WARNING):
        assert training.resume() == 2
    assert same(before, training.state())
    assert "step-00000003" in caplog.text
    assert "trying the" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(training: Training) -> None:
    training.save()
    training.save()
    before = training.state()
    for rank in training.store.folder.glob("checkpoints/*/*.safetensors"):
        flipped(rank, rank)
    with pytest.raises(CheckpointError, match="none of its 2 checkpoints can be used"):
        training.resume()
    assert same(before, training.state())


def test_checkpoints_behind_a_link_are_gone_on_from_and_kept(training: Training, tmp_path: Path) -> None:
    training.save()
    training.save()
    for kind in ("checkpoints", "snapshots"):
        (training.store.folder / kind).rename(tmp_path / f"large disk {kind}")
        (training.store.folder / kind).symlink_to(tmp_path / f"large disk {kind}")
    saved = training.state()
    training.move()
    assert training.resume() == 2
    assert same(saved, training.state())
    training.save()
    assert [found.step for found in search.newest(training.store)] == [3, 2]
    assert len(list((tmp_path / "large disk checkpoints").glob("*/*"))) == 4
    assert len(list((tmp_path / "large disk snapshots").glob("*/*"))) == 6


@pytest.mark.parametrize("failure", ["link", "unreadable"])
def test_a_run_whose_checkpoints_cannot_be_listed_does_not_begin_anew(
    training: Training, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    training.save()
    folder = training.store.folder / "checkpoints"
    if failure == "link":
        folder.rename(folder.with_name("unmounted"))
        folder.symlink_to(folder.with_name("nothing"))
    else:
        scandir = os.scandir

        def denied(path: Any) -> Any:
            if Path(path) == folder:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", denied)
    before = training.state()
    for look in (training.resume, lambda: next(search.candidates(training.store)), lambda: search.find(training.store)):
        with pytest.raises(StoreError, match=r"checkpoints (is a link to nothing|cannot be used)"):
            look()
    assert same(before, training.state())


# --- copies, and folders with other names ---


def copied(run: Path, name: str) -> None:
    shutil.copytree(run / "checkpoints/step-00000004", run / "checkpoints" / name)


COPIES = [
    "step-00000004 (copy)",
    "step-00000004.bak",
    "old/step-00000004",
    "step-00009999",
    "step-4",
    "step-00000002",
    "step-0000000",
]


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_of_a_checkpoint_changes_nothing(
    engine: Engine, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither which is taken, nor what is deleted, nor what stands in the copy."""
    training = Training(engine, FolderStore(tmp_path / "run"))
    training.train = dataclasses.replace(TRAIN, keep_checkpoints=3)
    training.save(4)
    copied(training.store.folder, name)
    training.save(1)
    shutil.move(training.store.folder, tmp_path / "moved")
    training.store = FolderStore(tmp_path / "moved")
    copy = tmp_path / "moved/checkpoints" / name
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    saved = training.state()
    with caplog.at_level(logging.WARNING):
        assert training.resume() == 5
    assert same(saved, training.state())
    assert [found.step for found in search.newest(training.store)] == [5, 4]
    assert search.describe(training.store)["damaged"] == []
    for _ in range(6):
        training.save()
    training.save(19)  # beyond every name
    assert [found.step for found in search.newest(training.store)] == [30, 11, 10]
    training.writer.discard(after=10)
    assert not caplog.records
    assert [c.step for c in search.newest(training.store)] == [10]
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


@pytest.mark.parametrize("name", ["step-00000002.bak", "step-00009999", "old/step-00000002"])
def test_a_checkpoint_whose_folder_was_renamed_is_named_and_no_run_begins_anew_beside_it(
    training: Training, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    training.save()
    training.save()
    folder = training.store.folder / "checkpoints"
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / "step-00000002").rename(folder / name)
    with caplog.at_level(logging.WARNING):
        assert training.resume() == 1
    assert f"{name}/manifest.json: holds step 2; rename its folder to checkpoints/step-00000002; trying the one" in caplog.text
    shutil.rmtree(folder / "step-00000001")
    with pytest.raises(CheckpointError, match="none of its 1 checkpoints can be used"):
        training.resume()
    (folder / name).rename(folder / "step-00000002")
    assert training.resume() == 2


def test_steps_of_nine_digits_are_newer_than_those_of_eight(training: Training) -> None:
    training._begin(99_999_999)
    training.save()
    training.save()
    assert [c.step for c in search.newest(training.store)] == [100_000_001, 100_000_000]
    training.step = training.step
    assert training.resume() == 100_000_001


# --- averages that are lost, and the training state that is not ---


def emptied(run: Path) -> None:
    shutil.rmtree(run / "snapshots")


def removed(run: Path) -> None:
    for path in run.glob("snapshots/*/*.safetensors"):
        path.unlink()


def zeroed(run: Path) -> None:
    for path in run.glob("snapshots/*/*.safetensors"):
        path.write_bytes(bytes(path.stat().st_size))


@pytest.mark.parametrize("loss", [emptied, removed, zeroed])
def test_lost_snapshots_cost_the_averages_and_not_the_training_state(
    training: Training, loss: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    training.save(3)
    training.save(3)
    before = training.state()
    loss(training.store.folder)
    with pytest.raises(
        CheckpointError,
        match=r"none of its 2 checkpoints can be used as it is; the training state of step 6 is there, but its averages "
        r"sigma_rel_0\.05, sigma_rel_0\.1 are not \(.*snapshots/step-00000006/.*train\.lost_averages=drop",
    ) as raised:
        training.resume()
    assert "delete" not in str(raised.value)
    training.move()
    with caplog.at_level(logging.WARNING):
        found = resume(training.store, training.engine, training.ema, IDENTITY, drop=True)
    assert found is not None
    assert found.step == 6
    assert "step 6 goes on without the averages sigma_rel_0.05, sigma_rel_0.1" in caplog.text
    assert list(training.ema.values) == ["ema", "half_life_40"]
    assert same({k: v for k, v in before.items() if not k.startswith("sigma_rel")}, training.state())
    training._begin(6)
    training.save()
    with pytest.raises(CheckpointError, match=r"sigma_rel_0\.05 was not kept up to step 7"):
        Training(training.engine, training.store).resume()
    again = Training(training.engine, training.store)
    found = resume(again.store, again.engine, again.ema, IDENTITY, drop=True)
    assert (found and found.step, list(again.ema.values)) == (7, ["ema", "half_life_40"])


def test_preflight_finds_lost_averages(training: Training) -> None:
    training.save()
    training.save()
    emptied(training.store.folder)
    names = [p.name for p in training.ema.profiles]
    with pytest.raises(CheckpointError, match=r"train\.lost_averages=drop"):
        next(search.candidates(training.store, names))
    assert next(search.candidates(training.store, names, drop=True)).step == 2
    assert next(search.candidates(training.store, ["ema"])).step == 2


def test_an_average_that_is_not_kept_any_more_may_be_lost(training: Training) -> None:
    training.save()
    emptied(training.store.folder)
    few = Training(training.engine, training.store, dataclasses.replace(TRAIN, ema_sigma_rel=[]))
    assert few.resume() == 1


def test_weights_are_read_although_other_averages_are_lost(training: Training) -> None:
    training.save()
    ema = averages.average(training.store, search.find(training.store), "ema")
    emptied(training.store.folder)
    found = search.find(training.store)
    assert same(averages.average(training.store, found, "ema"), ema)
    assert found.averages == ["ema", "half_life_40"]
    assert "sigma_rel_0.1" in search.describe(training.store)["lost"]


@pytest.mark.parametrize("damage", [truncated, flipped, missing])
def test_one_lost_snapshot_goes_back_to_the_checkpoint_that_has_all_averages(
    training: Training, damage: Callable[[Path, Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    training.save()
    before = training.state()
    training.save()
    folder = training.store.folder / "snapshots/step-00000002"
    damage(rank_file(folder), folder)
    with caplog.at_level(logging.WARNING):
        assert training.resume() == 1
    assert same(before, training.state())
    assert re.search(
        r"the training state of step 2 is there, but its averages .*sigma_rel_0\.1 are not \(.*; trying the", caplog.text
    )


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "shape bomb": lambda m: m["shapes"].update({"0.weight": [2**31, 2**31]}),
    "shape of nothing": lambda m: m["shapes"].update({"bomb": [2**20, 2**20]}),
    "negative shape": lambda m: m["shapes"].update({"0.weight": [-5, -3]}),
    "negative offset": lambda m: m["files"][0]["pieces"][0].__setitem__(2, -1),
    "negative begin": lambda m: m["files"][0]["pieces"][0].__setitem__(4, -8),
    "fraction": lambda m: m["files"][0]["pieces"][0].__setitem__(3, 1.5),
    "one byte twice": lambda m: m["files"][0]["pieces"].append(["bomb", *m["files"][0]["pieces"][0][1:]]),
    "infinite step": lambda m: m.update(step=float("inf")),
    "huge step": lambda m: m.update(step=10**30),
    "negative step": lambda m: m.update(step=-1),
    "a step in words": lambda m: m.update(step="3"),
    "no ranks": lambda m: m.update(world_size=0),
    "deep": lambda m: m.update(identity=json.loads("[" * 500 + "]" * 500)),
    "files as text": lambda m: m.update(files="abc"),
    "a key of another place": lambda m: m["files"][0].update(key="checkpoints//../../x"),
    "a number for a kind": lambda m: m["files"][0]["pieces"][0].__setitem__(0, ["exp_avg"]),
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_manifest_is_one_sentence_and_allocates_nothing(
    training: Training, change: Callable[[dict[str, Any]], object]
) -> None:
    training.save()
    key = "checkpoints/step-00000001/manifest.json"
    manifest = json.loads(training.store.get(key))
    del manifest["sha256"]
    change(manifest)
    training.store.put(key, checksummed(manifest))
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as raised:
            load(training.store, read_manifest(training.store, key), "master")
        assert tracemalloc.get_traced_memory()[1] < 5 * 2**20
    finally:
        tracemalloc.stop()
    assert "step-00000001/manifest.json: " in str(raised.value)
    assert str(raised.value).endswith("restore it from a copy")
    with pytest.raises(CheckpointError):
        training.resume()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": 1, "format": 1}', '{"format": NaN}', "9" * 5000])
def test_a_hostile_text_for_a_manifest_is_one_sentence(training: Training, text: str) -> None:
    training.store.put("checkpoints/step-00000001/manifest.json", text.encode())
    with pytest.raises(CheckpointError, match="damaged checkpoint manifest"):
        read_manifest(training.store, "checkpoints/step-00000001/manifest.json")


def test_a_manifest_of_any_size_is_not_read(training: Training) -> None:
    path = training.store.folder / "checkpoints/step-00000001/manifest.json"
    path.parent.mkdir(parents=True)
    with open(path, "wb") as file:
        file.truncate(2**40)  # a hole
    with pytest.raises(CheckpointError, match=r"it has 1,099,511,627,776 bytes"):
        read_manifest(training.store, "checkpoints/step-00000001/manifest.json")


def test_a_note_of_a_rank_that_is_damaged_makes_no_checkpoint(engine: Engine, tmp_path: Path) -> None:
    class Flipping(FolderStore):
        def put(self, key: str, data: bytes) -> str:
            return super().put(key, data.replace(b"ema", b"emb") if "rank-00000" in key and key.endswith(".json") else data)

    training = Training(engine, Flipping(tmp_path))
    training.move()
    training.writer.start(1, [])
    with pytest.raises(StoreError, match=r"step 1 could not be saved: .*is not what rank 0 wrote"):
        training.writer.finish()
    assert training.resume() == 0


@pytest.mark.parametrize("claim", [b"\x1b[2J\xff", b"", bytes(10**6)])
def test_a_damaged_claim_is_one_sentence(training: Training, claim: bytes) -> None:
    training.save()
    training.store.put("writer.txt", claim)
    training.move()
    training.writer.start(2, [])
    with pytest.raises(CheckpointError, match=r"writer.txt: is damaged \(.*see that none has and start again") as raised:
        training.writer.finish()
    assert str(raised.value).isprintable()
    assert len(str(raised.value)) < 400
    assert training.resume() == 1


def test_an_unknown_format_is_named(training: Training) -> None:
    training.save()
    edited(lambda content: content.update(format=99))(Path(), training.store.folder / "checkpoints/step-00000001/manifest.json")
    with pytest.raises(CheckpointError, match="format 99"):
        read_manifest(training.store, "checkpoints/step-00000001/manifest.json")


def test_a_manifest_without_a_checksum_is_readable(training: Training) -> None:
    training.save()
    before = training.state()
    edited(lambda content: None, summed=False)(Path(), training.store.folder / "checkpoints/step-00000001/manifest.json")
    training.move()
    assert training.resume() == 1
    assert same(before, training.state())


# --- another run ---


def test_another_identity_is_refused_by_name(training: Training) -> None:
    training.save()
    before = training.state()
    with pytest.raises(CheckpointError, match=r"seed=0, now it is 1"):
        resume(training.store, training.engine, training.ema, IDENTITY | {"seed": 1})
    assert same(before, training.state())


def test_data_that_lost_or_found_the_names_of_their_classes_are_the_same(training: Training) -> None:
    training.save()
    found = search.find(training.store)

    def checked(then: dict[str, str], now: dict[str, str]) -> None:
        search.check_identity(training.store, dataclasses.replace(found, identity=then), now)

    named, bare, other = ({"data.fingerprint": fingerprint, "data.content": content} for fingerprint, content in ("nc", "cc", "od"))
    for then, now in ((named, bare), (bare, named), ({"data.fingerprint": "c"}, named), ({"data.fingerprint": "n"}, named)):
        checked(then, now)
    for then, now in ((named, other), (other, bare), ({"data.fingerprint": "n"}, bare)):
        with pytest.raises(CheckpointError, match=r"started with data\.fingerprint=\w, now it is \w; put it back"):
            checked(then, now)


def test_another_decay_of_the_average_is_refused_by_name(training: Training, tiny: Callable[..., Path]) -> None:
    def identity(decay: float) -> dict[str, Any]:
        config = load_config(tiny("decay", train={"ema_decay": decay}))
        manifest = load_manifest(open_store(config.data.uri))
        return run_identity(config, manifest, choose_order(manifest, config.train.global_batch, config.seed))

    training.save()
    found = dataclasses.replace(search.find(training.store), identity=identity(0.9))
    search.check_identity(training.store, found, identity(0.9))
    with pytest.raises(CheckpointError, match=r"train\.ema_decay=0\.9, now it is 0\.99; put it back or name another run=URI"):
        search.check_identity(training.store, found, identity(0.99))


def test_a_run_from_before_its_decay_was_recorded_goes_on(training: Training) -> None:
    training.save()
    assert resume(training.store, training.engine, training.ema, IDENTITY | {"train.ema_decay": 0.9}) is not None


def test_a_run_keeps_the_rounds_of_its_order(engine: Engine, tiny: Callable[..., Path]) -> None:
    config = load_config(tiny("rounds", train={"zero_stage": 0, "precision": "fp32"}))
    store = open_store(config.run)

    def assembled(save: int = 0) -> tuple[int, Any, int]:
        run, start = loop.assemble(config)
        with run.reader, closing(run.telemetry):
            if save:
                run.writer.claim()
                run.writer.start(save, [])
                run.writer.finish()
            return start, run.identity["order.rounds"], run.reader.order.rounds

    assert assembled(save=1) == (0, 8, 8)
    assert assembled() == (1, 8, 8)
    (key,) = search.manifests(store)
    old = json.loads(store.get(key))
    del old["sha256"], old["identity"]["order.rounds"]
    store.put(key, checksummed(old))
    loop.preflight(config)
    assert assembled(save=2) == (1, 4, 4)
    assert search.find(store, 2).identity["order.rounds"] == 4
    assert assembled() == (2, 4, 4)


def test_another_network_is_refused_by_the_name_of_its_parameter(training: Training) -> None:
    training.save()
    other = copy.copy(training.engine)
    other.shapes = training.engine.shapes | {"1.weight": (2, 6)}
    with pytest.raises(CheckpointError, match=r"1\.weight has shape \(2, 5\) in the checkpoint and \(2, 6\)"):
        resume(training.store, other, training.ema, IDENTITY)


def test_an_average_cannot_begin_in_the_middle_of_a_run_but_one_may_end(engine: Engine, tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    few = Training(engine, store, TrainConfig(precision="fp32", zero_stage=0, global_batch=4))
    few.save()
    with pytest.raises(CheckpointError, match=r"half_life_40 was not kept up to step 1"):
        Training(engine, store).resume()
    many = Training(engine, FolderStore(tmp_path / "many"))
    many.save()
    few.store = many.store
    assert few.resume() == 1


# --- interruption ---


class FailingStore(FolderStore):
    """A folder whose k-th put fails, and every later one: a disk that is full, a store that is gone, a process that is killed."""

    def __init__(self, folder: Path, fails_at: int) -> None:
        super().__init__(folder)
        self.puts, self.fails_at = 0, fails_at

    def put(self, key: str, data: bytes) -> str:
        self.puts += 1
        if self.puts >= self.fails_at:
            raise StoreError(f"{key}: no more")
        return super().put(key, data)


@pytest.mark.parametrize("k", range(2, 7))
def test_a_save_interrupted_at_any_put_leaves_the_checkpoint_before_it(engine: Engine, tmp_path: Path, k: int) -> None:
    # After the claim on the run: two files, a note, two manifests.
    whole = Training(engine, FolderStore(tmp_path))
    whole.save()
    before = whole.state()
    broken = Training(engine, FailingStore(tmp_path, k))
    broken.step = 1
    broken.move()
    broken.writer.start(2, [])
    with pytest.raises(StoreError, match=r"the checkpoint of step 2 could not be saved: .*no more"):
        broken.writer.finish()
    assert whole.resume() == 1
    assert same(before, whole.state())
    whole.save()
    assert whole.resume() == 2


def test_a_claim_and_five_puts_make_a_checkpoint(engine: Engine, tmp_path: Path) -> None:
    store = FailingStore(tmp_path, 99)
    Training(engine, store).save()
    assert store.puts == 6


def test_a_full_disk_while_saving_leaves_the_checkpoint_before_it(training: Training) -> None:
    training.save()
    before = training.state()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    training.move()
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, hard))  # write(2) fails in the middle of the file
    try:
        training.writer.start(2, [])
        with pytest.raises(StoreError, match="step 2 could not be saved"):
            training.writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert training.resume() == 1
    assert same(before, training.state())


def test_a_disk_without_room_for_a_checkpoint_is_named_before_the_first_step(training: Training, tmp_path: Path) -> None:
    training.save()
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        with pytest.raises(UserError, match=r"small/run: its disk has 0\.0 MiB of room, and a checkpoint of this run takes"):
            Training(training.engine, FolderStore(small / "run"))
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


# --- two trainings on one run ---

TAKEN = r"another training .*process \d+ on .* has taken over this run; stop one of the two, or name another run=URI"


def test_a_training_whose_run_another_has_taken_over_ends_and_leaves_the_others_checkpoints_whole(
    training: Training,
) -> None:
    training.save()
    other = Training(training.engine, training.store)
    assert other.resume() == 1
    other.save()
    saved = other.state()
    training.move()
    training.writer.start(training.step, [])
    with pytest.raises(CheckpointError, match=TAKEN):
        training.writer.finish()
    with pytest.raises(CheckpointError, match=TAKEN):
        training.writer.discard(after=1)
    other.move()
    assert other.resume() == 2
    assert same(saved, other.state())


def test_files_that_two_trainings_save_at_one_step_do_not_mix(training: Training) -> None:
    """Both upload before either publishes: the one that has the run publishes its own, and deletes what the other left."""
    training.save()
    other = Training(training.engine, training.store)
    assert other.resume() == 1
    for each in (other, training):
        each.move()
        each.writer.start(2, [])
        each.writer._join()
        if each is other:
            saved = other.state()
    other.writer.finish()
    with pytest.raises(CheckpointError, match=TAKEN):
        training.writer.finish()
    folder = training.store.folder / "checkpoints/step-00000002"
    assert set(folder.iterdir()) == {folder / "manifest.json", rank_file(folder)}
    assert other.resume() == 2
    assert same(saved, other.state())


def test_a_training_that_is_taken_over_while_it_publishes_deletes_nothing(engine: Engine, tmp_path: Path) -> None:
    class TakenOver(FolderStore):
        """Another training claims the run as the third checkpoint comes to be."""

        def put(self, key: str, data: bytes) -> str:
            etag = super().put(key, data)
            if key == "checkpoints/step-00000003/manifest.json":
                super().put("writer.txt", b"another: process 1 on a node")
            return etag

    training = Training(engine, TakenOver(tmp_path))
    training.save()
    training.save()
    with pytest.raises(CheckpointError, match=TAKEN):
        training.save()
    assert [found.step for found in search.newest(training.store)] == [3, 2, 1]


def test_a_run_whose_claim_was_deleted_goes_on(training: Training) -> None:
    training.store.delete("writer.txt")
    training.save()
    assert search.find(training.store).step == 1


@torch.no_grad()
def test_the_same_training_writes_the_same_manifest(engine: Engine, tmp_path: Path) -> None:
    """Whoever wrote it and however often: the name of an evaluation's results follows from it."""
    begun = [(values, values.clone()) for kind in KINDS for f in engine.fragments for values in [engine.values(f, kind)]]
    manifests = []
    for run in ("1", "2"):
        for live, values in begun:
            live.copy_(values)
        training = Training(engine, FolderStore(tmp_path / run))
        training.save()
        manifests.append(search.find(training.store).sha256)
    assert manifests[0] == manifests[1]


@pytest.mark.slow
def test_all_ranks_of_a_training_whose_run_is_taken_over_end_with_the_sentence(
    tiny: Callable[..., Path], launch: Callable[..., Any]
) -> None:
    path = tiny("taken", train={"steps": 100_000, "checkpoint_every": 5})
    store = open_store(load_config(path).run)
    ended: list[Any] = []
    ranks = threading.Thread(target=lambda: ended.extend(launch(2, path, check=False)))
    ranks.start()
    while not search.describe(store)["checkpoints"]:
        assert ranks.is_alive()
        ranks.join(0.1)
    store.put("writer.txt", b"another: process 1 on a node")
    ranks.join()
    assert [re.search(TAKEN, rank.stdout) is not None and rank.returncode for rank in ended] == [1, 1], ended


# --- off the step ---


class SlowStore(FolderStore):
    """A folder whose puts wait while it is not open."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.open = threading.Event()
        self.open.set()

    def put(self, key: str, data: bytes) -> str:
        assert self.open.wait(60)
        return super().put(key, data)


def test_training_goes_on_while_a_checkpoint_of_its_past_is_written(engine: Engine, tmp_path: Path) -> None:
    store = SlowStore(tmp_path)
    training = Training(engine, store)
    store.open.clear()
    training.move()
    saved = training.state()
    training.writer.start(1, [])
    training.move()
    training.writer.boundary(0, failed=False)
    assert training.writer.uploaded == 0
    assert not list(tmp_path.rglob("*.safetensors"))
    store.open.set()
    training.writer.finish()
    assert training.resume() == 1
    assert same(saved, training.state())


def test_the_boundary_after_the_upload_publishes(training: Training) -> None:
    training.move()
    training.writer.start(1, [])
    training.writer._join()
    assert training.writer.uploaded == 1
    assert search.manifests(training.store) == []
    training.writer.boundary(1, failed=False)
    training.writer._join()
    assert search.find(training.store).step == 1


def test_a_failed_save_is_reported_at_the_next_boundary(engine: Engine, tmp_path: Path) -> None:
    training = Training(engine, FailingStore(tmp_path, 2))
    training.move()
    training.writer.start(1, [])
    training.writer._join()
    assert training.writer.error
    with pytest.raises(StoreError, match=r"step 1 could not be saved: .*no more"):
        training.writer.boundary(0, failed=True)


# --- what stays ---


def test_the_newest_and_every_nth_checkpoint_stay(engine: Engine, tmp_path: Path) -> None:
    train = copy.copy(TRAIN)
    train.keep_every = 4
    training = Training(engine, FolderStore(tmp_path), train)
    for _ in range(9):
        training.save()
    assert sorted(c.step for c in search.newest(training.store)) == [4, 8, 9]
    for step in (4, 8, 9):
        folder = tmp_path / f"checkpoints/step-{step:08d}"
        assert set(folder.iterdir()) == {folder / "manifest.json", rank_file(folder)}


def test_checkpoints_saved_on_notice_displace_no_regular_one(engine: Engine, tmp_path: Path) -> None:
    train = copy.copy(TRAIN)
    train.checkpoint_every = 3
    training = Training(engine, FolderStore(tmp_path), train)
    for _ in range(5):
        training.save()
    training.save(3)
    assert [c.step for c in search.newest(training.store)] == [8, 5, 3]
    found = resume(training.store, training.engine, training.ema, IDENTITY, before=8, every=3)
    assert found is not None
    assert found.step == 3


def test_what_interrupted_saves_left_behind_is_swept_by_the_next(training: Training) -> None:
    training.save()
    before = {info.key for info in training.store.list()}
    for kind in ("checkpoints", "snapshots"):
        for step in (2, 3, 4):
            training.store.put(f"{kind}/step-{step:08d}/rank-00007.safetensors", b"left behind")
    training.store.put("checkpoints/notes.txt", b"a user's own")
    training.save(2)
    after = {info.key for info in training.store.list()} - before
    assert "checkpoints/notes.txt" in after
    assert not [key for key in after if "step-00000002" in key]
    assert sorted(key for key in after if "rank-00007" in key) == [  # their step may still come
        "checkpoints/step-00000004/rank-00007.safetensors",
        "snapshots/step-00000004/rank-00007.safetensors",
    ]


KILLED = """
import os, signal, sys
from pathlib import Path
from freeguide.data_pipeline.store.folder import FolderStore
store = FolderStore(Path(sys.argv[1]))
sync = os.fsync
os.fsync = lambda file: os.kill(os.getpid(), signal.SIGKILL) if os.fstat(file).st_size > 99 else sync(file)
store.put(sys.argv[2], bytes(100_000))
"""


def test_a_training_that_starts_sweeps_what_killed_ones_have_left_behind(training: Training) -> None:
    """Files that no manifest names, whatever their step, and unfinished ones; nothing that is whole or somebody else's."""
    training.save(2)
    training.save(2)
    store = training.store
    before = {path for path in store.folder.rglob("*") if path.is_file()}
    for step in (3, 4, 9):
        for kind in ("checkpoints", "snapshots"):
            store.put(f"{kind}/step-{step:08d}/rank-00000-0123456789ab.safetensors", bytes(10))
    store.put("checkpoints/step-00000009/rank-00000-0123abcd.json", b"{}")
    killed = "checkpoints/step-00000009/rank-00001-0123456789ab.safetensors"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(store.folder), killed], cwd=ROOT, timeout=60)
    assert ended.returncode == -9
    assert len(list(store.folder.rglob(".tmp-*"))) == 1
    store.put("checkpoints/step-00000008/rank-00000-0123456789ab.safetensors", bytes(10))
    store.put("checkpoints/step-00000008/manifest.json.off", b"put aside")
    store.put("checkpoints/notes.txt", b"a user's own")
    aside = {store.folder / "checkpoints/notes.txt", *(store.folder / "checkpoints/step-00000008").iterdir()}
    assert training.resume() == 4
    assert {path for path in store.folder.rglob("*") if path.is_file()} == before | aside


def test_a_limit_on_checkpoints_holds_after_any_number_of_kills(engine: Engine, tmp_path: Path) -> None:
    """Killed right after a manifest, before anything is deleted, again and again."""
    store = Undeletable(tmp_path)
    training = Training(engine, store)
    for _ in range(6):
        store.allowed = 1  # a note
        training.save()
        training.resume()
    store.allowed = 999
    training.resume()
    training.save()
    assert [found.step for found in search.newest(store)] == [7, 6]
    assert len(store.list("checkpoints/")) == 4
    assert len(store.list("snapshots/")) == 14


def test_damaged_checkpoints_of_later_steps_cost_no_good_one_and_stay_until_their_step_is_passed(
    engine: Engine, tmp_path: Path
) -> None:
    many, store = copy.copy(TRAIN), FolderStore(tmp_path)
    many.keep_checkpoints = 3
    before = Training(engine, store, many)
    for step in (90, 100, 110):
        before.save(step - before.step)
    for step in (100, 110):
        garbage(Path(), tmp_path / f"checkpoints/step-{step:08d}/manifest.json")
    training = Training(engine, store)  # keeps two
    assert training.resume() == 90

    def standing() -> tuple[list[int], int]:
        state = search.describe(store)
        return state["checkpoints"], len(state["damaged"])

    training.save(5)
    assert standing() == ([90, 95], 2)
    training.save(10)
    assert standing() == ([95, 105], 1)
    assert not store.list("checkpoints/step-00000100/")
    training.save(5)
    assert standing() == ([105, 110], 0)


class Undeletable(FolderStore):
    """A store that lets no more than `allowed` objects be deleted."""

    allowed = 0

    def delete(self, key: str) -> None:
        if not self.allowed:
            raise StoreError(f"{key}: may not be deleted")
        self.allowed -= 1
        super().delete(key)


def test_old_checkpoints_that_cannot_be_deleted_are_a_warning_and_go_with_the_next_save(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = Undeletable(tmp_path)
    training = Training(engine, store)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            training.save()
    assert "may not be deleted" in caplog.text
    assert "the next save" in caplog.text
    assert [found.step for found in search.newest(store)] == [3, 2, 1]
    store.allowed = 99
    training.save()
    assert [found.step for found in search.newest(store)] == [4, 3]
    assert {path.parent.name for path in (tmp_path / "checkpoints").rglob("*.*")} == {"step-00000003", "step-00000004"}
    assert not list(tmp_path.rglob("rank-*.json"))


def test_describe_tells_where_a_run_stands(training: Training) -> None:
    assert search.describe(training.store) == {"run": training.store.uri, "checkpoints": [], "damaged": []}
    for _ in range(3):
        training.save()
    garbage(Path(), training.store.folder / "checkpoints/step-00000003/manifest.json")
    state = search.describe(training.store)
    assert (state["checkpoints"], state["step"], state["world_size"], state["zero_stage"]) == ([2], 2, 1, 0)
    assert "step-00000003" in state["damaged"][0]
    assert state["averages"] == ["ema", "half_life_40", "sigma_rel_0.05", "sigma_rel_0.1"]
    assert (state["snapshots"], state["identity"]) == (3, IDENTITY)


@pytest.mark.parametrize("k", range(4))
def test_deleting_that_is_interrupted_leaves_no_damaged_checkpoint(engine: Engine, tmp_path: Path, k: int) -> None:
    store = Undeletable(tmp_path)
    training = Training(engine, store)
    store.allowed = 2
    training.save()
    training.save()
    store.allowed = k  # of a manifest, a file and a note
    training.save()
    state = search.describe(store)
    assert (state["checkpoints"], state["damaged"]) == ([2, 3] if k else [1, 2, 3], [])


class Outrun(FolderStore):
    """A store in which the run's training deletes the checkpoint of step 2 as `call` of its manifest, or of its files, begins."""

    call = ""

    def _lose(self, call: str, key: str) -> None:
        if call == self.call and "step-00000002" in key:
            for path in sorted((self.folder / "checkpoints/step-00000002").iterdir()):  # the manifest first, as a training does
                path.unlink()

    def get(self, key: str, *most: int) -> bytes:
        self._lose("get", key)
        return super().get(key, *most)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        self._lose("list", prefix)
        return super().list(prefix)

    def get_range(self, key: str, *where: Any, **options: Any) -> bytes:
        self._lose("get_range", key)
        return super().get_range(key, *where, **options)


@pytest.fixture
def outrun(training: Training) -> Outrun:
    for _ in range(3):
        training.save()
    return Outrun(training.store.folder)


@pytest.mark.parametrize("call", ["get", "list"])
def test_a_checkpoint_that_the_training_deletes_while_it_is_looked_at_is_no_damage(
    outrun: Outrun, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Another process reads a run that goes on: `inspect`, or `evaluate` at its newest checkpoint."""
    outrun.call = call
    with caplog.at_level(logging.WARNING):
        assert [found.step for found in search.newest(outrun)] == [3]
    assert not caplog.records


@pytest.mark.parametrize("call", ["get", "list"])
def test_describe_passes_over_a_checkpoint_that_the_training_deletes(outrun: Outrun, call: str) -> None:
    outrun.call = call
    state = search.describe(outrun)
    assert (state["checkpoints"], state["damaged"]) == ([3], [])


def test_weights_that_the_training_deletes_while_they_are_read_say_so(outrun: Outrun) -> None:
    found = search.find(outrun, 2)
    outrun.call = "get_range"
    with pytest.raises(CheckpointError, match=r"step-00000002/manifest.json: deleted while it was read.*train.keep_every"):
        load(outrun, found)


def test_a_step_without_a_checkpoint_is_refused_with_those_there_are(outrun: Outrun) -> None:
    with pytest.raises(CheckpointError, match=r"no whole checkpoint of step 1, only of 2, 3; .*train.keep_every"):
        search.find(outrun, 1)


class Replaced(FolderStore):
    """A store in which, as the manifest of step 1 is read, a training that keeps one checkpoint saves step 2 and deletes step 1."""

    def get(self, key: str, *most: int) -> bytes:
        if key == "checkpoints/step-00000001/manifest.json" and (aside := self.folder / "aside").exists():
            aside.rename(self.folder / "checkpoints/step-00000002")
            shutil.rmtree(self.folder / "checkpoints/step-00000001")
        return super().get(key, *most)


@pytest.fixture
def replaced(training: Training) -> Replaced:
    for _ in range(2):
        training.save()
    folder = training.store.folder
    (folder / "checkpoints/step-00000002").rename(folder / "aside")
    return Replaced(folder)


@pytest.mark.parametrize("read", [search.find, lambda store: next(search.candidates(store))])
def test_a_newer_checkpoint_is_found_where_all_that_were_listed_have_gone(
    replaced: Replaced, read: Callable[[FolderStore], Checkpoint]
) -> None:
    assert read(replaced).step == 2


def test_describe_tells_of_the_newer_checkpoint_where_all_that_were_listed_have_gone(replaced: Replaced) -> None:
    state = search.describe(replaced)
    assert (state["checkpoints"], state["step"], state["damaged"]) == ([2], 2, [])


class Stale(FolderStore):
    """A store whose every listing names one more manifest, `names` at most, and none of them can be read."""

    listed, names = 0, 10**6

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        self.listed += 1
        steps = range(1, min(self.listed, self.names) + 1)
        return [ObjectInfo(f"{prefix}step-{step:08d}/manifest.json", 1, "") for step in steps]


def test_a_reader_that_is_outrun_again_and_again_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"deleted before they could be read.*train.keep_checkpoints"):
        search.find(Stale(tmp_path))


def test_a_listing_that_names_what_has_long_gone_is_no_checkpoint(tmp_path: Path) -> None:
    store = Stale(tmp_path)
    store.names = 1
    assert search.describe(store)["checkpoints"] == []


# --- averages after training ---


def test_any_power_function_average_follows_from_the_snapshots(training: Training) -> None:
    """Against the average itself, computed step by step in float64; the checkpoints of most snapshots are long gone."""
    wanted = profiles(TrainConfig(ema_sigma_rel=[0.07]))[1]
    exact = np.zeros(15)
    for _ in range(40):
        for _ in range(5):
            training.move()
            weights = training.engine.values(training.engine.fragments[0], "master").double().numpy()
            exact += (1 - wanted.kept(training.step)) * (weights - exact)
        training.writer.start(training.step, [])
        training.writer.finish()
    found = search.find(training.store)
    got = averages.average(training.store, found, "sigma_rel_0.07")["0.weight"].view(-1).double().numpy()
    stored = averages.average(training.store, found, "sigma_rel_0.1")["0.weight"].view(-1).double().numpy()
    error = np.abs(got - exact).max() / np.abs(stored - exact).max()
    assert error < 1e-3, error  # of the distance to its neighbour: what is left are the 200 steps, where profiles are continuous


def many_snapshots(training: Training) -> Checkpoint:
    for _ in range(12):
        training.save(10)
    return search.find(training.store)


def whole_step(folder: Path) -> None:
    shutil.rmtree(folder)


def its_file(folder: Path) -> None:
    rank_file(folder).unlink()


def its_manifest(folder: Path) -> None:
    garbage(folder, folder / "manifest.json")


def its_last_byte(folder: Path) -> None:
    flipped(rank_file(folder), folder)


def another_ones(folder: Path) -> None:
    """The snapshot of another step under this one's name."""
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-00000020"), folder)


@pytest.mark.parametrize("loss", [whole_step, its_file, its_manifest, its_last_byte, another_ones])
def test_a_lost_snapshot_is_named_with_what_it_costs_and_takes_an_option_to_go_on(
    training: Training, loss: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    found = many_snapshots(training)
    name = "sigma_rel_0.2"
    with_all = averages.recipe(training.store, found, name)
    assert len(with_all.of) == 13
    for step in (40, 50, 60):
        loss(training.store.folder / f"snapshots/step-{step:08d}")
    said = (
        r"sigma_rel_0\.2 of step 120 needs 12 snapshots, and those of steps 40, 50, 60 are lost \(.*; made of the rest, its profile"
    )
    with pytest.raises(CheckpointError, match=said) as raised:
        averages.average(training.store, found, name)
    assert "sampling.lost_snapshots=true" in str(raised.value)
    assert f"instead of {with_all.distance:.1e}" in str(raised.value)
    with caplog.at_level(logging.WARNING):
        made = averages.recipe(training.store, found, name, lost=True)
    assert made.distance > 3 * with_all.distance
    assert f"would be {made.distance:.1e} of itself away" in str(raised.value)
    assert f"without the lost snapshots of steps 40, 50, 60, its profile met to {made.distance:.1e}" in caplog.text
    assert len(made.of) == 10
    assert set(made.of) < set(with_all.of)
    weights = averages.average(training.store, found, name, lost=True)
    assert all(torch.isfinite(values).all() for values in weights.values())


def test_a_stored_power_average_that_is_lost_is_made_of_others_only_if_that_is_asked_for(training: Training) -> None:
    found = many_snapshots(training)
    its_last_byte(training.store.folder / "snapshots/step-00000120")
    with pytest.raises(CheckpointError, match=r"sigma_rel_0\.1 of step 120 needs 12 snapshots, and those of steps 120 are lost"):
        averages.average(training.store, found, "sigma_rel_0.1")
    assert averages.recipe(training.store, found, "sigma_rel_0.1", lost=True).distance > 0
    emptied(training.store.folder)
    with pytest.raises(CheckpointError, match=r"nothing is left to make it of: restore them from a copy$"):
        averages.average(training.store, search.find(training.store), "sigma_rel_0.1", lost=True)


def test_a_resumed_run_knows_the_snapshots_of_its_past_and_an_undone_one_is_none_of_them(training: Training) -> None:
    for _ in range(3):
        training.save()
    training.resume()
    training.writer = Writer(
        training.store, training.engine, training.ema, IDENTITY, TRAIN, 3, search.find(training.store).snapshots
    )
    training.writer.claim()
    training.save()
    assert search.find(training.store).snapshots == (1, 2, 3, 4)
    training.writer.discard(after=3)
    training.save()
    assert search.find(training.store).snapshots == (1, 2, 3, 5)


def test_snapshots_of_checkpoints_that_do_not_list_them_are_those_that_are_there(training: Training) -> None:
    found = many_snapshots(training)
    old = json.loads(training.store.get(found.key))
    del old["sha256"], old["snapshots"]
    training.store.put(found.key, checksummed(old))
    found = search.find(training.store)
    assert found.snapshots is None
    assert len(averages.recipe(training.store, found, "sigma_rel_0.2").of) == 13
    assert training.resume() == 120
    training.save()
    assert search.find(training.store).snapshots == (*range(10, 121, 10), 121)


def test_an_average_that_was_not_kept_is_refused_with_those_that_were(training: Training) -> None:
    training.save()
    with pytest.raises(CheckpointError, match=r"no average half_life_7; .* ema, half_life_40, .*master"):
        averages.average(training.store, search.find(training.store), "half_life_7")
