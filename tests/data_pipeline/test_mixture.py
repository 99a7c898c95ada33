"""Mixtures of data sets: one manifest, one order, one reader, and the same promises as for a single data set."""

import threading
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from freeguide.configs.errors import DataError
from freeguide.data_pipeline.manifest import Manifest
from freeguide.data_pipeline.mixture import coarser, join
from freeguide.data_pipeline.order import Mixture, Order, choose_order
from freeguide.data_pipeline.scan import scan
from freeguide.data_pipeline.shards import write_shards
from freeguide.data_pipeline.store.base import Store
from freeguide.data_pipeline.stored import load_manifest, save_manifest, save_mixture
from freeguide.data_pipeline.stream import Batch, Reader
from tests.data_pipeline.conftest import data_config, item_of, noise_source, write_noise

BATCH = 24
SIZES = {"a": 203, "b": 90, "c": 50}  # with chunks of 8, 4 and 1 samples; 203 is no whole number of chunks
WEIGHTS = {"a": 2, "b": 1, "c": 1}


@pytest.fixture
def mixture(store: Store) -> tuple[Store, Manifest]:
    for (name, items), chunk in zip(SIZES.items(), (8, 4, 1), strict=True):
        write_noise(store.child(name), items, shard_samples=45, chunk_samples=chunk)
    mixed = store.child("mixed")
    save_mixture(mixed, {store.child(name).uri: weight for name, weight in WEIGHTS.items()})
    return mixed, load_manifest(mixed)


def read(
    mixture: tuple[Store, Manifest], order: Order, steps: int, *, rank: int = 0, world: int = 1, start: int = 0, **options: object
) -> list[Batch]:
    place = {"global_batch": BATCH, "rank": rank, "world_size": world, "start_step": start}
    with Reader(*mixture, order, **place, data=data_config(**options)) as reader:
        return [next(reader) for _ in range(steps)]


def streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    """No data set is small enough to stay in memory."""
    monkeypatch.setattr("freeguide.data_pipeline.stream.MIB", 700_000)
    monkeypatch.setattr("freeguide.data_pipeline.fetch.JOINED", 1)


