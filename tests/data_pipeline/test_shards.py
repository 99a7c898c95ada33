"""Tests of shards.py and manifest.py: what is written, and that any WebDataset reader reads it."""

import hashlib
import io
import json
import tracemalloc
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from freeguide.configs.errors import DataError, UserError
from freeguide.data_pipeline import stored, tar
from freeguide.data_pipeline.claim import claim
from freeguide.data_pipeline.crc import combine_crcs
from freeguide.data_pipeline.decode import BadSample
from freeguide.data_pipeline.index import index_shards
from freeguide.data_pipeline.manifest import ShardIndex, build_manifest, choose_chunk
from freeguide.data_pipeline.shards import Plan, Sample, Source, index_tar, pack_shard, write_shards
from freeguide.data_pipeline.store.base import Store
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stored import load_manifest, save_manifest
from tests.data_pipeline.conftest import noise_source, write_noise


def test_shards_read_back_byte_for_byte_with_stock_webdataset(tmp_path: Path) -> None:
    source = noise_source(60)
    manifest = write_shards(source, open_store(str(tmp_path)), shard_samples=25)
    paths = [str(tmp_path / shard.key) for shard in manifest.shards]
    read = list(webdataset.WebDataset(paths, shardshuffle=False))
    assert [sample["__key__"] for sample in read] == [f"{item:09d}" for item in range(60)]
    for path, shard in zip(paths, manifest.shards, strict=True):
        data = Path(path).read_bytes()
        ours = [span.read(data) for span in tar.samples(data, ended=True)]
        theirs = [{ext: sample[ext] for ext in ("png", "cls")} for sample in webdataset.WebDataset(path, shardshuffle=False)]
        assert ours == theirs
        assert len(ours) == shard.samples
    decoded = list(webdataset.WebDataset(paths, shardshuffle=False).decode("rgb8").to_tuple("png", "cls"))
    for item, (image, label) in enumerate(decoded):
        assert np.array_equal(image, source.read(item).image)
        assert label == source.read(item).label


def test_the_same_samples_give_the_same_bytes() -> None:
    source = noise_source(20)
    first, second = (pack_shard(map(source.read, range(20))) for _ in range(2))
    assert first.data == second.data
    assert first.data != pack_shard(map(source.read, range(20)), first=1).data


def test_there_are_no_pax_headers() -> None:
    """They would cost 1 KiB per member; they come with a time that is not an integer."""
    data = pack_shard(map(noise_source(20).read, range(20))).data
    assert [member.start - member.header for member in tar.members(data)] == [512] * 40


@pytest.mark.parametrize("sample", [Sample(np.zeros((8, 8, 1), np.uint8), 0, "a.b"), Sample(np.zeros((8, 8, 1), np.float32), 0)])
def test_samples_that_would_not_read_back_are_refused(sample: Sample) -> None:
    with pytest.raises(ValueError, match=r"dot|float32"):
        pack_shard([sample])


def test_a_data_set_exists_whole_or_not_at_all(store: Store) -> None:
    """Whatever write is the last one before a crash, there is a complete manifest or none, and a second run finishes the job."""
    source = noise_source(30)
    expected = write_shards(source, store.child("expected"), shard_samples=10)
    for crash in range(12):
        target = store.child(f"crash{crash}")
        writes = 0

        def failing(key: str, data: bytes, put: object = target.put, crash: int = crash) -> str:
            nonlocal writes
            writes += 1
            if writes > crash:
                raise KeyboardInterrupt
            return put(key, data)  # type: ignore[operator]

        def failing_too(key: str, data: bytes, create: object = target.create, failing: object = failing) -> bytes:
            counted: list[bytes] = []
            failing(key, data, lambda key, data: counted.append(create(key, data)))  # type: ignore[operator]
            return counted[0]

        target.put = failing  # type: ignore[method-assign]
        target.create = failing_too  # type: ignore[method-assign]
        try:
            write_shards(source, target, shard_samples=10)
        except KeyboardInterrupt:
            with pytest.raises(DataError, match="no manifest"):
                load_manifest(target)
        else:
            break
        fresh = store.child(f"crash{crash}")
        assert write_shards(source, fresh, shard_samples=10).fingerprint == expected.fingerprint
        assert not fresh.list("parts/")
    assert crash == 9  # begun, three shards and their indexes, the index and the manifest


