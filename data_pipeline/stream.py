"""The batches of one rank: step after step, the same whatever the threads, the memory and the network do.

`order` says which samples a step needs, `fetch` brings their bytes, and here threads turn them into batches. Fetch threads work
through the plan as far ahead as `data.cache_mib` allows; decode threads build whole batches, `data.prefetch_batches` ahead of the
consumer. Threads decide when something happens, never what: batch t is a function of (manifest, order, t).

A data set that fits into half of the cache stays in memory after its first epoch. Otherwise a sample is kept from the read of its
chunk to its use. A read that the next batch waits for is always let through, so a full cache cannot stop the stream.

The state of the stream is one integer, the step: to resume, give it as `start_step`.
"""

from __future__ import annotations

import functools
import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from freeguide.configs.errors import ConfigError, DataError
from freeguide.configs.schema import DataConfig
from freeguide.data_pipeline.decode import BadSample, decode_sample
from freeguide.data_pipeline.fetch import Fetch, Fetcher, Fields, plan
from freeguide.data_pipeline.manifest import Manifest
from freeguide.data_pipeline.order import AnyOrder, Ints, slots
from freeguide.data_pipeline.store.base import Cancelled, Store
from freeguide.data_pipeline.store.cache import CachedStore
from freeguide.data_pipeline.store.open import open_like

MIB = 2**20
DONORS = 16  # donors tried for one position

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Batch:
    """One rank's share b = B / R of a global batch."""

    images: torch.Tensor  # float32 (b, C, H, W): images in [-1, 1], x / 127.5 - 1; latents times data.latent_scale
    labels: torch.Tensor  # int64 (b,)
    index: torch.Tensor  # int64 (b,) global position of each sample occurrence: it keys all randomness of the training


