"""Raw latents, float (C, H, W) in npy: from folders and foreign tars through shards to batches, bit for bit."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from freeguide.configs.errors import ConfigError, DataError
from freeguide.data_pipeline import stored, tar
from freeguide.data_pipeline.decode import decode_sample, encode_npy, encode_png
from freeguide.data_pipeline.index import index_shards
from freeguide.data_pipeline.manifest import Manifest, Schema, Shard
from freeguide.data_pipeline.mixture import join
from freeguide.data_pipeline.order import choose_order
from freeguide.data_pipeline.scan import scan_all
from freeguide.data_pipeline.shards import Plan, Sample, Source, pack_shard, write_shards
from freeguide.data_pipeline.sources.open import open_source
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stored import load_manifest
from freeguide.data_pipeline.stream import Reader
from tests.data_pipeline.conftest import data_config
from tests.data_pipeline.tars import make_tar
from tests.data_pipeline.test_decode import IMAGE, Trap, cause, npy

BATCH = 12
SCHEMA = Schema(8, 4, 10, dtype="float16")
LATENT = np.random.default_rng(0).normal(0, 6, (4, 8, 8)).astype(np.float16)


def latent(number: int, dtype: str) -> np.ndarray:
    """Normal values; the first says which item it is."""
    values = np.random.default_rng(number).normal(0, 6, (4, 8, 8)).astype(dtype)
    values[0, 0, 0] = number
    return values


def folder(path: Path, dtype: str, items: int = 60) -> str:
    """Class folders of npy files as an encoder's script would save them."""
    for number in range(items):
        place = path / f"class{number % 10}"
        place.mkdir(parents=True, exist_ok=True)
        np.save(place / f"{number:03d}.npy", latent(number, dtype))
    return str(path)


def batches(uri: str, steps: int, *, rank: int = 0, world: int = 1, **options: object) -> list[torch.Tensor]:
    store = open_store(uri)
    manifest = load_manifest(store)
    place = {"global_batch": BATCH, "rank": rank, "world_size": world, "start_step": 0}
    order = choose_order(manifest, BATCH, 0)
    with Reader(store, manifest, order, **place, data=data_config(**options)) as reader:  # type: ignore[arg-type]
        read = [next(reader) for _ in range(steps)]
    assert all(
        (batch.images[:, 0, 0, 0].round().long() % 10 == batch.labels).all() for batch in read if "latent_scale" not in options
    )
    return [batch.images for batch in read]


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("source", ["folder", "webdataset"])
def test_latents_come_through_prepare_and_the_reader_with_their_bits(tmp_path: Path, dtype: str, source: str) -> None:
    """From npy files and from tars of them: one epoch is every latent once, as float32, whatever the number of ranks."""
    options = {"channels": 4, "dtype": dtype, "source": source}
    if source == "folder":
        options["path"] = folder(tmp_path / "files", dtype)
    else:
        options["path"] = str(tmp_path / "tars")
        (tmp_path / "tars").mkdir()
        members = [[(f"{n}.cls", str(n % 10).encode()), (f"{n}.npy", npy(latent(n, dtype)))] for n in range(60)]
        for part in range(3):
            data = make_tar(member for sample in members[part * 20 : part * 20 + 20] for member in sample)
            (tmp_path / "tars" / f"{part}.tar").write_bytes(data)
        index_shards(open_store(options["path"]), Schema(8, 4, 10, dtype=dtype))
    uri = str(tmp_path / "shards")
    manifest = write_shards(open_source(data_config(**options)), open_store(uri), shard_samples=20)
    assert manifest.schema.dtype == load_manifest(open_store(uri)).schema.dtype == dtype
    whole = batches(uri, 5)
    read = torch.cat(whole)
    assert read.dtype == torch.float32
    numbers = read[:, 0, 0, 0].round().long()
    assert sorted(numbers.tolist()) == list(range(60))
    assert torch.equal(read, torch.stack([torch.from_numpy(latent(int(n), dtype)).float() for n in numbers]))
    halves = [batches(uri, 5, rank=rank, world=2, decode_threads=rank) for rank in range(2)]
    assert torch.equal(torch.cat([torch.cat(pair) for pair in zip(*halves, strict=True)]), read)
    in_memory, labels = scan_all(open_store(uri), manifest)
    assert (in_memory.dtype, in_memory.shape, sorted(labels.tolist())) == (dtype, (60, 4, 8, 8), sorted(n % 10 for n in range(60)))


