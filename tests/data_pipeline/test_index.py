"""Tests of index.py: foreign tars get a manifest and train; broken ones are named."""

import tarfile
from pathlib import Path

import numpy as np
import pytest

from configs.errors import DataError
from data_pipeline.index import expand, index_shards
from data_pipeline.manifest import Schema, load_manifest
from data_pipeline.order import Order
from data_pipeline.shards import write_shards
from data_pipeline.store import Store, open_store
from data_pipeline.stream import Reader
from tests.data_pipeline.conftest import data_config, item_of, noise_source
from tests.data_pipeline.tars import make_tar, pairs, special_tar

SCHEMA = Schema(8, 3, 10)


@pytest.mark.parametrize(
    ("pattern", "keys"),
    [
        ("a.tar", ["a.tar"]),
        ("s-{008..011}.tar", ["s-008.tar", "s-009.tar", "s-010.tar", "s-011.tar"]),
        ("{a,b}/{0..1}.tar", ["a/0.tar", "a/1.tar", "b/0.tar", "b/1.tar"]),
    ],
)
def test_brace_notation(pattern: str, keys: list[str]) -> None:
    assert expand(pattern) == keys


def test_brace_notation_is_webdatasets() -> None:
    from webdataset.shardlists import expand_urls

    for pattern in ("s-{000098..000102}.tar", "{train,val}-{0..9}.tar", "x{a,b,c}y.tar"):
        assert expand(pattern) == expand_urls(pattern)


@pytest.mark.parametrize("pattern", ["a-{0..5.tar", "a-}0{.tar", "a-{5..0}.tar", "a-{0..99999999999}.tar"])
def test_malformed_braces_are_refused(pattern: str) -> None:
    with pytest.raises(DataError, match="write"):
        expand(pattern)


def test_our_own_shards_get_the_same_manifest_again(store: Store) -> None:
    written = write_shards(noise_source(40), store, shard_samples=10)
    store.delete("manifest.json")
    indexed, broken = index_shards(store, written.schema)
    assert indexed.fingerprint == written.fingerprint
    assert broken == []
    assert load_manifest(store).fingerprint == written.fingerprint


def foreign(store: Store) -> dict[str, bytes]:
    """Five tars of ten samples, in three dialects, with equal keys in two of them."""
    tars = {
        "x/a-0.tar": make_tar(pairs(range(10)), tarfile.PAX_FORMAT, mtime=1.5),
        "x/a-1.tar": make_tar([(f"deep/{'n' * 120}{name}", data) for name, data in pairs(range(10, 20))], tarfile.GNU_FORMAT),
        "x/a-2.tar": make_tar(pairs(range(20, 30))),
        "x/a-3.tar": make_tar([(f"0{index // 2}.{name[-3:]}", data) for index, (name, data) in enumerate(pairs(range(30, 40)))]),
        "x/a-4.tar": make_tar([(f"0{index // 2}.{name[-3:]}", data) for index, (name, data) in enumerate(pairs(range(40, 50)))]),
    }
    for key, data in tars.items():
        store.put(key, data)
    return tars


