"""The fault matrix: whatever S3 does to the reader, the batches are the same, or one sentence says where it ended."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from freeguide.configs.errors import DataError, StoreError, UserError
from freeguide.data_pipeline.fetch import READS, Gate
from freeguide.data_pipeline.manifest import Manifest
from freeguide.data_pipeline.order import Order
from freeguide.data_pipeline.store.base import Cancelled, ChangedObject, Retry, Store
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.store.s3 import S3Store
from freeguide.data_pipeline.stored import load_manifest
from freeguide.data_pipeline.stream import Batch, Reader
from tests.data_pipeline.conftest import data_config, s3_endpoint, s3_uri, write_noise  # noqa: F401 (s3_endpoint is a fixture)
from tests.faults.proxy import FaultProxy

RETRY = Retry(attempts=4, base_s=0.01, cap_s=0.05, connect_s=1.0, read_s=0.4, first_s=4.0)
PATIENT = replace(RETRY, read_s=10.0, first_s=30.0)
ORDER = Order(samples=120, chunk_samples=4, streams=6, window_chunks=2, seed=0)
RECOVERABLE = {
    "503": "busy",
    "500": "server error",
    "reset": "connection broken",
    "reset in body": "connection broken",
    "truncated": "truncated",
    "truncated without length": "truncated",
    "stall": "time-out",
    "drip": "slow",
    "bit": "checksum",
    "range ignored": "range ignored",
    "other range": "wrong range",
    "expired": "expired credentials",
}


@pytest.fixture(scope="module")
def direct(s3_endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> str:  # noqa: F811
    """The URI of a small data set, written without the proxy."""
    uri = s3_uri(tmp_path_factory.mktemp("faults"))
    write_noise(open_store(uri), 120, shard_samples=30, chunk_samples=4)
    return uri


@pytest.fixture
def proxy(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:  # noqa: F811
    with FaultProxy(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture(autouse=True)
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunk by chunk, so that there are enough reads to break."""
    monkeypatch.setattr("freeguide.data_pipeline.fetch.JOINED", 1)


def read(store: Store, manifest: Manifest, steps: int = 10, **options: object) -> tuple[list[Batch], dict[str, object]]:
    place = {"global_batch": 12, "rank": 0, "world_size": 1, "start_step": 0}
    with Reader(store, manifest, ORDER, **place, data=data_config(**options)) as reader:  # type: ignore[arg-type]
        return [next(reader) for _ in range(steps)], reader.stats()


@pytest.fixture(scope="module")
def expected(direct: str) -> list[Batch]:
    store = open_store(direct)
    return read(store, load_manifest(store))[0]


@pytest.mark.parametrize("fault", RECOVERABLE)
def test_a_fault_that_passes_changes_no_batch(fault: str, direct: str, expected: list[Batch], proxy: FaultProxy) -> None:
    store = open_store(direct, RETRY if fault in ("stall", "drip") else PATIENT)
    manifest = load_manifest(store)
    proxy.faults.extend(["", fault, "", "", fault, "", fault])
    batches, stats = read(store, manifest)
    for ours, theirs in zip(batches, expected, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.labels, theirs.labels)
        assert torch.equal(ours.index, theirs.index)
    assert not proxy.faults
    retries = stats["retries"]
    assert isinstance(retries, dict)
    retries.pop("time-out" if fault == "drip" else None, None)  # a busy machine may pause for as long as the test's time-out
    assert retries == {RECOVERABLE[fault]: 3} or (fault == "stall" and retries["time-out"] > 3)
    assert stats["bad_samples"] == {}


@pytest.mark.parametrize("fault", ["reset in body", "truncated", "truncated without length", "stall", "drip"])
def test_a_body_that_breaks_off_is_resumed_at_the_byte_it_reached(fault: str, direct: str, proxy: FaultProxy) -> None:
    # Only these two are noticed by the clock, so only there a machine that pauses for as long would look like the fault.
    store = open_store(direct, replace(PATIENT, read_s=2.0) if fault in ("stall", "drip") else PATIENT)
    key = "shards/000000.tar"
    data = store.get(key)
    proxy.ranges.clear()
    proxy.faults.append(fault)
    assert store.get_range(key, 100, 4000) == data[100:4100]
    assert proxy.ranges[0] == "bytes=100-4099"
    first = int(proxy.ranges[1].removeprefix("bytes=").partition("-")[0])
    assert first == 2100 if fault != "drip" else 100 < first < 1000  # 50 bytes a second, for two seconds
    assert len(proxy.ranges) == 2


def test_progress_earns_new_tries(direct: str, proxy: FaultProxy) -> None:
    """Eleven cut bodies in a row, with four tries allowed: each brings half of the rest, so it is a slow read and no failure."""
    store = open_store(direct, RETRY)
    data = store.get("shards/000000.tar")
    proxy.faults.extend(["truncated"] * 11)
    assert store.get_range("shards/000000.tar", 0, 4000) == data[:4000]


LASTING = {
    "503": (StoreError, "busy"),
    "500": (StoreError, "server error"),
    "reset": (StoreError, "connection broken"),
    "range ignored": (StoreError, "range ignored"),
    "other range": (StoreError, "wrong range"),
    "expired": (StoreError, "credentials .* have expired"),
    "bit": (DataError, "its bytes are not those that were indexed"),
}