def test_tars_of_strangers_train_as_they_are_with_the_pictures_beside_the_latents_passed_over(tmp_path: Path) -> None:
    members = []
    for n in range(24):
        label = json.dumps({"label": n % 10}).encode()
        members += [(f"{n}.json", label), (f"{n}.npy", npy(latent(n, "float32"))), (f"{n}.png", encode_png(IMAGE))]
    (tmp_path / "a.tar").write_bytes(make_tar(members))
    index_shards(open_store(str(tmp_path)), Schema(8, 4, 10, dtype="float32"))
    read = torch.cat(batches(str(tmp_path), 2))
    assert sorted(read[:, 0, 0, 0].round().int().tolist()) == list(range(24))


def test_latent_scale_multiplies_in_float32(tmp_path: Path) -> None:
    uri = str(tmp_path / "shards")
    config = data_config(source="folder", path=folder(tmp_path / "files", "float16"), channels=4, dtype="float16")
    write_shards(open_source(config), open_store(uri), shard_samples=20)
    plain, scaled = batches(uri, 5), batches(uri, 5, latent_scale=0.18215)
    assert torch.equal(torch.cat(scaled), torch.cat(plain) * 0.18215)


def test_shards_of_latents_read_back_byte_for_byte_with_stock_webdataset(tmp_path: Path) -> None:
    packed = pack_shard((Sample(latent(n, "float16"), n) for n in range(10)), dtype="float16")
    assert packed.data == pack_shard((Sample(latent(n, "float16"), n) for n in range(10)), dtype="float16").data
    (tmp_path / "a.tar").write_bytes(packed.data)
    read = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False).decode().to_tuple("npy", "cls"))
    assert [label for _, label in read] == list(range(10))
    for number, (values, _) in enumerate(read):
        assert values.dtype == np.float16
        assert np.array_equal(values, latent(number, "float16"))
    assert [member.start - member.header for member in tar.members(packed.data)] == [512] * 20


@pytest.mark.parametrize("other", ["uint8", "float32"])
def test_samples_of_another_kind_are_not_written(other: str) -> None:
    with pytest.raises(ValueError, match="sample 000000000 is"):
        pack_shard([Sample(LATENT.astype(other), 0)], dtype="float16")
    with pytest.raises(ValueError, match="not uint8"):
        pack_shard([Sample(LATENT, 0)])


HEADER = b"{'descr': '<f2', 'fortran_order': False, 'shape': (99999999, 99999999, 99999999), }\n"
HUGE = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(HEADER)) + HEADER + bytes(512)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (npy(LATENT.astype(np.float32)), "codec"),  # never converted in silence
        (npy(LATENT.astype(np.float64)), "codec"),
        (npy(LATENT.astype(">f2")), "codec"),
        (npy(LATENT.transpose(1, 2, 0).copy()), "codec"),  # (H, W, C)
        (npy(np.asfortranarray(LATENT)), "codec"),
        (npy(LATENT[None]), "codec"),
        (npy(LATENT[:, :0]), "codec"),
        (npy(np.array([Trap()], dtype=object)), "codec"),
        (npy(LATENT * np.float16("nan")), "image"),
        (npy(np.where(LATENT > 6, np.float16("inf"), LATENT)), "image"),
        (npy(LATENT)[:-1], "size"),
        (npy(LATENT) + b"x", "size"),
        (HUGE, "size"),
        (encode_png(IMAGE), "image"),
        (b"", "image"),
    ],
)  # fmt: skip
def test_what_is_not_exactly_such_a_latent_is_refused(data: bytes, expected: str) -> None:
    assert cause({"npy": data, "cls": b"1"}, SCHEMA) == expected
    assert not Trap.sprung


