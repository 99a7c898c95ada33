"""Tests of cache.py: never stale, never torn, never over its limit, never anyone else's file."""

import os
from pathlib import Path

import pytest
import torch

from freeguide.data_pipeline.order import Order
from freeguide.data_pipeline.store.base import ChangedObject, Store
from freeguide.data_pipeline.store.cache import CachedStore
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stream import Reader
from tests.data_pipeline.conftest import data_config, killed_while_writing, write_noise


def cached(store: Store, folder: Path, limit: int = 10**6) -> CachedStore:
    return CachedStore(store, folder / "cache", limit)


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in (folder / "cache").iterdir())


def test_a_second_read_comes_from_the_disk(store: Store, tmp_path: Path) -> None:
    data = os.urandom(5000)
    etag = store.put("key", data)
    cache = cached(store, tmp_path)
    gets = []
    for _ in range(3):
        assert cache.get_range("key", 100, 2000, etag) == data[100:2100]
        gets.append(store.traffic.gets)
    assert gets[0] == gets[2]
    assert (cache.hits, cache.misses) == (2, 1)


def test_another_version_or_range_is_another_entry(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "data"))
    old = store.put("key", b"a" * 100)
    cache = cached(store, tmp_path)
    cache.get_range("key", 0, 50, old)
    new = store.put("key", b"b" * 101)
    assert cache.get_range("key", 0, 50, new) == b"b" * 50
    assert cache.get_range("key", 0, 51, new) == b"b" * 51
    with pytest.raises(ChangedObject):
        cache.get_range("key", 0, 49, old)


def test_reads_without_an_etag_are_not_kept(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "data"))
    store.put("key", b"a" * 100)
    cache = cached(store, tmp_path)
    cache.get_range("key", 0, 50)
    store.put("key", b"b" * 100)
    assert cache.get_range("key", 0, 50) == b"b" * 50


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: b"x" + raw[1:], lambda raw: b""])
def test_damaged_entries_are_read_again(tmp_path: Path, damage: object) -> None:
    store = open_store(str(tmp_path / "data"))
    data = os.urandom(100)
    etag = store.put("key", data)
    cache = cached(store, tmp_path)
    cache.get_range("key", 0, 100, etag)
    (entry,) = (tmp_path / "cache").iterdir()
    entry.write_bytes(damage(entry.read_bytes()))  # type: ignore[operator]
    assert cache.get_range("key", 0, 100, etag) == data
    assert cache.misses == 2
    assert cache.get_range("key", 0, 100, etag) == data
    assert cache.hits == 1


def test_the_limit_holds_and_the_least_recently_read_go_first(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "data"))
    etag = store.put("key", os.urandom(10_000))
    cache = cached(store, tmp_path, limit=3 * 1004)
    stranger = tmp_path / "cache" / "precious.txt"
    stranger.write_bytes(b"")
    for number in range(8):
        cache.get_range("key", number * 1000, 1000, etag)
        cache.get_range("key", 0, 1000, etag)  # always the last but one to be read
        for tick, path in enumerate(sorted((tmp_path / "cache").glob("*.range"), key=lambda path: path.stat().st_mtime_ns)):
            os.utime(path, (1000 + tick, 1000 + tick))  # clocks of files are coarse
        assert size(tmp_path) <= 3 * 1004
    assert cache.misses == 8
    assert stranger.exists()


def test_a_range_over_the_limit_is_passed_through(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "data"))
    etag = store.put("key", bytes(10_000))
    cache = cached(store, tmp_path, limit=5000)
    assert len(cache.get_range("key", 0, 10_000, etag)) == 10_000
    assert size(tmp_path) == 0


def refused(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("trouble", ["a file in the way", "full disk", "no right to write"])
def test_a_folder_that_cannot_be_used_costs_the_cache_and_one_warning(
    trouble: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path / "data"))
    etag = store.put("key", b"a" * 100)
    folder = tmp_path / "cache"
    if trouble == "a file in the way":
        folder = folder / "below"
        (tmp_path / "cache").write_bytes(b"")
    if trouble == "full disk":
        monkeypatch.setattr("freeguide.data_pipeline.store.cache.os.replace", refused)
    if trouble == "no right to write":  # also for root, whom no mode of a folder stops
        monkeypatch.setattr("freeguide.data_pipeline.store.unfinished.fcntl.flock", refused)
        monkeypatch.setattr("freeguide.data_pipeline.store.unfinished.open", lambda *_: refused(), raising=False)
    for start in range(3):  # as many caches as a mixture has data sets
        for _ in range(2):
            assert CachedStore(store, folder, 10**6).get_range("key", start, 50, etag) == b"a" * 50
    said = capfd.readouterr().err
    assert said.count("WARNING: reading goes on without the disk cache") == 1
    assert str(folder) in said
    if trouble == "full disk":
        assert list(folder.iterdir()) == []  # what was begun is gone


def test_the_limit_holds_after_any_number_of_kills(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "data"))
    etag = store.put("key", os.urandom(10_000))
    killed_while_writing(
        "from freeguide.data_pipeline.store.cache import CachedStore\n"
        f"CachedStore(open_store({str(tmp_path / 'data')!r}), Path({str(tmp_path / 'cache')!r}), 5000)"
        f".get_range('key', 0, 2000, {etag!r})",
        kills=4,
    )
    (tmp_path / "cache" / f"{'0' * 64}.12-34").write_bytes(bytes(2000))  # of an earlier version
    os.utime(tmp_path / "cache" / f"{'0' * 64}.12-34", (1, 1))
    assert size(tmp_path) > 2000
    cached(store, tmp_path, 5000).get_range("key", 0, 1000, etag)
    assert size(tmp_path) == 1004
    killed_while_writing(
        "from freeguide.data_pipeline.store.cache import CachedStore\n"
        f"CachedStore(open_store({str(tmp_path / 'data')!r}), Path({str(tmp_path / 'cache')!r}), 5000)"
        f".get_range('key', 0, 2000, {etag!r})",
        kills=1,
    )
    assert cached(store, tmp_path, 5000).clean_up() > 0
    assert size(tmp_path) == 1004


def test_the_reader_keeps_its_reads_where_the_configuration_says(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "data"))
    manifest = write_noise(store, 200, chunk_samples=4)
    config = data_config(disk_cache=str(tmp_path / "cache"), disk_cache_gib=1e-3)
    place = {"global_batch": 20, "rank": 0, "world_size": 1, "start_step": 0}
    runs = []
    for _ in range(2):
        fresh = open_store(str(tmp_path / "data"))
        with Reader(fresh, manifest, Order(200, 4, 5, 5, 0), **place, data=config) as reader:
            runs.append([next(reader).images for _ in range(10)])
            read = reader.stats()["bytes"]
    assert all(map(torch.equal, *runs))
    assert size(tmp_path) > manifest.bytes // 2
    assert read == 0  # the second run, on the same node, asks the store for nothing


def test_the_batches_are_the_same_through_a_cache(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "data"))
    manifest = write_noise(store, 200, chunk_samples=4)
    place = {"global_batch": 20, "rank": 0, "world_size": 1, "start_step": 0}
    runs = []
    for source in (store, cached(store, tmp_path), cached(store, tmp_path)):
        with Reader(source, manifest, Order(200, 4, 5, 5, 0), **place, data=data_config()) as reader:
            runs.append([next(reader).images for _ in range(12)])
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))
    assert size(tmp_path) > 0