@pytest.mark.parametrize("drop", [False, True])
def test_a_batch_holds_the_samples_of_its_positions(
    mixture: tuple[Store, Manifest], drop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = choose_order(mixture[1], BATCH, seed=0)
    assert isinstance(order, Mixture)
    if drop:
        streaming(monkeypatch)
    sources = [noise_source(items) for items in SIZES.values()]
    met = []
    for step, batch in enumerate(read(mixture, order, 30, cache_mib=1)):
        assert np.array_equal(np.sort(batch.index.numpy()), np.arange(step * BATCH, (step + 1) * BATCH))
        data_set, _, ids = order.place(batch.index.numpy())
        samples = [sources[d].read(int(id_)) for d, id_ in zip(data_set, ids, strict=True)]
        pixels = np.stack([sample.image for sample in samples])
        assert torch.equal(batch.images, torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1)
        assert batch.labels.tolist() == [sample.label for sample in samples]
        met.append(np.bincount(data_set, minlength=3))
    total = np.sum(met, axis=0)
    assert np.abs(total / total.sum() - [0.5, 0.25, 0.25]).max() < 0.05


@pytest.mark.parametrize("drop", [False, True])
def test_every_world_size_makes_the_same_global_batches(
    mixture: tuple[Store, Manifest], drop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = choose_order(mixture[1], BATCH, seed=0)
    if drop:
        streaming(monkeypatch)
    whole = read(mixture, order, 12, cache_mib=1)
    for start, world in ((0, 2), (1, 3), (5, 4), (8, 12)):
        for rank in range(0, world, 2):
            part = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
            options = {"decode_threads": rank % 3, "cache_mib": 1}
            for step, batch in enumerate(read(mixture, order, 4, rank=rank, world=world, start=start, **options), start):
                assert torch.equal(batch.images, whole[step].images[part])
                assert torch.equal(batch.labels, whole[step].labels[part])
                assert torch.equal(batch.index, whole[step].index[part])


def test_each_data_set_comes_exactly_once_per_epoch_of_its_own(mixture: tuple[Store, Manifest]) -> None:
    order = choose_order(mixture[1], BATCH, seed=0)
    assert isinstance(order, Mixture)
    seen: dict[tuple[int, int], list[int]] = {}
    for batch in read(mixture, order, 60):
        data_set, epoch, _ = order.place(batch.index.numpy())
        pixels = ((batch.images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        for d, e, item in zip(data_set.tolist(), epoch.tolist(), item_of(pixels).tolist(), strict=True):
            seen.setdefault((d, e), []).append(item)
    assert all(len(items) == len(set(items)) for items in seen.values())
    for number in range(3):
        assert len(seen[number, 0]) == order.orders[number].epoch_samples
    assert max(epoch for _, epoch in seen) > 2


def test_larger_chunks_have_the_same_bytes_and_their_crcs(store: Store) -> None:
    manifest = coarser(write_noise(store, 203, shard_samples=45, chunk_samples=4), 16)
    assert len(manifest.crcs) == len(manifest.starts) == 13
    for chunk, crc in enumerate(manifest.crcs):
        data = b"".join(store.get_range(manifest.shards[s].key, start, end - start) for s, start, end in manifest.ranges(chunk))
        assert zlib.crc32(data) == crc
    direct = write_noise(store.child("direct"), 203, shard_samples=45, chunk_samples=16)
    assert manifest.fingerprint == direct.fingerprint


def test_ids_without_a_sample_are_known(mixture: tuple[Store, Manifest]) -> None:
    manifest = mixture[1]
    assert manifest.samples == 208 + 96 + 56
    there = manifest.exists(np.arange(manifest.samples + 8))
    assert np.flatnonzero(~there).tolist() == [*range(203, 208), *range(298, 304), *range(354, 368)]


def test_data_sets_that_do_not_fit_together_are_named(store: Store) -> None:
    write_noise(store.child("a"), 60)
    write_noise(store.child("coarse"), 100, chunk_samples=64)
    a, coarse = (store.child(name).uri for name in ("a", "coarse"))
    broken = write_shards(noise_source(30, 16), store.child("b"))
    save_manifest(store.child("b"), replace(broken, schema=replace(broken.schema, image_size=9)))
    with pytest.raises(DataError, match=r"/b has other images or classes than .*/a"):
        save_mixture(store.child("m"), {a: 1, store.child("b").uri: 1})
    with pytest.raises(DataError, match=r"/a has 60 samples, fewer than the 64 of a chunk"):
        save_mixture(store.child("m"), {coarse: 1, a: 1})
    with pytest.raises(DataError, match="no manifest"):
        save_mixture(store.child("m"), {a: 1, store.child("none").uri: 1})
    save_mixture(store.child("m"), {a: 1})
    with pytest.raises(DataError, match="is a mixture itself"):
        save_mixture(store.child("n"), {store.child("m").uri: 1, a: 1})
    with pytest.raises(DataError, match=r"is a mixture; set data\.uri to one of its data sets"):
        next(iter(scan(store.child("m"), load_manifest(store.child("m")))))


def test_a_data_set_that_changed_since_is_named(mixture: tuple[Store, Manifest], store: Store) -> None:
    write_noise(store.child("b"), 91, shard_samples=45, chunk_samples=4)
    with pytest.raises(DataError, match=r"/b has changed since it became part of .*/mixed/manifest\.json"):
        load_manifest(mixture[0])


def test_memory_is_reckoned_by_the_weights(store: Store) -> None:
    """Nine of ten samples are from the data set with images of 32 pixels, although it holds one of four."""
    small, large = write_noise(store.child("small"), 60), write_noise(store.child("large"), 20, size=32)
    large = replace(large, schema=small.schema)
    mixed = join([("small", 1, small), ("large", 9, large)])
    assert mixed.sample_bytes == pytest.approx(0.1 * small.bytes / 60 + 0.9 * large.bytes / 20)
    assert mixed.bytes == small.bytes + large.bytes


def test_weights_belong_to_the_fingerprint(mixture: tuple[Store, Manifest], store: Store) -> None:
    parts = [(store.child(name).uri, 1, load_manifest(store.child(name))) for name in SIZES]
    assert join(parts).fingerprint != mixture[1].fingerprint
    assert (
        join([(uri, WEIGHTS[name], m) for name, (uri, _, m) in zip(SIZES, parts, strict=True)]).fingerprint
        == mixture[1].fingerprint
    )


@pytest.mark.usefixtures("no_hedges")
def test_the_traffic_of_all_data_sets_is_counted(mixture: tuple[Store, Manifest]) -> None:
    before = threading.active_count()
    place = {"global_batch": BATCH, "rank": 0, "world_size": 1, "start_step": 0}
    with Reader(*mixture, choose_order(mixture[1], BATCH, 0), **place, data=data_config()) as reader:
        count = reader.stats()["bytes"]
        for _ in range(30):
            next(reader)
        assert reader.stats()["bytes"] - count == mixture[1].bytes
    assert threading.active_count() == before
