"""Writing a data set: samples into WebDataset tars, tars into a store, and the manifest last.

A source of n items is cut into equal ranges, one shard each. A shard is a work unit: the bytes depend on its items alone, the tar
goes up whole, and then its index is laid beside it under `parts/`. So any worker can write any shard, a run that was cut off goes
on where it stopped, and the manifest at the end reads indexes, not tars. The tars come from webdataset's own writer, with a fixed
time, owner and mode, and keys without dots: the same source gives the same bytes, and any WebDataset reader reads them.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import webdataset

from freeguide.configs.errors import DataError, StoreError
from freeguide.data_pipeline import tar
from freeguide.data_pipeline.claim import BEGUN, begun_by, claim, leave, marked, release
from freeguide.data_pipeline.crc import Uint32s
from freeguide.data_pipeline.decode import BadSample, Values, encode_npy, encode_png
from freeguide.data_pipeline.manifest import Manifest, Schema, ShardIndex, build_manifest
from freeguide.data_pipeline.store.base import MissingObject, Store
from freeguide.data_pipeline.stored import NAME, load_manifest, save_manifest

Progress = Callable[[int, int, tuple[str, ...]], None]  # (shards done, shards in all, images left out of the last one)
Elsewhere = Callable[["Plan", list[int]], Iterable[int]]  # (plan, missing units) -> units as they get done


@dataclass(frozen=True, eq=False)
class Sample:
    image: Values  # uint8 (H, W, C), or float16 or float32 (C, H, W)
    label: int
    key: str = ""  # a name without dots; empty = its number


@dataclass(frozen=True)
class Source:
    """Items that can be read one by one, in an order that is fixed and already shuffled.

    `read(i)` returns item i or raises BadSample, whose message names the item. `identity` changes when the items do.
    """

    schema: Schema
    items: int
    read: Callable[[int], Sample]
    identity: str
    passed_over: Mapping[str, int] = field(default_factory=dict)  # what stood there and was not taken, by kind
    formerly: str = ""  # the identity that earlier versions gave to the same items, which they may have read in another way


@dataclass(frozen=True, eq=False)
class PackedShard:
    """A tar in memory and what the manifest needs to know of it."""

    data: bytes
    starts: Uint32s  # (samples,) 512-byte block at which each sample begins
    crcs: Uint32s  # (samples,) CRC-32 of each sample's part of the tar

    def index(self, key: str, etag: str, bad: tuple[str, ...] = ()) -> ShardIndex:
        """To be kept beside the shard once it is stored under `key`; see `manifest.build_manifest`."""
        return ShardIndex(key, len(self.data), etag, self.starts, self.crcs, bad)


def pack_shard(samples: Iterable[Sample], first: int = 0, dtype: str = "uint8") -> PackedShard:
    """One WebDataset tar: `.png`, or `.npy` of latents, and `.cls` per sample. Deterministic bytes.

    Keys are counted from `first` if a sample has none. Raises ValueError if a key has a dot or a slash, an image is not uint8
    (H, W, 1 or 3), or latents are not `dtype` (C, H, W).
    """
    ext = "png" if dtype == "uint8" else "npy"
    out = io.BytesIO()
    with webdataset.TarWriter(out, encoder=False, user="freeguide", group="freeguide", mode=0o644, mtime=0) as writer:
        for number, sample in enumerate(samples, first):
            key = sample.key or f"{number:09d}"
            if "." in key or "/" in key:
                raise ValueError(f"the key {key!r} has a dot or a slash, which would merge or hide samples")
            image = sample.image
            if image.dtype != dtype or image.ndim != 3 or (ext == "png" and image.shape[2] not in (1, 3)):
                raise ValueError(f"sample {key} is {image.dtype} {image.shape}, not {dtype} with its three axes")
            data = encode_png(image) if ext == "png" else encode_npy(image)
            writer.write({"__key__": key, "cls": str(int(sample.label)).encode(), ext: data})
    packed = out.getvalue()
    return PackedShard(packed, *index_tar(packed))


def index_tar(data: tar.Bytes, passed: Counter[str] | None = None) -> tuple[Uint32s, Uint32s]:
    """Starts (blocks) and CRCs, uint32 (samples,), of a whole tar. A sample's part reaches to the next, the last one's to the end.

    `passed` counts the members that are no sample's. Raises TarError.
    """
    view = memoryview(data)
    starts = [span.start for span in tar.samples(view, ended=True, passed=passed)]
    if starts:
        starts[0] = 0  # what stands before the first sample belongs to it, so that the parts cover the tar
    crcs = [zlib.crc32(view[start:end]) for start, end in itertools.pairwise([*starts, len(view)])]
    return (np.array(starts, np.int64) // tar.BLOCK).astype(np.uint32), np.array(crcs, np.uint32)


def write_shards(
    source: Source,
    store: Store,
    *,
    shard_samples: int = 4096,
    bad_images: float = 0.0,
    progress: Progress | None = None,
    elsewhere: Elsewhere | None = None,
) -> Manifest:
    """Writes the source as shards and a manifest. Run again, it continues; if the data set is already whole, it does nothing.

    `bad_images` is the share of unreadable items that may be left out. `elsewhere` lets other processes write the shards that are
    missing: it calls `Plan.write` for each unit somewhere, and yields the units in the order in which they get done. What an
    unfinished call has left of another source, as of the same folder before a picture was repaired, is replaced, which is said.
    Raises DataError if there are more bad images, or if the store holds another data set.
    """
    plan = Plan.make(source, shard_samples)
    there = plan.existing(store)
    if there is not None:
        return there
    first, ours = plan.begin(store), False
    try:
        if (there := plan.existing(store)) is not None:  # again: somebody may have finished meanwhile
            return there
        if first:
            plan.replace_unfinished(store)
        ours = True
        return _write_missing(plan, source, store, bad_images, progress, elsewhere)
    except BaseException:
        with contextlib.suppress(StoreError):
            if first and not (ours and store.list("shards/")):  # nothing of ours is in the way of another source
                release(store, plan.identity)
            elif first:
                leave(store, "prepare", plan.identity)
        raise


def _write_missing(
    plan: Plan, source: Source, store: Store, bad_images: float, progress: Progress | None, elsewhere: Elsewhere | None
) -> Manifest:
    missing = plan.missing(store)
    bad: list[str] = []
    written = sorted(set(range(plan.units)) - set(missing))
    rest = elsewhere(plan, missing) if elsewhere is not None and missing else missing
    for done, unit in enumerate(itertools.chain(written, rest), 1):
        index = plan.write(source, store, unit)  # of a unit that is written this only reads the index
        bad += index.bad
        _check_budget(bad, bad_images, source.items, final=done == plan.units)
        if progress is not None:
            progress(done, plan.units, index.bad)
    return plan.finish(source, store, bad_images)


@dataclass(frozen=True)
class Plan:
    """How a source is cut into shards: all that the workers of a prepare job need to agree on."""

    identity: str
    items: int
    units: int
    formerly: str = ""  # what earlier versions called the same

    @classmethod
    def make(cls, source: Source, shard_samples: int) -> Plan:
        """Raises DataError if the source is empty."""
        if source.items == 0:
            raise DataError("The source has no images; check data.path")

        def named(identity: str) -> str:
            facts = json.dumps([identity, source.items, shard_samples, source.schema.to_dict()])
            return hashlib.sha256(facts.encode()).hexdigest() if identity else ""

        return cls(named(source.identity), source.items, -(-source.items // shard_samples), named(source.formerly))

    def existing(self, store: Store) -> Manifest | None:
        """The manifest of this very data set if it is complete. Raises DataError if something else is in the way.

        What is left of the making is taken away then.
        """
        if store.exists(NAME):
            manifest = load_manifest(store)
            if manifest.source in {self.identity, self.formerly} - {""}:
                self._clear(store)
                return manifest
            raise DataError(f"{store.uri} holds another data set; choose another data.uri, or delete that data set first")
        if store.list("shards/") and not store.list(self._part("")) and begun_by(store) != "prepare":
            raise DataError(f"{store.uri} holds shards of something else and no manifest; choose another data.uri or empty it")
        return None

    def begin(self, store: Store) -> bool:
        """Says whose the shards are that will come: tars without an index are then known to be ours. Whether that is new.

        Raises DataError if somebody else is at work.
        """
        return claim(store, "prepare", self.identity)

    def replace_unfinished(self, store: Store) -> None:
        """Removes what an unfinished data set has left and this one will not write over. Only after `begin`, which may begin anew.

        A shard that this one has too may be written by another process already.
        """
        others = [info.key for info in store.list("parts/") if info.key != BEGUN and not info.key.startswith(self._part(""))]
        if others:
            print("replacing a data set that was begun here and not finished", flush=True)
        ours = {f"shards/{unit:06d}.tar" for unit in range(self.units)}
        for key in [*(info.key for info in store.list("shards/") if info.key not in ours), *others]:
            store.delete(key)

    def missing(self, store: Store) -> list[int]:
        """The units whose shard and index are not there yet."""
        there = {info.key for info in store.list(self._part(""))}
        return [unit for unit in range(self.units) if self._part(f"{unit:06d}.npz") not in there]

    def write(self, source: Source, store: Store, unit: int) -> ShardIndex:
        """Shard number `unit`: reads its items, writes the tar, then its index. Returns at once if the index is there."""
        part = self._part(f"{unit:06d}.npz")
        with contextlib.suppress(MissingObject, DataError):  # a damaged one is written anew
            return ShardIndex.from_bytes(store.get(part))
        bad: list[str] = []
        first, end = (self.items * i // self.units for i in (unit, unit + 1))
        packed = pack_shard(_readable(source, first, end, bad), first, source.schema.dtype)
        key = f"shards/{unit:06d}.tar"
        index = packed.index(key, store.put(key, packed.data), tuple(bad))
        store.put(part, index.to_bytes())
        return index

    def finish(self, source: Source, store: Store, bad_images: float = 0.0) -> Manifest:
        """Collects the indexes of all shards into the manifest. Raises DataError over the budget of bad images.

        Where another job of the same source is there first, its manifest is taken: it says the same.
        """
        if not marked(store, self.identity):  # nobody else may have come meanwhile
            self.begin(store)
        try:
            indexes = [ShardIndex.from_bytes(store.get(self._part(f"{unit:06d}.npz"))) for unit in range(self.units)]
        except MissingObject:
            if (there := self.existing(store)) is not None:
                return there
            raise
        bad = [name for index in indexes for name in index.bad]
        _check_budget(bad, bad_images, self.items, final=True)
        for index in indexes:
            if not len(index.starts):  # none of its images could be read: an empty tar is nothing that `index` or others take
                store.delete(index.key)
        indexes = [index for index in indexes if len(index.starts)]
        passed = {**source.passed_over, **({"cannot be read": len(bad)} if bad else {})}
        manifest = replace(build_manifest(source.schema, indexes, self.identity), passed_over=passed)
        save_manifest(store, manifest, new=True)
        there = self.existing(store)
        assert there is not None
        return there

    def _clear(self, store: Store) -> None:
        for info in store.list(self._part("")):
            store.delete(info.key)
        release(store, self.identity)

    def _part(self, name: str) -> str:
        return f"parts/{self.identity[:16]}/{name}"


def _readable(source: Source, first: int, end: int, bad: list[str]) -> Iterable[Sample]:
    for item in range(first, end):
        try:
            sample = source.read(item)
        except BadSample as error:
            bad.append(str(error))
        else:
            yield Sample(sample.image, sample.label, sample.key or f"{item:09d}")


def _check_budget(bad: list[str], budget: float, items: int, final: bool) -> None:
    if len(bad) > budget * items or (final and len(bad) == items):
        raise DataError(
            f"{len(bad)} of {items} images cannot be read, the first is {bad[0].rstrip('.')}; "
            "repair or remove them, or raise data.bad_images"
        )