def test_shards_that_are_there_are_not_written_again(store: Store) -> None:
    source, reads = noise_source(30), []

    def counted(item: int) -> Sample:
        reads.append(item)
        return source.read(item)

    counting = replace(source, read=counted)
    plan = Plan.make(counting, 10)
    plan.write(counting, store, 0)
    plan.write(counting, store, 2)
    manifest = write_shards(counting, store, shard_samples=10)
    assert sorted(reads) == list(range(30))
    assert write_shards(counting, store, shard_samples=10).fingerprint == manifest.fingerprint
    assert len(reads) == 30


def test_units_may_be_written_in_any_order_by_anyone(tmp_path: Path) -> None:
    source = noise_source(47)
    one, other = (open_store(str(tmp_path / name)) for name in "ab")
    expected = write_shards(source, one, shard_samples=10)
    plan = Plan.make(source, 10)
    for unit in (3, 1, 4, 2, 0):
        plan.write(source, other, unit)
    assert plan.finish(source, other).fingerprint == expected.fingerprint
    assert {info.key for info in one.list()} == {info.key for info in other.list()}
    assert {shard.samples for shard in expected.shards} == {9, 10}  # balanced: 47 over 5


def test_another_data_set_is_not_overwritten(store: Store) -> None:
    write_shards(noise_source(30), store, shard_samples=10)
    with pytest.raises(DataError, match="holds another data set"):
        write_shards(noise_source(30, seed=1), store, shard_samples=10)


def test_strange_tars_are_not_overwritten(store: Store) -> None:
    store.put("shards/000000.tar", b"someone else's")
    with pytest.raises(DataError, match="shards of something else"):
        write_shards(noise_source(30), store, shard_samples=10)
    assert store.get("shards/000000.tar") == b"someone else's"