class Reader:
    """Iterates over the batches of steps start_step, start_step + 1, ... without end.

    Raises ConfigError if the batch does not divide by the world size or the windows do not fit into the cache. Iteration raises
    DataError over the budget of bad samples and StoreError if the store fails for good; both name the shard and the place.
    """

    def __init__(
        self,
        store: Store,
        manifest: Manifest,
        order: AnyOrder,
        *,
        global_batch: int,
        rank: int,
        world_size: int,
        start_step: int,
        data: DataConfig,
    ) -> None:
        if not 0 <= rank < world_size or global_batch < 1 or start_step < 0:
            raise ValueError(f"rank {rank} of {world_size}, batch {global_batch}, step {start_step} is no place in a stream")
        if global_batch % world_size:
            raise ConfigError(f"train.global_batch={global_batch} does not divide by {world_size} workers; change one of them")
        if min(data.fetch_threads, data.prefetch_batches, data.cache_mib) < 1 or data.decode_threads < 0:
            raise ConfigError("data.fetch_threads, prefetch_batches and cache_mib must be at least 1, decode_threads at least 0")
        if order.samples != manifest.samples or order.chunk_samples != manifest.chunk_samples:
            raise DataError(f"The order of this run is for another data set than {store.uri}; restore that data set")
        self.manifest, self.order, self.data = manifest, order, data
        self.global_batch, self.slots = global_batch, slots(order, global_batch, rank, world_size)
        self._budget = data.cache_mib * MIB
        self._resident = manifest.bytes <= self._budget // 2
        window = int(order.generation * manifest.sample_bytes) // world_size
        if not self._resident and window > self._budget:
            raise ConfigError(
                f"The windows of this run take {window // MIB + 1} MiB per worker; set data.cache_mib={2 * window // MIB + 1}"
            )
        parts = {part.uri: _cached(open_like(store, part.uri), data) for part in manifest.parts}
        self._fetcher = Fetcher(_cached(store, data), manifest, data.fetch_threads, parts)
        self._plan = plan(manifest, order, global_batch, self.slots, start_step, self._resident)
        self._step = self._next_build = start_step  # next to be consumed; next to be built
        self._kept: dict[int, Fields | BadSample] = {}  # by position, or by id if the data set stays resident
        self._held = self._peak = 0  # bytes kept and under way
        self._under_way = 0
        self._ready: dict[int, Batch] = {}
        self._waited = 0.0
        self._bad: dict[int, str] = {}  # id -> cause
        self._donated = 0
        self._error: BaseException | None = None
        self._closed = False
        self._change = threading.Condition()
        self._plan_lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        self._start(self.data.decode_threads)
        began = time.monotonic()
        if self.data.decode_threads == 0:
            batch = self._build(self._step)
        else:
            with self._change:
                self._wait(lambda: self._step in self._ready)
                batch = self._ready.pop(self._step)
        with self._change:
            self._waited += time.monotonic() - began
            self._step += 1
            self._change.notify_all()
        return batch

    def samples(self) -> Iterator[dict[str, Any]]:
        """The same stream undecoded, sample by sample, as WebDataset's stages expect it: instead of the batches, not beside them.

        Each is {"__key__", "__index__": global position, "png": bytes, ...}, for `webdataset.DataPipeline(reader.samples, ...)`.
        """
        self._start(0)
        for step in itertools.count(self._step):
            for position, fields in self._usable(step, dict):
                yield {**fields, "__key__": fields["__key__"].decode(), "__index__": position}
            with self._change:
                self._step += 1
                self._change.notify_all()

    def close(self) -> None:
        """Stops and joins all threads, in a second or so. The reader cannot be used again."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._fetcher.close()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def stats(self) -> dict[str, Any]:
        """Counts since the start: what was read, how long it took and the consumer waited, what failed and what replaced it."""
        traffic = self._fetcher.store.traffic
        with traffic.lock, self._change:
            times = {"first_byte_s": list(traffic.first_byte_s), "get_s": list(traffic.total_s)}
            stats = {
                "bytes": traffic.bytes,
                "gets": traffic.gets,
                "retries": dict(traffic.retries),
                "hedges": self._fetcher.hedges,
                "hedges_won": self._fetcher.hedges_won,
                "concurrency": self._fetcher.gate.limit,
                "held_bytes": self._held,
                "peak_bytes": self._peak,
                "ready_batches": len(self._ready),
                "waited_s": self._waited,
                "bad_samples": dict(Counter(self._bad.values())),
                "donated": self._donated,
            }
        for name, values in times.items():
            for percent in (50, 95, 99):
                stats[f"{name}_p{percent}"] = float(np.percentile(values, percent)) if values else 0.0
        return stats

    # ------------------------------------------------------------------------------------------------------------ threads

    def _start(self, decode_threads: int) -> None:
        if self._threads or self._closed:
            return
        targets = [self._fetch_loop] * self.data.fetch_threads + [self._decode_loop] * decode_threads
        self._threads = [threading.Thread(target=self._guarded, args=(target,), daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    def _guarded(self, loop: Any) -> None:
        try:
            loop()
        except Cancelled:
            pass
        except BaseException as error:
            with self._change:
                self._error = self._error or error
                self._change.notify_all()

    def _wait(self, condition: Any) -> None:
        """Waits, with `_change` held, until the condition is true; before it is, raises what another thread has raised."""
        while not condition():
            if self._closed:
                raise Cancelled
            if self._error is not None:
                raise self._error
            self._change.wait()
        if self._closed:
            raise Cancelled

    def _fetch_loop(self) -> None:
        while True:
            with self._plan_lock:  # reads are let through in the order of their first use
                fetch = next(self._plan, None)
                if fetch is None:
                    return
                self._admit(fetch)
            samples = self._fetcher.read(fetch)
            with self._change:
                self._under_way -= 1
                self._kept.update(samples)
                self._hold(sum(map(_size, samples.values())) - fetch.bytes)
                self._change.notify_all()

    def _admit(self, fetch: Fetch) -> None:
        with self._change:
            self._wait(lambda: self._may_start(fetch))
            self._under_way += 1
            self._hold(fetch.bytes)

    def _may_start(self, fetch: Fetch) -> bool:
        if self._under_way >= max(1, int(self._fetcher.gate.limit)):
            return False
        return self._held + fetch.bytes <= self._budget or fetch.first < (self._step + 1) * self.global_batch

    def _hold(self, size: int) -> None:
        self._held += size
        self._peak = max(self._peak, self._held)

    def _decode_loop(self) -> None:
        while True:
            with self._change:
                self._wait(lambda: self._next_build < self._step + self.data.prefetch_batches)
                step = self._next_build
                self._next_build += 1
            batch = self._build(step)
            with self._change:
                self._ready[step] = batch
                self._change.notify_all()

    # ------------------------------------------------------------------------------------------------------------ batches

    def _build(self, step: int) -> Batch:
        schema = self.manifest.schema
        # Shards of `prepare` were written whole, and the CRCs of their chunks cover them ever since.
        foreign = self.manifest.source in ("index", "mixture")
        decode = functools.partial(decode_sample, schema=schema, strict=foreign)
        images = np.empty((len(self.slots), *schema.shape), schema.dtype)
        labels, index = np.empty(len(self.slots), np.int64), np.empty(len(self.slots), np.int64)
        for row, (position, (image, label)) in enumerate(self._usable(step, decode)):
            images[row], labels[row], index[row] = image, label, position
        if schema.dtype == "uint8":
            x = torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
            x.div_(127.5).sub_(1)
        else:
            x = torch.from_numpy(images).to(torch.float32).mul_(self.data.latent_scale)
        return Batch(x, torch.from_numpy(labels), torch.from_numpy(index))

    def _usable(self, step: int, use: Callable[[Fields], T]) -> Iterator[tuple[int, T]]:
        """For each position of a step: the position, and `use` of its sample, or of a donor if that raises BadSample."""
        positions = step * self.global_batch + self.slots
        ids = self.order.locate(positions)[1]
        for position, id_, sample in zip(positions.tolist(), ids.tolist(), self._take(positions, ids), strict=True):
            yield position, self._or_donor(position, id_, sample, use)

    def _or_donor(self, position: int, id_: int, kept: Fields | BadSample, use: Callable[[Fields], T]) -> T:
        for attempt in range(DONORS):
            try:
                if isinstance(kept, BadSample):
                    raise kept
                return use(kept)
            except BadSample as error:
                self._report(id_, error)
            id_ = self.order.donor(position, attempt)
            kept = self._fetcher.sample(id_)
        raise DataError(f"{DONORS} donors in a row for position {position} cannot be read either; index the data again")

    def _take(self, positions: Ints, ids: Ints) -> list[Fields | BadSample]:
        """Waits for the samples of these positions and hands them over."""
        wanted = (ids if self._resident else positions).tolist()
        missing = wanted

        def arrived() -> bool:
            nonlocal missing
            missing = [slot for slot in missing if slot not in self._kept]
            return not missing

        with self._change:
            self._wait(arrived)
            if self._resident:
                return [self._kept[slot] for slot in wanted]
            samples = [self._kept.pop(slot) for slot in wanted]
            self._hold(-sum(map(_size, samples)))
            self._change.notify_all()
            return samples

    def _report(self, id_: int, error: BadSample) -> None:
        """Counts an unusable sample. Raises DataError over the budget."""
        with self._change:
            self._bad[id_] = error.cause
            self._donated += 1
            over = len(self._bad) > self.data.bad_samples * self.manifest.samples
        if over:
            raise DataError(
                f"{self.manifest.describe(id_)} cannot be used ({error}); "
                f"repair the shard and index it again, or raise data.bad_samples (now {self.data.bad_samples})"
            ) from error


def _cached(store: Store, data: DataConfig) -> Store:
    return CachedStore(store, Path(data.disk_cache), int(data.disk_cache_gib * 2**30)) if data.disk_cache else store


def _size(sample: Fields | BadSample) -> int:
    return 0 if isinstance(sample, BadSample) else sum(map(len, sample.values()))
