"""The fetch plane: which bytes a rank needs, in which order, and how they come whole.

`plan` turns the order into ranged reads. Within one generation (every stream's current window) it collects the samples of this
rank, groups them by chunk, joins neighbouring chunks into reads of up to 8 MiB, and sorts the reads by first use. `Fetcher` makes
them: every chunk must have its CRC and hold its q samples. A copy of the data has the same content under other etags: an object
with another etag is read as what it is now, if its size fits, and the CRCs tell. What the store cannot repair by itself is
repaired here: a wrong CRC is read again, a read slower than nearly all others is raced by a second one (hedging, Dean & Barroso
2013), and the number of concurrent reads is halved when the server is overloaded and grows by one per round when it is not (AIMD).
"""

from __future__ import annotations

import itertools
import threading
import zlib
from collections.abc import Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass, field

import numpy as np

from freeguide.data_pipeline import tar
from freeguide.data_pipeline.decode import BadSample
from freeguide.data_pipeline.manifest import Manifest
from freeguide.data_pipeline.order import AnyOrder, Ints
from freeguide.data_pipeline.store.base import AGAIN, Cancelled, ChangedObject, Store

JOINED = 8 * 2**20  # bytes up to which neighbouring chunks are read together
READS = 3  # reads of a chunk whose CRC is wrong, before the chunk counts as damaged
CLOSING = 1.0  # seconds that closing waits for reads to notice it
OVERLOAD = ("busy", "time-out", "slow", "no connection")

Fields = dict[str, bytes]
Wanted = tuple[tuple[int, int], ...]  # (number of the sample in its chunk, slot it is kept under)


@dataclass(frozen=True)
class Fetch:
    """Neighbouring chunks that are read together."""

    first: int  # the earliest position that waits for it
    bytes: int  # what it may add to the bytes that are held
    chunks: tuple[int, ...]
    wanted: tuple[Wanted, ...]  # for each chunk


