"""Tests of scan.py: a whole data set, once, in order, or one sentence about what is missing."""

from dataclasses import replace

import numpy as np
import pytest

from configs.errors import DataError
from data_pipeline.manifest import Manifest
from data_pipeline.scan import scan, scan_all
from data_pipeline.store import Store
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
    shards = (*manifest.shards[:2], replace(manifest.shards[2], samples=11))
    with pytest.raises(DataError, match=r"shards/000002\.tar: holds 10 samples, the manifest says 11"):
        list(scan(store, replace(manifest, shards=shards)))