def epoch(store: Store, **options: object) -> tuple[list[int], list[int], dict[str, object]]:
    """Item numbers and labels of one epoch, and the reader's statistics."""
    manifest = load_manifest(store)
    order = Order.choose(manifest, 10, seed=0)
    place = {"global_batch": 10, "rank": 0, "world_size": 1, "start_step": 0}
    with Reader(store, manifest, order, **place, data=data_config(decode_threads=0, **options)) as reader:  # type: ignore[arg-type]
        batches = [next(reader) for _ in range(manifest.samples // 10)]
        stats = reader.stats()
    images = np.concatenate([((batch.images.numpy() + 1) * 127.5).round().transpose(0, 2, 3, 1) for batch in batches])
    return item_of(images).tolist(), [int(label) for batch in batches for label in batch.labels], stats


def test_foreign_tars_of_every_dialect_train(store: Store) -> None:
    foreign(store)
    progress: list[tuple[int, int]] = []
    manifest, broken = index_shards(store, SCHEMA, "x/a-{0..4}.tar", progress=lambda *at: progress.append(at))
    assert (manifest.samples, broken) == (50, [])
    assert progress == [(n, 5) for n in range(1, 6)]
    items, labels, _ = epoch(store)
    assert sorted(items) == list(range(50))
    assert labels == [item % 10 for item in items]  # the image and the label of one sample, equal keys or not


def test_a_missing_tar_of_the_pattern_is_named(store: Store) -> None:
    foreign(store)
    with pytest.raises(DataError, match=r"1 of 6 tars are missing .* first x/a-5\.tar"):
        index_shards(store, SCHEMA, "x/a-{0..5}.tar")


def test_no_tars_at_all(store: Store) -> None:
    with pytest.raises(DataError, match="no tars"):
        index_shards(store, SCHEMA)


BROKEN = {
    "cut in a header": lambda data: data[: 512 * 30 + 7],
    "cut between members": lambda data: data[: data.index(b"000024.png")],
    "zeroed header": lambda data: data[: data.index(b"000024.cls")] + bytes(512) + data[data.index(b"000024.cls") + 512 :],
    "links": lambda data: special_tar(tarfile.SYMTYPE),
    "climbing names": lambda data: make_tar([("../../x.png", b"1")]),
    "another codec": lambda data: make_tar([("a.cls", b"1"), ("a.png", b"GIF89a" + bytes(50))]),
    "no labels": lambda data: make_tar([("a.png", pairs([1])[1][1])]),
    "labels over the classes": lambda data: make_tar([("a.cls", b"10"), ("a.png", pairs([1])[1][1])]),
    "nothing": lambda data: make_tar([]),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_broken_tars_are_named_and_nothing_of_them_is_used(tmp_path: Path, damage: str) -> None:
    store = open_store(str(tmp_path))
    tars = foreign(store)
    store.put("x/a-2.tar", BROKEN[damage](tars["x/a-2.tar"]))
    with pytest.raises(DataError, match=r"1 of 5 tars .*x/a-2\.tar: (at byte \d+|the first sample)"):
        index_shards(store, SCHEMA)
    with pytest.raises(DataError, match="no manifest"):
        load_manifest(store)
    broken = index_shards(store, SCHEMA, skip_broken=True)[1]
    assert [item.key for item in broken] == ["x/a-2.tar"]
    items, labels, _ = epoch(store)
    assert sorted(items) == [*range(20), *range(30, 50)]
    assert labels == [item % 10 for item in items]


def test_an_index_that_was_cut_off_continues(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    foreign(store)
    original, reads = store.get, []

    def get(key: str) -> bytes:
        if key.endswith(".tar"):
            reads.append(key)
            if len(reads) == 4:
                raise KeyboardInterrupt
        return original(key)

    monkeypatch.setattr(store, "get", get)
    with pytest.raises(KeyboardInterrupt):
        index_shards(store, SCHEMA, threads=1)
    done = set(reads[:3])
    reads[:] = ["a", "b", "c", "d"]
    assert index_shards(store, SCHEMA, threads=1)[0].samples == 50
    assert not done & set(reads)
    assert not store.list("parts/")


# --------------------------------------------------------------------------------- damage after the index: donors and budgets


def damaged(tmp_path: Path, key: str, damage: object) -> Store:
    """Data that were whole when they were indexed; the size, and so the folder's etag, stays."""
    store = open_store(str(tmp_path))
    tars = foreign(store)
    index_shards(store, SCHEMA)
    data = damage(tars[key])  # type: ignore[operator]
    assert len(data) == len(tars[key])
    store.put(key, data)
    return store


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


DAMAGE = {
    "a bit of an image": lambda data: flip(data, data.index(b"000024.png") + 700),
    "a bit of a label": lambda data: flip(data, data.index(b"000024.cls") + 512),
    "a bit of a header": lambda data: flip(data, data.index(b"000024.png") + 3),
    "a zeroed header": lambda data: data[: (at := data.index(b"000024.cls"))] + bytes(512) + data[at + 512 :],
    "a member turned into a link": lambda data: data[: (at := data.index(b"000024.png")) + 156] + b"2" + data[at + 157 :],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_after_the_index_stops_with_shard_and_byte(tmp_path: Path, damage: str) -> None:
    store = damaged(tmp_path, "x/a-2.tar", DAMAGE[damage])
    with pytest.raises(
        DataError, match=r"Sample 4 of x/a-2\.tar \(chunk at byte \d+ of .*cannot be used .* raise data\.bad_samples"
    ):
        epoch(store)


@pytest.mark.parametrize("damage", DAMAGE)
def test_under_a_budget_donors_take_the_place_of_damaged_samples(tmp_path: Path, damage: str) -> None:
    store = damaged(tmp_path, "x/a-2.tar", DAMAGE[damage])
    items, labels, stats = epoch(store, bad_samples=0.02)
    whole = open_store(str(tmp_path / "whole"))
    foreign(whole)
    index_shards(whole, SCHEMA)
    expected, _, _ = epoch(whole)
    place = expected.index(24)
    manifest = load_manifest(store)
    order = Order.choose(manifest, 10, seed=0)
    assert items[:place] + items[place + 1 :] == expected[:place] + expected[place + 1 :]  # nothing else has moved
    position = next(p for p in range(50) if order.locate(np.array([p]))[1][0] == 24)
    assert items[place] == order.donor(position, 0)
    assert labels == [item % 10 for item in items]
    assert stats["bad_samples"] == {"checksum": 1}
    assert stats["donated"] == 1


def test_more_damage_than_the_budget_stops(tmp_path: Path) -> None:
    store = damaged(tmp_path, "x/a-2.tar", lambda data: data[:700] + bytes(4000) + data[4700:])
    with pytest.raises(DataError, match=r"x/a-2\.tar"):
        epoch(store, bad_samples=0.02)


def test_samples_that_were_bad_when_indexed_have_a_cause(tmp_path: Path) -> None:
    """The walk and the first sample of each tar were good, but one image is a GIF and one label is no number."""
    store = open_store(str(tmp_path))
    members = pairs(range(50))
    members[21] = (members[21][0], b"GIF89a" + bytes(40))
    members[40] = (members[40][0], b"cat")
    store.put("a.tar", make_tar(members))
    index_shards(store, SCHEMA)
    items, labels, stats = epoch(store, bad_samples=0.1)
    assert stats["bad_samples"] == {"codec": 1, "label": 1}
    assert len(items) == 50
    assert 10 not in items
    assert 20 not in items
    assert labels == [item % 10 for item in items]
    with pytest.raises(DataError, match=r"neither PNG, JPEG nor WebP|is not a number"):
        epoch(store)
