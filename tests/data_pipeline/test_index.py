"""Tests of index.py: foreign tars get a manifest and train; broken ones are named."""

import io
import itertools
import json
import tarfile
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from freeguide.configs.errors import DataError
from freeguide.data_pipeline import tar
from freeguide.data_pipeline.index import expand, index_shards
from freeguide.data_pipeline.manifest import Schema, ShardIndex, build_manifest
from freeguide.data_pipeline.order import choose_order
from freeguide.data_pipeline.scan import scan
from freeguide.data_pipeline.shards import write_shards
from freeguide.data_pipeline.sources.open import open_source
from freeguide.data_pipeline.store.base import Store
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stored import load_manifest, save_manifest
from freeguide.data_pipeline.stream import Reader
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
    order = choose_order(manifest, 10, seed=0)
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

    def get(key: str, *most: int) -> bytes:
        if key.endswith(".tar"):
            reads.append(key)
            if len(reads) == 4:
                raise KeyboardInterrupt
        return original(key, *most)

    monkeypatch.setattr(store, "get", get)
    with pytest.raises(KeyboardInterrupt):
        index_shards(store, SCHEMA, threads=1)
    done = set(reads[:3])
    reads[:] = ["a", "b", "c", "d"]
    assert index_shards(store, SCHEMA, threads=1)[0].samples == 50
    assert not done & set(reads)
    assert not store.list("parts/")


# ------------------------------------------------------------------------------------------------------ tars of other tools


def test_strays_are_passed_over_at_every_depth_and_counted(store: Store) -> None:
    """macOS's members beside each file, in between and in front; README.md, LICENSE, captions of their own, folders."""
    members: list[tuple[str, bytes]] = [
        ("README.md", b"x"),
        (".DS_Store", b"x"),
        ("LICENSE", b"x"),
        ("__MACOSX/train/._0.png", b"x"),
    ]
    for name, data in pairs(range(20)):
        members += [(f"train/._{name}", b"\0\5\x16\7"), (f"train/{name}", data)]
        members += [("train/notes.txt", b"x")] if name == "000009.png" else []
    for format_ in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        store.put("a-0.tar", make_tar(members, format_))
        manifest, broken = index_shards(store, SCHEMA)
        assert (manifest.samples, broken) == (20, [])
        assert manifest.passed_over == {".md": 1, ".txt": 1, "hidden files and what systems left": 42, "no extension": 1}
        assert load_manifest(store).passed_over == manifest.passed_over
        items, labels, _ = epoch(store)
        assert sorted(items) == list(range(20))
        assert labels == [item % 10 for item in items]
        assert len(list(scan(store, manifest))) == 20
        store.delete("manifest.json")