def test_a_picture_is_no_latent_and_a_latent_is_no_picture() -> None:
    assert np.array_equal(decode_sample({"npy": encode_npy(LATENT), "cls": b"1"}, SCHEMA)[0], LATENT)
    assert cause({"png": encode_png(IMAGE), "cls": b"1"}, SCHEMA) == "fields"
    assert cause({"npy": encode_npy(LATENT), "cls": b"1"}, Schema(8, 4, 10)) == "codec"


def test_latents_made_anew_under_the_old_names_are_another_source(tmp_path: Path) -> None:
    config = data_config(source="folder", path=folder(tmp_path, "float16"), channels=4, dtype="float16")
    before = open_source(config)
    assert open_source(config).identity == before.identity
    for file in tmp_path.rglob("*.npy"):
        np.save(file, np.load(file) * np.float16(0.5))
    assert open_source(config).identity != before.identity


def test_what_does_not_hold_latents_says_so(tmp_path: Path) -> None:
    for source in ("digits", "idx", "parquet"):
        with pytest.raises(ConfigError, match="come from folder or webdataset"):
            open_source(data_config(source=source, path="x", dtype="float16"))
    folder(tmp_path / "files", "float16")
    with pytest.raises(DataError, match=r"hold no images \(passed over: \.npy 60\)"):
        open_source(data_config(source="folder", path=str(tmp_path / "files")))
    config = data_config(source="folder", path=str(tmp_path / "files"), channels=4, dtype="float32")
    with pytest.raises(DataError, match=r"\.npy: its npy is float16 \(4, 8, 8\), not float32 \(4, 8, 8\)"):
        write_shards(open_source(config), open_store(str(tmp_path / "out")))
    (tmp_path / "a.tar").write_bytes(pack_shard([Sample(LATENT, 0)], dtype="float16").data)
    index_shards(open_store(str(tmp_path)), SCHEMA, "a.tar")
    with pytest.raises(DataError, match=r"has samples of float16, but data\.dtype is float32"):
        open_source(data_config(source="webdataset", path=str(tmp_path), channels=4, dtype="float32"))


def shards_of_two(schema: Schema) -> Manifest:
    rows = (Shard("a.tar", 2048, "e", 2), Shard("b.tar", 1024, "f", 1))
    return Manifest(schema, rows, 1, np.array([0, 2, 0], np.uint32), np.array([1, 2, 3], np.uint32))


def test_data_sets_from_before_there_were_latents_keep_their_identity(tmp_path: Path) -> None:
    """The digests were computed by the version before: its runs resume, and its prepared data sets are recognised."""
    schema = Schema(8, 3, 10, ("a", "b"))
    assert shards_of_two(schema).fingerprint == "a0401f33461ef27e8094654fd9f2654052b3bdae9a4e4283e8a99f42803ef6c3"
    source = Source(Schema(8, 3, 10), 5, lambda item: Sample(IMAGE, 0), "x")
    assert Plan.make(source, 2).identity == "081d907a28c90602ba7db2399fa265cb39fdadef1a0cb0528e9823b91a4ef14e"
    store = open_store(str(tmp_path))
    stored.save_manifest(store, shards_of_two(schema))
    assert "dtype" not in json.loads(store.get(stored.NAME))["schema"]
    assert load_manifest(store).schema == schema


def test_the_dtype_is_part_of_what_a_data_set_is(tmp_path: Path) -> None:
    kinds = {dtype: shards_of_two(Schema(8, 4, 10, dtype=dtype)) for dtype in ("uint8", "float16", "float32")}
    assert len({manifest.fingerprint for manifest in kinds.values()}) == 3
    with pytest.raises(DataError, match="other images or classes"):
        join([(dtype, 1, manifest) for dtype, manifest in kinds.items()])
    store = open_store(str(tmp_path))
    stored.save_manifest(store, kinds["float16"])
    store.put(stored.NAME, store.get(stored.NAME).replace(b"float16", b"object"))
    with pytest.raises(DataError, match="damaged"):
        load_manifest(store)