def test_pictures_that_were_repaired_replace_what_was_prepared_before(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """The sentence says "repair or remove them": then it is another source, and what its predecessor left is in nobody's way."""
    with pytest.raises(DataError, match="repair or remove them"):
        write_shards(bad_source(47, {33}), store, shard_samples=10)
    assert store.exists("shards/000002.tar")
    repaired = noise_source(29)
    manifest = write_shards(repaired, store, shard_samples=10)
    assert "replacing a data set that was begun here and not finished" in capsys.readouterr().out
    assert {info.key for info in store.list()} >= {shard.key for shard in manifest.shards}
    assert [info.key for info in store.list("shards/")] == [shard.key for shard in manifest.shards]
    assert store.list("parts/") == []
    assert load_manifest(store).samples == 29


def test_what_index_was_reading_is_not_replaced(store: Store) -> None:
    store.put("shards/000000.tar", b"someone else's")
    claim(store, "index", "x")
    with pytest.raises(DataError, match="shards of something else"):
        write_shards(noise_source(30), store, shard_samples=10)
    assert store.get("shards/000000.tar") == b"someone else's"


def bad_source(items: int, bad: set[int]) -> Source:
    source = noise_source(items)

    def read(item: int) -> Sample:
        if item in bad:
            raise BadSample("image", f"cats/{item}.png: it does not decode.")
        return source.read(item)

    return replace(source, read=read)


def test_bad_images_are_left_out_under_a_budget(store: Store) -> None:
    manifest = write_shards(bad_source(40, {3, 17}), store, shard_samples=10, bad_images=0.05)
    assert manifest.samples == 38
    assert [shard.samples for shard in manifest.shards] == [9, 9, 10, 10]


def test_a_shard_of_which_no_image_can_be_read_is_left_out(store: Store) -> None:
    """An empty tar would be broken for `index` and for other readers."""
    manifest = write_shards(bad_source(40, set(range(10, 20))), store, shard_samples=10, bad_images=0.5)
    assert (manifest.samples, len(manifest.shards)) == (30, 3)
    assert manifest.passed_over == {"cannot be read": 10}
    assert [info.key for info in store.list("shards/")] == [shard.key for shard in manifest.shards]
    store.delete("manifest.json")
    indexed, broken = index_shards(store, manifest.schema)
    assert (indexed.fingerprint, broken) == (manifest.fingerprint, [])


def test_more_bad_images_than_the_budget_stop_and_name_the_first(store: Store) -> None:
    with pytest.raises(DataError, match=r"1 of 40 images cannot be read, the first is cats/3\.png: .* data\.bad_images"):
        write_shards(bad_source(40, {3, 17}), store, shard_samples=10)
    with pytest.raises(DataError, match="no manifest"):
        load_manifest(store)


def test_progress_counts_shards(tmp_path: Path) -> None:
    seen: list[tuple[int, int, tuple[str, ...]]] = []
    write_shards(noise_source(30), open_store(str(tmp_path)), shard_samples=10, progress=lambda *at: seen.append(at))
    assert seen == [(1, 3, ()), (2, 3, ()), (3, 3, ())]


# ------------------------------------------------------------------------------------------------------------- manifest


def test_the_manifest_reads_back(store: Store) -> None:
    manifest = write_noise(store, 103, chunk_samples=8)
    again = load_manifest(store)
    assert again.schema == manifest.schema
    assert again.shards == manifest.shards
    assert again.fingerprint == manifest.fingerprint
    assert np.array_equal(again.starts, manifest.starts)
    assert np.array_equal(again.crcs, manifest.crcs)


@pytest.mark.parametrize("q", [1, 2, 8, 16, 64])
def test_chunks_cover_the_shards_and_their_crcs_are_those_of_the_bytes(tmp_path: Path, q: int) -> None:
    store = open_store(str(tmp_path))
    manifest = write_noise(store, 103, shard_samples=10, chunk_samples=q)
    covered: dict[int, bytes] = {}
    samples = 0
    for chunk, crc in enumerate(manifest.crcs):
        parts = [store.get_range(manifest.shards[shard].key, start, end - start) for shard, start, end in manifest.ranges(chunk)]
        assert zlib.crc32(b"".join(parts)) == crc
        spans = [span for part in parts for span in tar.samples(part)]
        assert [int(span.key) for span in spans] == list(range(chunk * q, min(103, chunk * q + q)))
        samples += len(spans)
        for (shard, _, _), part in zip(manifest.ranges(chunk), parts, strict=True):
            covered[shard] = covered.get(shard, b"") + part
    assert samples == 103
    assert [covered[shard] for shard in sorted(covered)] == [store.get(shard.key) for shard in manifest.shards]


def test_crcs_combine_as_concatenation_does() -> None:
    random = np.random.default_rng(0)
    pieces = [random.bytes(int(length)) for length in random.integers(0, 100_000, 57)]
    crcs = np.array([zlib.crc32(piece) for piece in pieces], np.uint32)
    lengths = np.array([len(piece) for piece in pieces], np.int64)
    for group in (1, 2, 5, 57, 60):
        expected = [zlib.crc32(b"".join(pieces[first : first + group])) for first in range(0, 57, group)]
        assert combine_crcs(crcs, lengths, group).tolist() == expected


def test_the_fingerprint_is_of_content_not_of_place(tmp_path: Path) -> None:
    one, other, third = (open_store(str(tmp_path / name)) for name in "abc")
    manifest = write_noise(one, 50)
    assert write_noise(other, 50).fingerprint == manifest.fingerprint
    assert write_noise(third, 51).fingerprint != manifest.fingerprint
    renamed = [replace(shard, key=f"x{shard.key}", etag="other") for shard in manifest.shards]
    assert replace(manifest, shards=tuple(renamed)).fingerprint == manifest.fingerprint
    crcs = manifest.crcs.copy()
    crcs[3] ^= 1
    assert replace(manifest, crcs=crcs).fingerprint != manifest.fingerprint
    assert replace(manifest, schema=replace(manifest.schema, classes=11)).fingerprint != manifest.fingerprint


def test_no_manifest_says_what_to_run(store: Store) -> None:
    with pytest.raises(DataError, match=r"run `freeguide prepare`.*`freeguide index`"):
        load_manifest(store)


def unsealed(store: Store) -> dict[str, Any]:
    """What a manifest says, without its seal: as earlier versions wrote it, or as somebody forges it."""
    return {name: value for name, value in json.loads(store.get(stored.NAME)).items() if name != "seal"}


def test_a_manifest_of_which_any_bit_has_changed_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_noise(store, 20)
    whole = store.get(stored.NAME)
    seal = whole.index(b"freeguide-sha256:")
    for at in [*range(0, len(whole), 7), *range(seal + 17, seal + 81)]:
        if seal <= at < seal + 17:  # then there is none
            continue
        store.put(stored.NAME, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(DataError, match=r"^The manifest .* is damaged \(its checksum does not fit\); run `freeguide index`"):
            load_manifest(store)
    store.put(stored.NAME, whole)
    store.put(stored.NAME, json.dumps(unsealed(store)).encode())
    assert load_manifest(store).samples == 20


def test_a_damaged_manifest_is_refused(store: Store) -> None:
    write_noise(store, 50)
    header = unsealed(store)
    index = header["index"]["key"]
    broken: list[tuple[str, bytes]] = [
        (stored.NAME, store.get(stored.NAME)[:200]),
        (stored.NAME, b"[]"),
        (stored.NAME, json.dumps({**header, "chunk_samples": 2}).encode()),
        (stored.NAME, json.dumps({**header, "shards": {}}).encode()),
        (index, store.get(index)[:-1]),
    ]
    for key, data in broken:
        good = store.get(key)
        store.put(key, data)
        with pytest.raises(DataError, match="manifest"):
            load_manifest(store)
        store.put(key, good)
    assert load_manifest(store).samples == 50


def test_the_index_is_never_unpickled(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_noise(store, 50)
    header = unsealed(store)
    out = io.BytesIO()
    np.save(out, np.array([{}], dtype=object), allow_pickle=True)
    store.put(header["index"]["key"], out.getvalue())
    header["index"]["sha256"] = hashlib.sha256(out.getvalue()).hexdigest()
    store.put(stored.NAME, json.dumps(header).encode())
    with pytest.raises(DataError, match="damaged"):
        load_manifest(store)


@pytest.mark.parametrize(
    ("samples", "sample_bytes", "q"),
    [
        (1797, 2080, 1),
        (30_000, 10**5, 2),  # 200 KB: the least that is worth a request
        (60_000, 3000, 32),  # 96 KB, so that 1 875 chunks remain
        (2000, 10**5, 1),
        (1_281_167, 10_000, 64),
        (1_281_167, 110_000, 32),
        (10**10, 10**5, 32),
        (10**6, 10**8, 1),
    ],
)
def test_chunks_are_4_mib_or_at_least_256_kib_where_there_are_enough_samples_to_shuffle(
    samples: int, sample_bytes: int, q: int
) -> None:
    assert choose_chunk(samples, samples * sample_bytes) == q


def test_an_index_survives_storage() -> None:
    packed = pack_shard(map(noise_source(10).read, range(10)))
    index = packed.index("shards/a.tar", "etag", ("bad one",))
    again = ShardIndex.from_bytes(index.to_bytes())
    assert (again.key, again.size, again.etag, again.bad) == ("shards/a.tar", len(packed.data), "etag", ("bad one",))
    assert np.array_equal(again.starts, packed.starts)
    assert np.array_equal(again.crcs, packed.crcs)


def test_a_manifest_of_packed_shards_needs_no_reading(tmp_path: Path) -> None:
    """What a generation job does: it keeps each unit's index, and builds the manifest from them."""
    source, store = noise_source(40), open_store(str(tmp_path))
    expected = write_shards(source, store.child("a"), shard_samples=10)
    indexes = []
    for unit in range(4):
        packed = pack_shard([source.read(item) for item in range(unit * 10, unit * 10 + 10)], unit * 10)
        indexes.append(packed.index(f"{unit}.tar", store.child("b").put(f"{unit}.tar", packed.data)))
    manifest = build_manifest(source.schema, indexes)
    save_manifest(store.child("b"), manifest)
    assert load_manifest(store.child("b")).fingerprint == expected.fingerprint


def test_an_index_of_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="no sample"):
        build_manifest(noise_source(1).schema, [pack_shard([]).index("a", "b")])
    assert len(index_tar(pack_shard([]).data)[0]) == 0


# -------------------------------------------------------------------------------------------------------- manifests of strangers


def forged(store: Store, change: object) -> bytes:
    """A manifest whose checksums are right, and whose content is what `change` makes of it."""
    header = unsealed(store)
    index = store.get(header["index"]["key"])
    made = change(header, index)  # type: ignore[operator]
    if isinstance(made, bytes):
        index = made
        store.put(header["index"]["key"], index)
        header["index"]["sha256"] = hashlib.sha256(index).hexdigest()
    return made.encode() if isinstance(made, str) else json.dumps(header).encode()


def npy(shape: str, data: bytes = bytes(400), descr: str = "'<u4'", more: str = "") -> bytes:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, {more}}}".encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + data


