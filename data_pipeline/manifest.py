"""The manifest: what a data set is, written once, so that no reader ever lists or scans.

`manifest.json` holds the schema and one row per shard; it is written last, so a data set exists whole or not at all. Beside it
`index-<hash>.npy` holds two uint32 per chunk of q samples: the 512-byte block of its shard at which it begins, and the CRC-32 of
its bytes. A chunk runs to the beginning of the next one; one that begins near the end of a shard runs on into the next shard. The
tars stay plain WebDataset.

Writers know samples before they can know q, so shards carry a start and a CRC per sample, and the sum over a chunk follows from
those of its samples (`crc.py`). `stored.py` writes manifests and reads them.

A mixture is a `manifest.json` that names other data sets with their weights. It is read as one manifest (`mixture.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from freeguide.configs.errors import DataError
from freeguide.configs.untrusted import parse_json, whole
from freeguide.data_pipeline.artifact import read_npz, to_npz
from freeguide.data_pipeline.crc import Uint32s, combine_crcs
from freeguide.data_pipeline.store.base import checked
from freeguide.data_pipeline.tar import BLOCK

CHUNK_BYTES = 4 * 2**20  # aim of one ranged GET
LEAST_BYTES = 256 * 2**10  # smaller reads cost more CPU for the request than for the bytes
WHOLE_BYTES = 64 * 2**20  # a data set up to this size is kept in memory by every worker: one window, addressed sample by sample

DTYPES = ("uint8", "float16", "float32")  # of samples: images, and raw latents

MOST_PIXELS, MOST_CLASSES = 2**16, 10**7
MOST_BYTES = MOST_SAMPLES = 2**48


@dataclass(frozen=True)
class Schema:
    image_size: int  # pixels per side, of latents places
    channels: int  # 1 = grey, 3 = RGB; latents have any number
    classes: int  # labels are 0 .. classes - 1
    class_names: tuple[str, ...] = ()
    dtype: str = "uint8"  # uint8 = images; float16 or float32 = raw latents
    label_key: str = ""  # where labels stand that are not plain numbers, see `decode.decode_label`

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a sample: (H, W, C) of an image, (C, H, W) of latents."""
        size = self.image_size
        return (size, size, self.channels) if self.dtype == "uint8" else (self.channels, size, size)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it. Images are not said to be uint8: data sets written before there were latents keep their identity."""
        facts = {**vars(self), "class_names": list(self.class_names)}
        return {name: value for name, value in facts.items() if (name, value) not in (("dtype", "uint8"), ("label_key", ""))}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> Schema:
        """Raises ValueError, KeyError or TypeError if that is no schema."""
        names = facts["class_names"]
        schema = cls(**{**facts, "class_names": tuple(names)})
        if schema.dtype not in DTYPES:
            raise ValueError(f"its samples are {schema.dtype!r:.40}")
        for value in (schema.image_size, schema.channels):
            whole(value, 1, MOST_PIXELS)
        whole(schema.classes, 1, MOST_CLASSES)
        if not isinstance(names, list) or len(names) > schema.classes or not all(isinstance(name, str) for name in names):
            raise ValueError("the names of its classes are no list of as many texts")
        if not isinstance(schema.label_key, str):
            raise ValueError(f"the place of its labels is {schema.label_key!r:.40}")
        return schema


@dataclass(frozen=True)
class Shard:
    key: str  # relative to the manifest
    bytes: int
    etag: str
    samples: int


@dataclass(frozen=True)
class ShardIndex:
    """What the manifest needs to know of one shard: `starts` (first block) and `crcs` of every sample, uint32 (samples,)."""

    key: str
    size: int  # bytes
    etag: str
    starts: Uint32s
    crcs: Uint32s
    bad: tuple[str, ...] = ()  # source images that could not be read and are not in the shard
    passed_over: Mapping[str, int] = field(default_factory=dict)  # members that are no sample's, by kind
    seen_otherwise: int = 0  # images that a person would see otherwise, see `decode.seen_otherwise`
    labels: tuple[int, ...] = ()  # those that occur, sorted

    def to_bytes(self) -> bytes:
        more = [dict(self.passed_over), self.seen_otherwise, list(self.labels)]
        facts = json.dumps([self.key, self.size, self.etag, self.bad, *(more if more != [{}, 0, []] else [])])
        return to_npz({"facts": np.frombuffer(facts.encode(), np.uint8), "starts": self.starts, "crcs": self.crcs})

    @classmethod
    def from_bytes(cls, data: bytes, where: str = "the index of a shard") -> ShardIndex:
        """Raises DataError if it is damaged."""
        arrays = read_npz(data, where, most=len(data))  # nothing in it is packed
        try:
            key, size, etag, bad, *more = parse_json(arrays["facts"].tobytes())
            starts, crcs = arrays["starts"], arrays["crcs"]
            if not (starts.dtype == crcs.dtype == np.uint32 and starts.ndim == 1 and starts.shape == crcs.shape):
                raise ValueError("its samples have no starts or checksums")
            if not isinstance(bad, list) or not all(isinstance(text, str) for text in (etag, *bad)):
                raise ValueError("a name is no text")
            if disordered(starts, np.zeros(len(starts), np.int64), np.array([whole(size, most=MOST_BYTES)])):
                raise ValueError("its samples do not fit into its shard")
            passed, otherwise, labels = more or ({}, 0, [])
            passed = {str(kind): whole(count) for kind, count in passed.items()}
            return cls(checked(key), size, etag, starts, crcs, tuple(bad), passed, whole(otherwise), tuple(map(whole, labels)))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{where} is no index ({error}); delete it and give the command again") from None


@dataclass(frozen=True)
class Part:
    """One data set of a mixture."""

    uri: str
    weight: int
    shards: int
    samples: int
    bytes: int


@dataclass(frozen=True, eq=False)
class Manifest:
    schema: Schema
    shards: tuple[Shard, ...]
    chunk_samples: int  # q
    starts: Uint32s  # (chunks,) first block of each chunk in the shard that holds its first sample
    crcs: Uint32s  # (chunks,)
    source: str = ""  # what it was made from; two data sets of one source are the same
    parts: tuple[Part, ...] = ()  # of a mixture, whose shards have URIs for keys
    passed_over: Mapping[str, int] = field(default_factory=dict)  # what stood in the source and is no sample, by kind

    @property
    def samples(self) -> int:
        """The number of ids: in a mixture some of them stand for no sample, see `exists`."""
        return int(self.first_samples[-1])

    @cached_property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def sample_bytes(self) -> float:
        """Mean bytes of a sample as a training meets it: of a mixture, by the weights."""
        if not self.parts:
            return self.bytes / self.samples
        total = sum(part.weight for part in self.parts)
        return sum(part.weight / total * part.bytes / part.samples for part in self.parts)

    @cached_property
    def first_samples(self) -> npt.NDArray[np.int64]:
        """(shards + 1,) id of each shard's first sample, and the number of ids."""
        counts = self._counts[:-1].copy()
        for last, part in zip(np.cumsum([part.shards for part in self.parts]), self.parts, strict=True):
            counts[last - 1] += -part.samples % self.chunk_samples
        return np.concatenate([[0], np.cumsum(counts)])

    def exists(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether each id, from 0 on, is that of a sample."""
        shard = np.searchsorted(self.first_samples, ids, side="right") - 1
        return ids - self.first_samples[shard] < self._counts[shard]

    def in_chunk(self, chunk: int) -> int:
        """How many samples a chunk holds: q, or fewer at the end of a data set."""
        q = self.chunk_samples
        if self.parts:
            return int(self.exists(np.arange(chunk * q, (chunk + 1) * q)).sum())
        return min(q, self.samples - chunk * q)

    @cached_property
    def _counts(self) -> npt.NDArray[np.int64]:
        """(shards + 1,) samples of each shard, and 0 for what comes after the last."""
        return np.array([*(shard.samples for shard in self.shards), 0], dtype=np.int64)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the content: schema, samples per shard, chunks. Neither names nor places nor etags change it."""
        schema = self.schema
        facts: list[Any] = [schema.image_size, schema.channels, schema.classes, list(schema.class_names), self.chunk_samples]
        facts += [schema.dtype] if schema.dtype != "uint8" else []
        facts += [{"label_key": schema.label_key}] if schema.label_key else []
        facts += [[part.weight, part.samples] for part in self.parts]
        digest = hashlib.sha256(json.dumps([*facts, [shard.samples for shard in self.shards]]).encode())
        digest.update(self.starts.astype("<u4").tobytes())
        digest.update(self.crcs.astype("<u4").tobytes())
        return digest.hexdigest()

    @cached_property
    def content(self) -> str:
        """The fingerprint without the names of the classes, which tars do not hold: a copy that was indexed anew has the same."""
        return replace(self, schema=replace(self.schema, class_names=())).fingerprint

    def ranges(self, chunk: int) -> list[tuple[int, int, int]]:
        """The (shard, first byte, end byte) that make up a chunk, in order; mostly one, more if it straddles shards."""
        first = chunk * self.chunk_samples
        shard = int(np.searchsorted(self.first_samples, first, side="right")) - 1
        at = int(self.starts[chunk]) * BLOCK
        following = first + self.chunk_samples
        found = []
        while following >= self.first_samples[shard + 1]:
            found.append((shard, at, self.shards[shard].bytes))
            shard, at = shard + 1, 0
            if shard == len(self.shards):
                return found
        end = int(self.starts[chunk + 1]) * BLOCK
        return [*found, (shard, at, end)] if end > at else found

    def describe(self, sample: int) -> str:
        """Where a sample is, for a message: shard, number in the shard, byte of its chunk."""
        shard = int(np.searchsorted(self.first_samples, sample, side="right")) - 1
        first, start, _ = self.ranges(sample // self.chunk_samples)[0]
        number = sample - self.first_samples[shard]
        return f"Sample {number} of {self.shards[shard].key} (chunk at byte {start} of {self.shards[first].key})"


def choose_chunk(samples: int, total_bytes: int) -> int:
    """q, a power of two: chunks of up to 4 MiB while 16 384 or more remain to be shuffled, and of up to 256 KiB while 1 024 remain.

    1 for small data, which every worker keeps whole.
    """
    if total_bytes <= WHOLE_BYTES:
        return 1
    large = min(CHUNK_BYTES * samples // total_bytes, samples // 16384)
    limit = max(large, min(LEAST_BYTES * samples // total_bytes, samples // 1024))
    return 2 ** (max(1, limit).bit_length() - 1)


def build_manifest(schema: Schema, shards: Sequence[ShardIndex], source: str = "", chunk_samples: int | None = None) -> Manifest:
    """The manifest of finished shards, from their indexes alone. Shards without a sample are left out.

    Raises DataError if there is no sample at all.
    """
    shards = [shard for shard in shards if len(shard.starts)]
    if not shards:
        raise DataError("There is no sample in the shards; check what they were made from")
    rows = tuple(Shard(shard.key, shard.size, shard.etag, len(shard.starts)) for shard in shards)
    samples = sum(row.samples for row in rows)
    q = chunk_samples or choose_chunk(samples, sum(row.bytes for row in rows))
    starts = np.concatenate([shard.starts for shard in shards])
    crcs = np.concatenate([shard.crcs for shard in shards])
    ends = [np.append(shard.starts[1:].astype(np.int64) * BLOCK, shard.size) for shard in shards]
    lengths = np.concatenate(ends) - starts.astype(np.int64) * BLOCK
    return Manifest(schema, rows, q, starts[::q].copy(), combine_crcs(crcs, lengths, q), source)


def disordered(starts: Uint32s, shard: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> bool:
    """Whether pieces that begin at these blocks of these shards, which have these bytes, do not follow each other within them."""
    at = starts.astype(np.int64) * BLOCK
    return bool((at >= sizes[shard]).any() or ((np.diff(at) <= 0) & (np.diff(shard) == 0)).any())
