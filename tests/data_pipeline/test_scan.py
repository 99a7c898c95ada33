"""Tests of scan.py: a whole data set, once, in order, or one sentence about what is missing."""

import numpy as np
import pytest

from freeguide.configs.errors import DataError
from freeguide.data_pipeline import tar
from freeguide.data_pipeline.manifest import Manifest
from freeguide.data_pipeline.scan import scan, scan_all
from freeguide.data_pipeline.shards import pack_shard
from freeguide.data_pipeline.store.base import Store
from tests.data_pipeline.conftest import noise_source, write_noise


@pytest.mark.parametrize("chunk_samples", [None, 8])
def test_every_sample_comes_once_in_the_order_of_the_manifest(store: Store, chunk_samples: int | None) -> None:
    manifest = write_noise(store, 103, chunk_samples=chunk_samples)
    source = noise_source(103)
    images, labels = scan_all(store, manifest)
    assert (images.dtype, images.shape, labels.dtype) == (np.uint8, (103, 8, 8, 3), np.int64)
    for item, (image, label) in enumerate(scan(store, manifest)):
        assert np.array_equal(image, source.read(item).image)
        assert label == source.read(item).label
        assert np.array_equal(image, images[item])
        assert label == labels[item]
    assert item == 102


def damaged(store: Store, manifest: Manifest, at: int, value: bytes) -> None:
    key = manifest.shards[1].key
    data = store.get(key)
    store.put(key, data[:at] + value + data[at + len(value) :])


def test_a_sample_that_does_not_decode_is_named(store: Store) -> None:
    manifest = write_noise(store, 30, shard_samples=10)
    data = store.get(manifest.shards[1].key)
    damaged(store, manifest, data.index(b"PNG", 3000), b"GNP")
    with pytest.raises(DataError, match=r"shards/000001\.tar: sample \d+ cannot be read: its image is neither"):
        scan_all(store, manifest)


def test_a_broken_tar_is_named(store: Store) -> None:
    manifest = write_noise(store, 30, shard_samples=10)
    damaged(store, manifest, 0, b"x")
    with pytest.raises(DataError, match=r"shards/000001\.tar: sample 0 cannot be read: .* wrong checksum"):
        scan_all(store, manifest)


def test_a_shard_of_another_length_is_named(store: Store) -> None:
    manifest = write_noise(store, 30, shard_samples=10)
    source = noise_source(30)
    store.put(manifest.shards[2].key, pack_shard(map(source.read, range(9))).data)
    with pytest.raises(DataError, match=r"shards/000002\.tar: holds 9 samples, the manifest says 10"):
        list(scan(store, manifest))


@pytest.mark.parametrize("chunk_samples", [None, 2, 8, 64])
def test_bytes_that_were_not_indexed_are_refused(store: Store, chunk_samples: int | None) -> None:
    manifest = write_noise(store, 60, shard_samples=10, chunk_samples=chunk_samples)
    assert len(list(scan(store, manifest, 2))) == 30
    for shard in (0, 2, 5):
        key = manifest.shards[shard].key
        kept = store.get(key)
        for number in (0, 9):  # a label that reads well and is wrong, at either end of the shard
            at = next(span for i, span in enumerate(tar.samples(kept)) if i == number)
            name = kept.index(b".cls", at.start)
            value = at.start + (name - at.start) // tar.BLOCK * tar.BLOCK + tar.BLOCK
            store.put(key, kept[:value] + bytes([kept[value] ^ 1]) + kept[value + 1 :])
            with pytest.raises(DataError, match=rf"00000{shard}\.tar (or .* )?does not hold the bytes that were indexed; restore"):
                scan_all(store, manifest)
            if shard % 2 == 0:
                with pytest.raises(DataError, match="does not hold the bytes that were indexed"):
                    scan_all(store, manifest, 2)
        store.put(key, kept)
    images, labels = scan_all(store, manifest)
    half, some = scan_all(store, manifest, 2)
    wanted = np.concatenate([np.arange(first, first + 10) for first in (0, 20, 40)])
    assert np.array_equal(half, images[wanted])
    assert np.array_equal(some, labels[wanted])