def column(name: str, value: object) -> object:
    return lambda header, index: header["shards"][name].__setitem__(0, value)


def schema(name: str, value: object) -> object:
    return lambda header, index: header["schema"].__setitem__(name, value)


HOSTILE = {
    "deep": lambda header, index: "[" * 100_000,
    "deep in the header": lambda header, index: header.__setitem__("source", json.loads("[" * 200 + "]" * 200)),
    "a number of many digits": lambda header, index: '{"format": ' + "9" * 4000 + "}",
    "a million shards of no name": lambda header, index: header.__setitem__("shards", {name: [] for name in header["shards"]}),
    "a path out of the store": column("key", "../../etc/passwd"),
    "an absolute path": column("key", "/etc/passwd"),
    "a key that is no text": column("key", 7),
    "huge samples": column("samples", 2**63),
    "more samples than chunks": column("samples", 10**9),
    "negative samples": column("samples", -5),
    "half a sample": column("samples", 1.5),
    "true samples": column("samples", True),
    "infinite bytes": column("bytes", float("inf")),
    "negative bytes": column("bytes", -1),
    "no bytes": column("bytes", 0),
    "an etag that is no text": column("etag", None),
    "a huge image": schema("image_size", 10**12),
    "an image of nothing": schema("image_size", 0),
    "huge channels": schema("channels", 2**40),
    "no classes": schema("classes", 0),
    "a huge number of classes": schema("classes", 10**15),
    "names that are numbers": schema("class_names", [1, 2]),
    "names that are one text": schema("class_names", "abc"),
    "more names than classes": schema("class_names", ["x"] * 11),
    "unknown fields": schema("more", 1),
    "chunks of nothing": lambda header, index: header.__setitem__("chunk_samples", 0),
    "an index elsewhere": lambda header, index: header["index"].__setitem__("key", "../x"),
    "a bomb of a shape": lambda header, index: npy("(1000000000000, 2)"),
    "a bomb of axes": lambda header, index: npy("(" + "1000000, " * 20 + ")"),
    "a negative shape": lambda header, index: npy("(-50, 2)"),
    "a header of a megabyte": lambda header, index: npy("(50, 2)", more="'x': '" + "x" * 60_000 + "'"),
    "a deep header": lambda header, index: npy("(50, 2)", more="'x': " + "(" * 4000 + ")" * 4000),
    "objects": lambda header, index: npy("(50, 2)", descr="'|O'"),
    "other numbers": lambda header, index: npy("(50, 2)", descr="'<f4'"),
    "one column": lambda header, index: npy("(100,)"),
    "three columns": lambda header, index: npy("(50, 3)", bytes(600)),
    "chunks beyond the shard": lambda header, index: npy("(50, 2)", b"\xff" * 400),
    "chunks in disorder": lambda header, index: npy("(50, 2)"),
    "no index": lambda header, index: b"",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_ends_in_one_sentence_and_costs_no_memory(name: str, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_noise(store, 50, chunk_samples=1)
    store.put(stored.NAME, forged(store, HOSTILE[name]))
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"^The manifest .* is damaged \(") as caught:
            load_manifest(store)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()
    text = str(caught.value)
    assert "fingerprint does not fit" not in text  # that would be a check after its use
    assert "\n" not in text
    assert len(text) < 600


def packed_npz(compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(f"{name}.npy", data)
    return out.getvalue()


FACTS = npy("(17,)", b'["k", 99, "e",[]]', "'|u1'")
INDEXES = {
    "nothing": b"",
    "cut": packed_npz(facts=FACTS, starts=npy("(1,)", bytes(4)), crcs=npy("(1,)", bytes(4)))[:-30],
    "compressed": packed_npz(
        zipfile.ZIP_DEFLATED, facts=FACTS, starts=npy("(9999999,)", bytes(39999996)), crcs=npy("(1,)", bytes(4))
    ),
    "lzma": packed_npz(zipfile.ZIP_LZMA, facts=FACTS, starts=npy("(1,)", bytes(4)), crcs=npy("(1,)", bytes(4))),
    "other members": packed_npz(facts=FACTS, starts=npy("(1,)", bytes(4)), other=npy("(1,)", bytes(4))),
    "a bomb of a shape": packed_npz(facts=FACTS, starts=npy("(999999999999,)"), crcs=npy("(1,)", bytes(4))),
    "unequal": packed_npz(facts=FACTS, starts=npy("(1,)", bytes(4)), crcs=npy("(2,)", bytes(8))),
    "beyond its shard": packed_npz(facts=FACTS, starts=npy("(1,)", b"\1\0\0\0"), crcs=npy("(1,)", bytes(4))),
    "other facts": packed_npz(facts=npy("(2,)", b"[]", "'|u1'"), starts=npy("(1,)", bytes(4)), crcs=npy("(1,)", bytes(4))),
    "a key out of the store": packed_npz(
        facts=npy("(19,)", b'["../", 99, "e",[]]', "'|u1'"), starts=npy("(1,)", bytes(4)), crcs=npy("(1,)", bytes(4))
    ),
}


@pytest.mark.parametrize("name", INDEXES)
def test_a_hostile_index_of_a_shard_is_none(name: str) -> None:
    with pytest.raises(DataError, match=r"^the index of a shard is (no index|not an \.npz of plain arrays) \(.*; delete it"):
        ShardIndex.from_bytes(INDEXES[name])


def test_a_damaged_index_of_a_shard_is_made_anew(store: Store) -> None:
    source = noise_source(30)
    expected = write_shards(source, store.child("expected"), shard_samples=10)
    target, plan = store.child("target"), Plan.make(source, 10)
    plan.begin(target)
    plan.write(source, target, 1)
    target.put(plan._part("000001.npz"), INDEXES["compressed"])
    assert write_shards(source, target, shard_samples=10).fingerprint == expected.fingerprint


def test_a_mixture_in_a_mixture_and_weights_that_are_none_are_refused(tmp_path: Path) -> None:
    one, mixed = open_store(str(tmp_path / "one")), open_store(str(tmp_path / "mixed"))
    write_noise(one, 50)
    stored.save_mixture(mixed, {one.uri: 1})
    good = unsealed(mixed)
    row = good["parts"][0]
    for parts in ([{**row, "uri": mixed.uri}], [{**row, "weight": 0}], [{**row, "weight": 1e9}], [], [{**row, "uri": 5}]):
        mixed.put(stored.NAME, json.dumps({**good, "parts": parts}).encode())
        with pytest.raises(DataError, match="damaged"):
            load_manifest(mixed)


@pytest.mark.parametrize("place", ["s3", "folder"])
def test_one_tar_as_location_says_how_to_name_it(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    if place == "s3":
        request.getfixturevalue("s3_endpoint")
    store = open_store(f"s3://freeguide/{tmp_path.name}" if place == "s3" else str(tmp_path))
    store.put("x.tar", pack_shard(map(noise_source(5).read, range(5))).data)
    one = open_store(f"{store.uri}/x.tar")
    for use in (load_manifest, lambda store: index_shards(store, noise_source(5).schema)):
        with pytest.raises(UserError, match=f"data.uri={store.uri} data.shards=x.tar|is a file|{store.uri}/x.tar/parts"):
            use(one)
    with pytest.raises(DataError, match=f"is one tar; run `freeguide index` with data.uri={store.uri} data.shards=x.tar"):
        load_manifest(one)
