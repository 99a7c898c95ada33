"""A data set is its content: copied, its objects have other etags, and everything goes on as before."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from freeguide.data_pipeline.index import index_shards
from freeguide.data_pipeline.manifest import Manifest
from freeguide.data_pipeline.order import Order
from freeguide.data_pipeline.shards import write_shards
from freeguide.data_pipeline.store.base import ChangedObject, Store
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stored import load_manifest, save_manifest
from freeguide.data_pipeline.stream import Batch, Reader
from tests.data_pipeline.conftest import data_config, noise_source, s3_uri, write_noise

ORDER = Order(samples=120, chunk_samples=4, streams=6, window_chunks=2, seed=0)


def batches(store: Store, manifest: Manifest, steps: int = 10, **options: object) -> list[Batch]:
    place = {"global_batch": 12, "rank": 0, "world_size": 1, "start_step": 0}
    with Reader(store, manifest, ORDER, **place, data=data_config(**options)) as reader:  # type: ignore[arg-type]
        return [next(reader) for _ in range(steps)]


def same(ours: list[Batch], theirs: list[Batch]) -> bool:
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.index, b.index) and torch.equal(a.labels, b.labels)
        for a, b in zip(ours, theirs, strict=True)
    )


def copied(source: Store, target: Store) -> Store:
    for info in source.list():
        target.put(info.key, source.get(info.key))
    return target


@pytest.mark.parametrize("way", ["folder to s3", "s3 to folder", "s3 in parts"])
def test_a_copy_is_read_like_the_original(way: str, tmp_path: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, bucket, again = open_store(str(tmp_path / "data")), open_store(s3_uri(tmp_path)), open_store(s3_uri(tmp_path))
    source, target = {"folder to s3": (folder, bucket), "s3 to folder": (bucket, folder), "s3 in parts": (bucket, again)}[way]
    manifest = write_noise(source, 120, shard_samples=30, chunk_samples=4)
    expected = batches(source, manifest)
    if way == "s3 in parts":
        monkeypatch.setattr(target, "put", lambda key, data: target._put_parts(key, len(data), lambda at, end: data))  # type: ignore[attr-defined]
    copied(source, target)
    moved = load_manifest(target)
    assert moved.fingerprint == manifest.fingerprint
    assert {target.stat(shard.key).etag for shard in moved.shards}.isdisjoint({shard.etag for shard in moved.shards})
    assert same(batches(target, moved), expected)
    cache = {"disk_cache": str(tmp_path / "cache")}
    for _ in range(2):  # into the cache, and out of it
        assert same(batches(target, moved, **cache), expected)


def test_another_content_of_the_same_size_is_no_copy(s3_endpoint: str, tmp_path: Path) -> None:
    store = open_store(s3_uri(tmp_path))
    manifest = write_noise(store, 120, shard_samples=30, chunk_samples=4)
    write_noise(other := open_store(str(tmp_path)), 120, shard_samples=30, chunk_samples=4)
    data = bytearray(other.get("shards/000002.tar"))
    data[5000] ^= 1
    store.put("shards/000002.tar", bytes(data))
    with pytest.raises(ChangedObject, match=r"shards/000002\.tar at byte \d+ has changed since its manifest was written"):
        batches(store, manifest, bad_samples=1.0)


def test_a_stale_entry_of_the_disk_cache_is_replaced(tmp_path: Path) -> None:
    """The etag of a folder is the size: data written anew in the same place may have the same one."""
    store = open_store(str(tmp_path / "data"))
    cache = {"disk_cache": str(tmp_path / "cache")}
    batches(store, write_noise(store, 120, shard_samples=30, chunk_samples=4), **cache)
    for info in store.list():
        store.delete(info.key)
    noise = noise_source(120, seed=1)
    write_shards(noise, store, shard_samples=30)
    indexed = index_shards(store, noise.schema)[0]
    anew = replace_chunks(indexed, store)
    assert [shard.etag for shard in anew.shards] == [str(store.stat(shard.key).bytes) for shard in anew.shards]
    expected = batches(store, anew)
    assert same(batches(store, anew, **cache), expected)


def replace_chunks(manifest: Manifest, store: Store) -> Manifest:
    """The same data set in chunks of four."""
    from freeguide.data_pipeline.mixture import coarser

    save_manifest(store, found := coarser(manifest, 4))
    return found


# ------------------------------------------------------------------------------------------------------- indexing again


def named(store: Store) -> Manifest:
    source = noise_source(120)
    names = tuple(f"class {n}" for n in range(10))
    return write_shards(replace(source, schema=replace(source.schema, class_names=names)), store, shard_samples=30)


def test_indexing_again_keeps_what_prepare_knew(store: Store) -> None:
    written = named(store)
    bare = replace(written.schema, class_names=())
    indexed, _ = index_shards(store, bare)
    assert load_manifest(store).fingerprint == indexed.fingerprint == written.fingerprint
    assert indexed.schema.class_names == written.schema.class_names
    assert indexed.source == written.source  # so `prepare` still knows its data set


def test_indexing_again_keeps_chunks_and_the_order_of_the_shards(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    written = write_noise(store, 120, shard_samples=30, chunk_samples=4)
    turned = replace(written, shards=written.shards[::-1], starts=written.starts, crcs=written.crcs)
    assert index_shards(store, written.schema)[0].fingerprint == written.fingerprint
    keys = [shard.key for shard in turned.shards]
    pattern = "shards/00000{3,2,1,0}.tar"
    assert [shard.key for shard in index_shards(store, written.schema, pattern)[0].shards] == keys
    assert [shard.key for shard in index_shards(store, written.schema)[0].shards] == keys


def test_other_tars_keep_the_names_of_the_classes_and_are_another_data_set(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    written = named(store)
    store.delete("shards/000003.tar")
    indexed, _ = index_shards(store, written.schema)
    assert indexed.schema.class_names == written.schema.class_names
    assert indexed.fingerprint != written.fingerprint
    assert indexed.source == "index"
    fewer = replace(written.schema, class_names=(), classes=11)
    assert index_shards(store, fewer)[0].schema == fewer  # names of ten classes say nothing about eleven