@pytest.mark.parametrize("fault", LASTING)
def test_a_fault_that_stays_ends_in_one_sentence_with_shard_and_byte(fault: str, direct: str, proxy: FaultProxy) -> None:
    store = open_store(direct, RETRY)
    manifest = load_manifest(store)
    proxy.forever = fault
    kind, reason = LASTING[fault]
    with pytest.raises(UserError, match=r"shards/00000\d\.tar.* at byte \d+|at byte \d+ of shards/00000\d\.tar") as caught:
        read(store, manifest)
    assert isinstance(caught.value, kind)
    with pytest.raises(kind, match=reason):
        raise caught.value
    text = str(caught.value)
    assert not text.endswith(".")
    assert "\n" not in text
    tries = READS * len(manifest.crcs) if fault == "bit" else RETRY.attempts * data_config().fetch_threads
    assert len(proxy.ranges) <= tries


def test_an_object_that_changed_stops_the_stream(s3_endpoint: str, tmp_path: Path) -> None:  # noqa: F811
    store = open_store(s3_uri(tmp_path), RETRY)
    manifest = write_noise(store, 120, shard_samples=30, chunk_samples=4)
    data = bytearray(store.get("shards/000002.tar"))
    data[5000] ^= 1
    store.put("shards/000002.tar", bytes(data))
    with pytest.raises(ChangedObject, match=r"shards/000002\.tar at byte \d+ has changed"):
        read(store, manifest)


def test_a_slow_read_is_raced_and_the_faster_one_wins(direct: str, proxy: FaultProxy) -> None:
    """The late answer would end in a time-out, and the stream in a retry, if the stream waited for it."""
    store = open_store(direct, Retry(read_s=10))
    manifest = load_manifest(store)
    proxy.faults.extend([""] * 25 + ["late"])
    proxy.delay = 60.0
    with Reader(store, manifest, ORDER, global_batch=12, rank=0, world_size=1, start_step=0, data=data_config()) as reader:
        for _ in range(10):
            next(reader)
        stats = reader.stats()
    assert 1 <= stats["hedges_won"] <= stats["hedges"]  # one, and on a busy machine others that were slow by themselves
    assert stats["retries"] == {}


def test_concurrency_falls_under_overload_and_recovers(direct: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(8)
    for expected in (4, 2, 1, 1):
        gate.retried("busy")
        assert gate.limit == expected
    gate.retried("checksum")
    assert gate.limit == 1
    for _ in range(100):
        gate.succeeded()
    assert gate.limit == 8
    limits: list[float] = []
    retried = Gate.retried

    def noted(gate: Gate, cause: str) -> None:
        retried(gate, cause)
        limits.append(gate.limit)

    monkeypatch.setattr(Gate, "retried", noted)
    store = open_store(direct, PATIENT)  # a slow machine must not look like an overload
    manifest = load_manifest(store)
    proxy.faults.extend([""] * 10 + ["503"] + [""] * 10 + ["503"])
    _, stats = read(store, manifest, fetch_threads=4)
    assert (len(limits), limits[0]) == (2, 2.0)  # the reader's own gate, halved from 4 each time
    assert limits[0] < stats["concurrency"] <= 4


def test_a_spent_retry_budget_makes_every_pause_the_longest_one(
    direct: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two retries of debt are allowed. The third and fourth wait 0.5 s instead of at most 2 ms; ten good reads pay one back."""
    store = open_store(direct, replace(PATIENT, base_s=0.0005, cap_s=0.5, budget=2.0))
    store.get("shards/000000.tar")
    waits: list[float] = []
    monkeypatch.setattr("freeguide.data_pipeline.store.base.time.sleep", waits.append)

    def pauses(faults: int) -> list[float]:
        proxy.faults.extend(["503"] * faults)
        waits.clear()
        store.get_range("shards/000000.tar", 0, 1000)
        return list(waits)

    assert [pause <= 0.002 for pause in pauses(2)] == [True, True]
    assert pauses(2) == [0.5, 0.5]
    assert store.traffic.debt == pytest.approx(3.8)
    for _ in range(30):
        assert pauses(0) == []
    assert store.traffic.debt == pytest.approx(0.8)
    assert [pause <= 0.002 for pause in pauses(1)] == [True]


def test_closing_does_not_wait_for_a_read_that_hangs(direct: str, proxy: FaultProxy) -> None:
    """The answers stop half-way, and the store waits for more: it still does when the reader has been closed."""
    store = open_store(direct, replace(PATIENT, read_s=30.0))
    manifest = load_manifest(store)
    proxy.forever = "stall"
    reader = Reader(store, manifest, ORDER, global_batch=12, rank=0, world_size=1, start_step=0, data=data_config())
    reader._start(0)
    while not proxy.ranges:
        time.sleep(0.01)
    time.sleep(0.2)
    reader.close()
    assert any(thread.is_alive() for thread in reader._fetcher._pool._threads)
    assert not any(thread.is_alive() for thread in reader._threads)
    with pytest.raises(Cancelled):
        next(reader)


def test_expired_credentials_are_fetched_anew(direct: str, proxy: FaultProxy) -> None:
    store = open_store(direct, RETRY)
    assert isinstance(store, S3Store)
    data = store.get("shards/000000.tar")
    before = store._client()
    proxy.faults.append("expired")
    assert store.get_range("shards/000000.tar", 0, 1000) == data[:1000]
    assert store._client() is not before