@pytest.mark.parametrize(("rule", "count"), [(1, 22), (2, 20)])
def test_a_manifest_that_took_strays_for_samples_is_read_as_before(store: Store, rule: int, count: int) -> None:
    """Of earlier versions: the strays are samples that cannot be used, and a budget puts donors in their places."""
    strays = [("README.md", b"x"), ("train/._x.png", b"x"), ("x.json", b"{}")]
    data = make_tar([*pairs(range(10)), *strays, *pairs(range(10, 19))])
    spans = list(tar.samples(data, ended=True, rule=rule))
    assert (len(spans), len(list(tar.samples(data, ended=True)))) == (count, 19)
    starts = [0, *(span.start for span in spans[1:])]
    crcs = [zlib.crc32(data[start:end]) for start, end in itertools.pairwise([*starts, len(data)])]
    index = ShardIndex("a.tar", len(data), store.put("a.tar", data), np.array(starts, np.uint32) // 512, np.array(crcs, np.uint32))
    for chunk in (1, 4):
        save_manifest(store, build_manifest(SCHEMA, [index], "index", chunk))
        items, labels, _ = epoch(store, bad_samples=0.2)
        assert set(items) <= set(range(19))
        assert len(items) == 20
        assert labels == [item % 10 for item in items]


def test_parts_of_a_data_set_below_one_prefix_are_named(store: Store) -> None:
    for number in range(3):
        store.put(f"x/train-{number:03d}.tar", make_tar(pairs(range(number * 5, number * 5 + 5))))
    store.put("x/val-000.tar", make_tar(pairs(range(15, 20))))
    with pytest.raises(DataError, match=r"holds the tars of train and val; name .* 'data\.shards=x/train-\{000\.\.002\}\.tar'"):
        index_shards(store, SCHEMA)
    assert index_shards(store, SCHEMA, "x/train-{000..002}.tar")[0].samples == 15
    assert index_shards(store, SCHEMA, "x/{train-000,val-000}.tar")[0].samples == 10


@pytest.mark.parametrize("name", ["a-000.tar.gz", "a-000.tgz", "a-000.tar.zst"])
def test_compressed_tars_are_named(store: Store, name: str) -> None:
    store.put(name, b"\x1f\x8b")
    for pattern in ("", name, "a-000.tar"):
        if not (pattern == "a-000.tar" and name.endswith(".tgz")):
            with pytest.raises(DataError, match=rf"compressed, such as {name}; decompress them"):
                index_shards(store, SCHEMA, pattern)
    store.put("b-000.tar", make_tar(pairs(range(5))))
    with pytest.raises(DataError, match="are compressed"):  # they would be left out without a word
        index_shards(store, SCHEMA)
    assert index_shards(store, SCHEMA, "b-{000..000}.tar")[0].samples == 5
    store.put("._b-000.tar", b"x")
    assert index_shards(store, SCHEMA, "b-000.tar")[0].samples == 5


NAMES = tuple("abcdefghij")
LABELS = {  # how the label of item n stands in its sample, and the key that reads it
    "text": (lambda n: ("cls", f"{NAMES[n % 10]}\n"), "label"),
    "member": (lambda n: ("txt", NAMES[n % 10]), "txt"),
    "json text": (lambda n: ("json", json.dumps({"label": NAMES[n % 10]})), "label"),
    "json key": (lambda n: ("json", json.dumps({"class": NAMES[n % 10], "label": "x"})), "class"),
    "dotted": (lambda n: ("json", json.dumps({"meta": {"class": n % 10}, "x": 1})), "meta.class"),
    "with a dot": (lambda n: ("json", json.dumps({"meta.class": n % 10})), "meta.class"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_other_kinds_are_read_by_the_options_that_the_sentence_names(tmp_path: Path, kind: str) -> None:
    label, key = LABELS[kind]
    members = []
    for n in range(20):
        ext, text = label(n)
        members += [(f"{n:06d}.{ext}", text.encode()), (f"{n:06d}.png", pairs([n])[1][1])]
    store = open_store(str(tmp_path / "tars"))
    store.put("a.tar", make_tar(members))
    with pytest.raises(DataError, match=r"data\.class_names|data\.label_key|no label"):
        index_shards(store, SCHEMA)
    manifest, _ = index_shards(store, Schema(8, 3, 0, NAMES, label_key=key))
    assert (manifest.schema.classes, manifest.schema.class_names, manifest.schema.label_key) == (10, NAMES, key)
    assert load_manifest(store).fingerprint == manifest.fingerprint
    items, labels, _ = epoch(store)
    assert labels == [item % 10 for item in items]
    assert index_shards(store, SCHEMA)[0].fingerprint == manifest.fingerprint  # again, without the options
    ours = open_store(str(tmp_path / "ours"))
    source = open_source(data_config(source="webdataset", path=str(tmp_path / "tars"), classes=0))
    write_shards(source, ours)
    assert load_manifest(ours).schema.label_key == ""
    items, labels, _ = epoch(ours)
    assert labels == [item % 10 for item in items]


def test_labels_that_begin_at_1_are_noticed_and_read(store: Store) -> None:
    members = []
    for n in range(20):
        members += [(f"{n:06d}.cls", str(n % 10 + 1).encode()), (f"{n:06d}.png", pairs([n])[1][1])]
    store.put("a.tar", make_tar(members))
    with pytest.raises(
        DataError, match=r"a\.tar: it has the label 10, and data\.classes=10 allows 0 to 9 \(if labels begin at 1, list"
    ):
        index_shards(store, SCHEMA)
    index_shards(store, Schema(8, 3, 0, tuple(str(n + 1) for n in range(10)), label_key="label"))
    items, labels, _ = epoch(store)
    assert labels == [item % 10 for item in items]


def labelled(*labels: int) -> bytes:
    return make_tar(
        [
            member
            for n, label in enumerate(labels)
            for member in ((f"{n:06d}.cls", str(label).encode()), (f"{n:06d}.png", pairs([n])[1][1]))
        ]
    )


def test_the_number_of_classes_is_counted_if_nobody_says_it(store: Store) -> None:
    said: list[str] = []
    store.put("a.tar", labelled(0, 1, 2, 0))
    store.put("b.tar", labelled(4, 3, 0))
    manifest, _ = index_shards(store, Schema(8, 3, 0), report=said.append)
    assert (manifest.schema.classes, load_manifest(store).schema.classes) == (5, 5)
    assert said == ["5 classes, as the labels go from 0 to 4 (data.classes is not set)"]
    assert epoch_labels(store) == [0, 0, 0, 1, 2, 3, 4]
    said.clear()
    assert index_shards(store, Schema(8, 3, 0), report=said.append)[0].fingerprint == manifest.fingerprint
    assert said == []  # it is known now
    store.delete("manifest.json")
    stated, _ = index_shards(store, Schema(8, 3, 5))
    assert stated.fingerprint == manifest.fingerprint


def epoch_labels(store: Store) -> list[int]:
    return sorted(label for _, label in scan(store, load_manifest(store)))


def test_classes_without_a_picture_are_named_where_they_are_counted(store: Store) -> None:
    store.put("a.tar", labelled(1, 2, 3))
    with pytest.raises(
        DataError,
        match=r"go from 1 to 3, and these classes have no picture: 0; if labels begin at 1, list them in data\.class_names, one a "
        r"line; set data\.classes=4 if that is meant",
    ):
        index_shards(store, Schema(8, 3, 0))
    named, _ = index_shards(store, Schema(8, 3, 0, ("1", "2", "3"), label_key="label"))
    assert named.schema.classes == 3
    store.delete("manifest.json")
    store.put("a.tar", labelled(0, 2, 1000))
    with pytest.raises(
        DataError, match=r"from 0 to 1000, and these classes have no picture: 1, 3, 4, 5, 6, \.\.\.; set data\.classes=1001"
    ):
        index_shards(store, Schema(8, 3, 0))
    said: list[str] = []
    assert index_shards(store, Schema(8, 3, 1001), report=said.append)[0].schema.classes == 1001
    assert said == ["classes without a picture, of 1001: 1, 3, 4, 5, 6, ..."]
    store.delete("manifest.json")
    store.put("a.tar", make_tar([("a.cls", b"cat"), ("a.png", pairs([1])[1][1])]))
    with pytest.raises(
        DataError, match=r"its label 'cat' is not a number from 0; list the names of the classes in data\.class_names"
    ):
        index_shards(store, Schema(8, 3, 0))


def test_a_json_without_its_picture_is_passed_over_by_everybody_and_counted(tmp_path: Path) -> None:
    """Of the whole shard in front, of a picture that a web scrape did not get in between, with its caption at the end."""
    members = [("shard.json", b'{"version": 1}')]
    for n in range(20):
        members += [(f"{n:06d}.json", json.dumps({"label": n % 10}).encode())]
        members += [(f"{n:06d}.png", pairs([n])[1][1])] if n != 7 else []
    members += [("last.json", b"{}"), ("last.txt", b"a dog")]
    store, said = open_store(str(tmp_path / "tars")), []
    store.put("a.tar", make_tar(members))
    manifest, broken = index_shards(store, SCHEMA, report=said.append)
    assert (manifest.samples, broken) == (19, [])
    assert manifest.passed_over == {".json without a picture": 3, ".txt": 1}
    items, labels, stats = epoch(store)
    assert (set(items) <= set(range(20)) - {7}, stats["bad_samples"]) == (True, {})
    assert labels == [item % 10 for item in items]
    assert len(list(scan(store, manifest))) == 19
    ours = open_store(str(tmp_path / "ours"))
    prepared = write_shards(open_source(data_config(source="webdataset", path=str(tmp_path / "tars"), classes=0)), ours)
    assert (prepared.samples, prepared.passed_over) == (19, manifest.passed_over)


def test_a_picture_that_is_not_read_beside_a_json_is_never_passed_over(store: Store) -> None:
    for ext in ("gif", "input.png", "heic", "bin"):
        store.put("a.tar", make_tar([("a.json", b'{"label": 1}'), (f"a.{ext}", b"GIF89a")]))
        with pytest.raises(
            DataError, match=rf"the first sample is unusable, it needs one of .*, and has {ext.replace('.', '[.]')}, json|json, "
        ):
            index_shards(store, SCHEMA)
    store.put("a.tar", make_tar([("a.cls", b"1"), *pairs([1])]))
    with pytest.raises(DataError, match=r"it needs one of .*, and has cls"):
        index_shards(store, SCHEMA)


def test_our_own_labels_are_numbers_whatever_the_classes_are_called(tmp_path: Path) -> None:
    """Folders called 1 and 2 are the classes 0 and 1."""
    store, source = open_store(str(tmp_path)), noise_source(20)
    names = tuple(str(n + 1) for n in range(10))
    write_shards(replace(source, schema=replace(source.schema, class_names=names)), store)
    items, labels, _ = epoch(store)
    assert labels == [item % 10 for item in items]


def test_a_text_that_is_no_name_is_quoted(store: Store) -> None:
    store.put("a.tar", make_tar([("a.cls", b"cat"), ("a.png", pairs([1])[1][1])]))
    with pytest.raises(
        DataError, match=r"its label 'cat' is not a number from 0 to 9; list the names of the classes in data\.class_names"
    ):
        index_shards(store, SCHEMA)
    with pytest.raises(DataError, match=r"its label 'cat' is none of data\.class_names"):
        index_shards(store, Schema(8, 3, 0, ("dog",), label_key="label"))
    store.put("a.tar", make_tar([("a.json", b'{"caption": "x", "url": "u"}'), ("a.png", pairs([1])[1][1])]))
    with pytest.raises(DataError, match=r"its JSON has no 'label', but 'caption', 'url'; name the key with data\.label_key"):
        index_shards(store, SCHEMA)


def test_pictures_that_a_person_sees_otherwise_are_reported_and_prepare_reads_them_so(tmp_path: Path) -> None:
    exif, members = Image.Exif(), []
    exif[274] = 3
    picture = Image.fromarray(np.repeat(np.array([[0] * 16] * 8 + [[255] * 16] * 8, np.uint8)[..., None], 3, 2))
    for n in range(4):
        picture.save(out := io.BytesIO(), "JPEG", quality=95, **({"exif": exif} if n % 2 else {}))
        members += [(f"{n}.cls", str(n % 2).encode()), (f"{n}.jpg", out.getvalue())]
    store, said = open_store(str(tmp_path / "tars")), []
    store.put("a.tar", make_tar(members))
    manifest, _ = index_shards(store, Schema(16, 3, 2), report=said.append)
    assert [line.split(" and")[0] for line in said] == ["2 images are turned by EXIF or transparent,"]
    as_stored = [image for image, _ in scan(store, manifest)]
    assert all(np.array_equal(image, as_stored[0]) for image in as_stored)
    source = open_source(data_config(source="webdataset", path=str(tmp_path / "tars"), classes=0))
    for sample in map(source.read, range(4)):
        assert (sample.image[0].mean() > 128) == (sample.label == 1)  # the turned ones are white above


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
    order = choose_order(manifest, 10, seed=0)
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