def plan(manifest: Manifest, order: AnyOrder, global_batch: int, slots: Ints, start: int, resident: bool) -> Iterator[Fetch]:
    """Every read of a rank from step `start` on, without end; with `resident`, every chunk once and then nothing more.

    Samples are kept under their global position, or under their id if they stay resident. The chunks of the first batch come
    first, not joined to what stands beside them: a start, a resume too, waits for them alone.
    """
    begun = start * global_batch // order.generation
    for generation in itertools.count(begun):
        first, end = generation * order.generation, (generation + 1) * order.generation
        steps = np.arange(max(start, first // global_batch), -(-end // global_batch), dtype=np.int64)
        positions = (steps[:, None] * global_batch + slots).reshape(-1)
        positions = positions[(positions >= first) & (positions < end)]
        ids, keys, uses = order.locate(positions)[1], positions, positions
        if resident:
            late = np.full(manifest.samples, np.iinfo(np.int64).max)
            late[ids] = positions
            ids = keys = np.flatnonzero(manifest.exists(np.arange(manifest.samples)))
            uses = late[ids]
        # A single window is small data, of which a batch needs a sample from nearly every read anyway.
        at_once = generation == begun and order.streams > 1
        chunks = ids // manifest.chunk_samples
        now = np.isin(chunks, chunks[uses < (start + 1) * global_batch]) & at_once
        yield from _join(manifest, ids[now], keys[now], uses[now])
        yield from _join(manifest, ids[~now], keys[~now], uses[~now])
        if resident:
            return


def _join(manifest: Manifest, ids: Ints, slots: Ints, positions: Ints) -> list[Fetch]:
    """The reads for these samples, sorted by first use."""
    by_id = np.argsort(ids, kind="stable")
    ids, slots, positions = ids[by_id], slots[by_id], positions[by_id]
    numbers, begins = np.unique(ids // manifest.chunk_samples, return_index=True)
    ends = np.append(begins[1:], len(ids))
    groups: list[list[int]] = []
    sizes: list[int] = []
    for row, chunk in enumerate(numbers.tolist()):
        windows = -(-int(ends[row] - begins[row]) // manifest.chunk_samples)  # two if an epoch ends inside the generation
        size = windows * sum(end - start for _, start, end in manifest.ranges(chunk))
        if row == 0 or chunk != numbers[row - 1] + 1 or sizes[-1] + size > JOINED:
            groups.append([])
            sizes.append(0)
        groups[-1].append(row)
        sizes[-1] += size
    within = ids % manifest.chunk_samples
    fetches = []
    for rows, size in zip(groups, sizes, strict=True):
        parts = [slice(begins[row], ends[row]) for row in rows]
        wanted = tuple(tuple(zip(within[part].tolist(), slots[part].tolist(), strict=True)) for part in parts)
        earliest = int(positions[parts[0].start : parts[-1].stop].min())
        fetches.append(Fetch(earliest, size, tuple(int(numbers[row]) for row in rows), wanted))
    return sorted(fetches, key=lambda fetch: fetch.first)


@dataclass
class Gate:
    """How many reads may be under way: additive increase, multiplicative decrease."""

    most: int
    limit: float = 0.0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.limit = float(self.most)

    def succeeded(self) -> None:
        with self.lock:
            self.limit = min(self.most, self.limit + 1 / self.limit)

    def retried(self, cause: str) -> None:
        if cause in OVERLOAD:
            with self.lock:
                self.limit = max(1.0, self.limit / 2)


class Fetcher:
    """Makes the reads of one rank, from any number of threads."""

    def __init__(self, store: Store, manifest: Manifest, threads: int, parts: Mapping[str, Store] | None = None) -> None:
        """`parts`: the stores of a mixture's data sets by their URIs."""
        self.store, self.manifest, self.parts = store, manifest, parts or {}
        self.gate = Gate(threads)
        self.hedges = self.hedges_won = 0
        self._etags: dict[int, str] = {}  # of shards that are not the objects that were indexed, by their number
        self._lock = threading.Lock()
        self._running: dict[threading.Event, futures.Future[bytes]] | None = {}  # setting the events stops the reads; None = closed
        self._closing: futures.Future[bytes] = futures.Future()  # done when closed, to be waited for beside the reads
        self._pool = futures.ThreadPoolExecutor(2 * threads, thread_name_prefix="freeguide-get")

    def close(self) -> None:
        """Stops the reads. One that the network has left hanging is abandoned; it ends by the store's own time-out."""
        with self._lock:
            running, self._running = self._running or {}, None
            if not self._closing.done():
                self._closing.set_result(b"")
        for cancel in running:
            cancel.set()
        _, hanging = futures.wait(running.values(), timeout=CLOSING)
        self._pool.shutdown(wait=not hanging)

    def read(self, fetch: Fetch) -> dict[int, Fields | BadSample]:
        """The fields of every wanted sample by slot, or why there are none. Raises StoreError, Cancelled."""
        found: dict[int, Fields | BadSample] = {}
        pieces = self._pieces(fetch)
        for chunk, wanted in zip(fetch.chunks, fetch.wanted, strict=True):
            found.update(self._unpack(chunk, wanted, pieces))
        return found

    def sample(self, id_: int) -> Fields | BadSample:
        """One sample out of turn."""
        chunk, number = divmod(id_, self.manifest.chunk_samples)
        return self.read(Fetch(0, 0, (chunk,), (((number, id_),),)))[id_]

    def _pieces(self, fetch: Fetch) -> list[tuple[int, int, bytes]]:
        """(shard, first byte, bytes) of the joined ranges of all its chunks."""
        ranges: list[tuple[int, int, int]] = []
        for shard, start, end in (part for chunk in fetch.chunks for part in self.manifest.ranges(chunk)):
            if ranges and ranges[-1][0] == shard and ranges[-1][2] == start:
                ranges[-1] = (shard, ranges[-1][1], end)
            else:
                ranges.append((shard, start, end))
        return [(shard, start, self._get(shard, start, end)) for shard, start, end in ranges]

    def _unpack(self, chunk: int, wanted: Wanted, pieces: list[tuple[int, int, bytes]]) -> dict[int, Fields | BadSample]:
        parts, read = [], []
        for shard, start, end in self.manifest.ranges(chunk):
            at, data = next((at, data) for number, at, data in pieces if number == shard and at <= start and end <= at + len(data))
            parts.append(memoryview(data)[start - at : end - at])
            read.append((shard, at, at + len(data)))
        crc = self._sum(parts)
        for _ in range(READS - 1):
            if crc == self.manifest.crcs[chunk]:
                break
            self.store.traffic.retried("checksum")
            for part in [*read, *self.manifest.ranges(chunk)]:
                self._forget(*part)
            parts = [memoryview(self._get(*part)) for part in self.manifest.ranges(chunk)]
            crc = self._sum(parts)
        other = next((part for part in self.manifest.ranges(chunk) if part[0] in self._etags), None)
        if crc != self.manifest.crcs[chunk] and other is not None:
            store, key = self._place(other[0])
            raise ChangedObject(f"{store.uri}/{key} at byte {other[1]} has changed since its manifest was written; {AGAIN}")
        try:
            if crc != self.manifest.crcs[chunk]:
                raise BadSample("checksum", "its bytes are not those that were indexed")
            whole = self.manifest.in_chunk(chunk)
            spans = tar.at_least(whole, lambda rule: ((span, part) for part in parts for span in tar.samples(part, rule=rule)))
            if len(spans) != whole:
                raise BadSample("tar", f"its chunk holds {len(spans)} samples, not {whole}")
        except BadSample as error:
            return {slot: error for _, slot in wanted}
        except tar.TarError as error:
            return {slot: BadSample("tar", error.reason) for _, slot in wanted}
        return {slot: {"__key__": spans[n][0].key.encode(), **spans[n][0].read(spans[n][1])} for n, slot in wanted}

    @staticmethod
    def _sum(parts: list[memoryview]) -> int:
        crc = 0
        for part in parts:
            crc = zlib.crc32(part, crc)
        return crc

    def _get(self, shard: int, start: int, end: int) -> bytes:
        """One ranged read of the object that was indexed, or of what stands in its place if that has the same size."""
        etag = self._etags.get(shard, self.manifest.shards[shard].etag)
        try:
            return self._race(shard, start, end, etag)
        except ChangedObject:
            store, key = self._place(shard)
            now = store.stat(key)
            if now.bytes != self.manifest.shards[shard].bytes or now.etag == etag:
                raise
            self._etags[shard] = now.etag
            return self._race(shard, start, end, now.etag)

    def _forget(self, shard: int, start: int, end: int) -> None:
        """The next read comes from the store itself, whatever a cache holds."""
        store, key = self._place(shard)
        store.forget(key, start, end - start, self._etags.get(shard, self.manifest.shards[shard].etag))

    def _race(self, shard: int, start: int, end: int, etag: str) -> bytes:
        """One ranged read; if it takes longer than nearly all others did, the faster of two."""
        cancels = [threading.Event(), threading.Event()]
        try:
            first = self._submit(shard, start, end, etag, cancels[0])
            racing = [first, self._closing]
            done, _ = futures.wait(racing, timeout=self._patience(), return_when=futures.FIRST_COMPLETED)
            if not done:
                with self._lock:
                    self.hedges += 1
                second = self._submit(shard, start, end, etag, cancels[1])
                racing.append(second)
                ended = futures.as_completed(racing)
                winner = next(future for future in ended if future.exception() is None or (first.done() and second.done()))
                with self._lock:
                    self.hedges_won += winner is second
            else:
                winner = first if first in done else self._closing
            if winner is self._closing:
                raise Cancelled
            data = winner.result()
        finally:
            for cancel in cancels:
                cancel.set()  # the slower one stops at its next piece
            with self._lock:
                if self._running is not None:
                    for cancel in cancels:
                        self._running.pop(cancel, None)
        self.gate.succeeded()
        return data

    def _submit(self, shard: int, start: int, end: int, etag: str, cancel: threading.Event) -> futures.Future[bytes]:
        store, key = self._place(shard)
        with self._lock:
            if self._running is None:
                raise Cancelled
            read = self._pool.submit(store.get_range, key, start, end - start, etag, cancel=cancel, on_retry=self.gate.retried)
            self._running[cancel] = read
        return read

    def _place(self, shard: int) -> tuple[Store, str]:
        """The store and the key of a shard."""
        key = self.manifest.shards[shard].key
        uri = next((uri for uri in self.parts if key.startswith(f"{uri}/")), None)
        return (self.store, key) if uri is None else (self.parts[uri], key[len(uri) + 1 :])

    def _patience(self) -> float | None:
        """Seconds after which a read is raced; None if nothing is known yet or a twentieth of the reads has been raced."""
        traffic = self.store.traffic
        with traffic.lock:
            times = sorted(traffic.total_s)
        if len(times) < 20 or self.hedges * 20 > traffic.gets:
            return None
        return max(0.05, 2 * times[len(times) * 19 // 20])
