"""Tests of stream.py and fetch.py: the batches are a function of (manifest, order, step), whatever reads them."""

import hashlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from freeguide.configs.errors import ConfigError, DataError
from freeguide.data_pipeline.fetch import plan
from freeguide.data_pipeline.manifest import Manifest
from freeguide.data_pipeline.order import Order, choose_order, slots
from freeguide.data_pipeline.store.base import Cancelled, Store
from freeguide.data_pipeline.store.folder import FolderStore
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stream import Batch, Reader
from tests.data_pipeline.conftest import data_config, item_of, noise_source, write_noise

BATCH = 24


def read(
    store: Store, manifest: Manifest, order: Order, steps: int, *, rank: int = 0, world: int = 1, start: int = 0, **options: object
) -> list[Batch]:
    place = {"global_batch": BATCH, "rank": rank, "world_size": world, "start_step": start}
    with Reader(store, manifest, order, **place, data=data_config(**options)) as reader:
        return [next(reader) for _ in range(steps)]


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and torch.equal(a.index, b.index)


def pixels(batch: Batch) -> np.ndarray:
    """The uint8 (b, H, W, C) that the images came from."""
    return ((batch.images + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Manifest]:
    """600 samples in 12 shards, chunks of 8 samples, so that chunks straddle shards."""
    store = open_store(str(tmp_path_factory.mktemp("data")))
    return store, write_noise(store, 603, chunk_samples=8)


def streaming(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the reader drop what it has used, as it does with data sets larger than its cache."""
    original = Reader.__init__

    def init(self: Reader, *args: object, **kwargs: object) -> None:
        from freeguide.data_pipeline.fetch import plan

        original(self, *args, **kwargs)  # type: ignore[arg-type]
        self._resident = False
        self._plan = plan(self.manifest, self.order, self.global_batch, self.slots, self._step, False)

    monkeypatch.setattr(Reader, "__init__", init)


def test_a_batch_holds_the_samples_of_its_positions(folder: tuple[Store, Manifest]) -> None:
    store, manifest = folder
    order = Order(603, 8, 4, 5, seed=1)
    source = noise_source(603)
    for step, batch in enumerate(read(store, manifest, order, 30)):
        positions = batch.index.numpy()
        assert np.array_equal(np.sort(positions), np.arange(step * BATCH, (step + 1) * BATCH))
        ids = order.locate(positions)[1]
        samples = [source.read(int(id_)) for id_ in ids]
        assert np.array_equal(pixels(batch), np.stack([sample.image for sample in samples]))
        assert batch.labels.tolist() == [sample.label for sample in samples]


def test_images_are_scaled_to_minus_one_to_one(folder: tuple[Store, Manifest]) -> None:
    batch = read(*folder, Order(603, 8, 4, 5, seed=1), 1)[0]
    assert batch.images.dtype == torch.float32
    assert batch.images.shape == (BATCH, 3, 8, 8)
    exact = torch.from_numpy(pixels(batch)).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(batch.images, exact)
    assert batch.images.min() == -1
    assert batch.images.max() == 1


@pytest.mark.parametrize(("streams", "drop"), [(1, False), (1, True), (6, True), (24, False), (24, True), (48, True)])
def test_every_world_size_makes_the_same_global_batches(
    folder: tuple[Store, Manifest], streams: int, drop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """R in {1, 2, 3, 4, 6, 8, 12}, 0 to 3 decode threads, start anywhere: bit for bit the batches of one rank."""
    if drop:
        streaming(monkeypatch)
    store, manifest = folder
    order = Order(603, 8, streams, 1 if streams == 48 else 3, seed=2)
    whole = read(store, manifest, order, 33)
    for number, world in enumerate((2, 3, 4, 6, 8, 12)):
        start = 3 * number
        for rank in range(world):
            options = {"decode_threads": rank % 4, "fetch_threads": 1 + rank % 3, "prefetch_batches": 1 + rank % 5}
            share = BATCH // world
            for step, batch in enumerate(read(store, manifest, order, 4, rank=rank, world=world, start=start, **options), start):
                part = slice(rank * share, (rank + 1) * share)
                expected = Batch(whole[step].images[part], whole[step].labels[part], whole[step].index[part])
                assert same(batch, expected), (world, rank, step)


def test_every_sample_comes_exactly_once_per_epoch_through_the_reader(store: Store) -> None:
    manifest = write_noise(store, 240)
    order = choose_order(manifest, BATCH, seed=0)
    batches = read(store, manifest, order, 20)
    for epoch in range(2):
        items = np.concatenate([item_of(pixels(batch)) for batch in batches[epoch * 10 : epoch * 10 + 10]])
        assert np.array_equal(np.sort(items), np.arange(240))


def test_any_step_can_be_the_first(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    streaming(monkeypatch)
    manifest = write_noise(store, 300, chunk_samples=4)
    order = Order(300, 4, 24, 2, seed=0)
    whole = read(store, manifest, order, 31)
    for start in (0, 1, 7, 8, 30):
        assert same(read(store, manifest, order, 1, start=start)[0], whole[start])


SCRIPT = """
import hashlib, sys
from freeguide.configs.schema import DataConfig
from freeguide.data_pipeline.stored import load_manifest
from freeguide.data_pipeline.order import Order, choose_order
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stream import Reader

store, start = open_store(sys.argv[1]), int(sys.argv[2])
data = DataConfig(uri="", image_size=8, classes=10)
order = Order(300, 4, 24, 2, 0)
reader = Reader(store, load_manifest(store), order, global_batch=24, rank=0, world_size=1, start_step=start, data=data)
for step, batch in enumerate(reader, start):
    print(step, hashlib.sha256(batch.images.numpy().tobytes()).hexdigest(), flush=True)
"""


def test_the_stream_continues_after_kill_9(tmp_path: Path) -> None:
    """The first process is killed in the middle of a step; all that is known is the last step that it printed."""
    store = open_store(str(tmp_path / "data"))
    manifest = write_noise(store, 300, chunk_samples=4)
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def lines(start: int, count: int) -> list[str]:
        command = [sys.executable, str(script), store.uri, str(start)]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
            assert process.stdout is not None
            found = [process.stdout.readline().strip() for _ in range(count)]
            process.kill()
        return found

    first = lines(0, 5)
    second = lines(5, 5)
    whole = read(store, manifest, Order(300, 4, 24, 2, 0), 10)
    expected = [f"{step} {hashlib.sha256(batch.images.numpy().tobytes()).hexdigest()}" for step, batch in enumerate(whole)]
    assert first + second == expected


def test_memory_stays_inside_the_cache(folder: tuple[Store, Manifest], monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the windows is enough for a steady stream; the peak never passes the cache where the windows fit."""
    streaming(monkeypatch)
    store, manifest = folder
    order = Order(603, 8, 6, 2, seed=0)
    monkeypatch.setattr("freeguide.data_pipeline.stream.MIB", 400_000)
    monkeypatch.setattr("freeguide.data_pipeline.fetch.JOINED", 20_000)
    assert order.generation * manifest.bytes // manifest.samples < 400_000
    with Reader(
        store, manifest, order, global_batch=BATCH, rank=0, world_size=1, start_step=0, data=data_config(cache_mib=1)
    ) as reader:
        batches = [next(reader) for _ in range(60)]
        peak = reader.stats()["peak_bytes"]
    assert peak <= 400_000
    assert peak > 20_000
    monkeypatch.undo()
    assert all(map(same, batches, read(store, manifest, order, 60)))


def test_windows_larger_than_the_cache_are_refused_with_the_size_that_helps(
    folder: tuple[Store, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("freeguide.data_pipeline.stream.MIB", 10_000)
    with pytest.raises(ConfigError, match=r"set data\.cache_mib=\d+"):
        read(*folder, Order(603, 8, 24, 3, seed=0), 1, cache_mib=2)


def test_a_batch_that_does_not_divide_is_refused(folder: tuple[Store, Manifest]) -> None:
    with pytest.raises(ConfigError, match="global_batch=24 does not divide by 5 workers"):
        read(*folder, Order(603, 8, 4, 5, seed=1), 1, world=5)


@pytest.mark.parametrize("options", [{"fetch_threads": 0}, {"decode_threads": -1}, {"prefetch_batches": 0}, {"cache_mib": 0}])
def test_settings_that_cannot_run_are_refused(folder: tuple[Store, Manifest], options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=r"data\.fetch_threads"):
        read(*folder, Order(603, 8, 4, 5, seed=1), 1, **options)


def test_an_order_of_another_data_set_is_refused(folder: tuple[Store, Manifest]) -> None:
    with pytest.raises(DataError, match="another data set"):
        read(*folder, Order(604, 8, 4, 5, seed=1), 1)


def test_close_joins_every_thread(folder: tuple[Store, Manifest]) -> None:
    before = threading.active_count()
    place = {"global_batch": BATCH, "rank": 0, "world_size": 1, "start_step": 0}
    reader = Reader(*folder, Order(603, 8, 4, 5, seed=1), **place, data=data_config())
    next(reader)
    assert threading.active_count() > before
    reader.close()
    assert threading.active_count() == before
    with pytest.raises(Cancelled):
        next(reader)


@pytest.mark.usefixtures("no_hedges")
def test_stats_count_what_was_read(folder: tuple[Store, Manifest]) -> None:
    store = FolderStore(Path(folder[0].uri))
    place = {"global_batch": BATCH, "rank": 0, "world_size": 1, "start_step": 0}
    with Reader(store, folder[1], Order(603, 8, 4, 5, seed=1), **place, data=data_config()) as reader:
        for _ in range(60):
            next(reader)
        stats = reader.stats()
    assert stats["bytes"] == folder[1].bytes  # a resident data set is read once, whatever the number of epochs
    assert 1 <= stats["gets"] <= len(folder[1].shards) + 2 * BATCH  # the chunks of the first batch by themselves, and the gaps
    assert stats["waited_s"] > 0
    assert stats["retries"] == {}
    assert stats["bad_samples"] == {}
    assert stats["get_s_p99"] >= stats["get_s_p50"] > 0


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("start", [0, 5, 40])
def test_a_start_waits_for_the_chunks_of_its_first_batch_alone(folder: tuple[Store, Manifest], resident: bool, start: int) -> None:
    """They are the first reads of the plan, whatever stands beside them; every chunk is read once per generation all the same."""
    manifest, order = folder[1], Order(603, 8, 12, 3, seed=1)
    first = start * BATCH // order.generation * order.generation
    reads, served = [], set()
    for fetch in plan(manifest, order, BATCH, slots(order, BATCH, 0, 1), start, resident):
        if not resident and fetch.first >= first + order.generation:
            break
        reads.append(fetch)
        served |= {slot for wanted in fetch.wanted for _, slot in wanted}
    ids = order.locate(np.arange(start * BATCH, (start + 1) * BATCH))[1]
    needed = set((ids // 8).tolist())
    count = sum(fetch.first < (start + 1) * BATCH for fetch in reads)
    assert {chunk for fetch in reads[:count] for chunk in fetch.chunks} == needed
    chunks = [chunk for fetch in reads for chunk in fetch.chunks]
    assert len(chunks) == len(set(chunks))
    assert served == set(range(603) if resident else range(start * BATCH, first + order.generation))


def test_undecoded_samples_feed_webdatasets_own_stages(folder: tuple[Store, Manifest]) -> None:
    order = Order(603, 8, 4, 5, seed=1)
    whole = read(*folder, order, 3)
    place = {"global_batch": BATCH, "rank": 0, "world_size": 1, "start_step": 0}
    with Reader(*folder, order, **place, data=data_config()) as reader:
        pipeline = webdataset.DataPipeline(
            reader.samples, webdataset.decode("rgb8"), webdataset.to_tuple("png", "cls", "__index__"), webdataset.batched(BATCH)
        )
        for (images, labels, index), batch in zip(pipeline, whole, strict=False):
            assert np.array_equal(images, pixels(batch))
            assert list(labels) == batch.labels.tolist()
            assert list(index) == batch.index.tolist()


def test_the_memory_of_a_worker_changes_no_batch(tmp_path: Path) -> None:
    """A data set of 1.8 MiB kept whole, and the same one read as it is needed because half of 2 MiB does not hold it."""
    store = open_store(str(tmp_path))
    manifest = write_noise(store, 603, size=20)
    assert 2**20 < manifest.bytes < 2**21
    order = choose_order(manifest, BATCH, seed=3)
    small, large = (read(store, manifest, order, 40, cache_mib=cache, image_size=20) for cache in (2, 512))
    assert all(map(same, small, large))
