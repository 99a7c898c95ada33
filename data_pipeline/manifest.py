"""The manifest: what a data set is, written once, so that no reader ever lists or scans.

`manifest.json` holds the schema and one row per shard; it is written last, so a data set exists whole or not at all. Beside it
`index-<hash>.npy` holds two uint32 per chunk of q samples: the 512-byte block of its shard at which it begins, and the CRC-32 of
its bytes. A chunk runs to the beginning of the next one; one that begins near the end of a shard runs on into the next shard. The
tars stay plain WebDataset.

Writers know samples before they can know q, so shards carry a start and a CRC per sample, and the sum over a chunk follows from
the linearity of CRC-32: crc(ab) = crc(a) x^(8 |b|) + crc(b) modulo the CRC's polynomial.

A mixture is a `manifest.json` that names other data sets with their weights. It is read as one manifest: the chunks of all of them,
one data set after the other. Where the last chunk of one is not full, the ids that it lacks stand for no sample.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from freeguide.configs.errors import DataError
from freeguide.configs.untrusted import parse_json, whole
from freeguide.data_pipeline.artifact import check_seal, read_npy, read_npz, sealed_json, to_npz
from freeguide.data_pipeline.store.base import MissingObject, Store, checked
from freeguide.data_pipeline.store.open import open_like
from freeguide.data_pipeline.store.unfinished import ended, writer
from freeguide.data_pipeline.tar import BLOCK

NAME = "manifest.json"
MANIFEST = "freeguide manifest"  # its format, where the data set is no mixture
BEGUN = "parts/begun"  # says who is at work here
VERSION = 1
CHUNK_BYTES = 4 * 2**20  # aim of one ranged GET
LEAST_BYTES = 256 * 2**10  # smaller reads cost more CPU for the request than for the bytes
WHOLE_BYTES = 64 * 2**20  # a data set up to this size is kept in memory by every worker, and addressed sample by sample

DTYPES = ("uint8", "float16", "float32")  # of samples: images, and raw latents

MANIFEST_BYTES = 2**31  # 10 million shards
MARK_BYTES = 2**16
MOST_PIXELS, MOST_CLASSES, MOST_PARTS = 2**16, 10**7, 10**4
MOST_BYTES = MOST_SAMPLES = 2**48

Uint32s = npt.NDArray[np.uint32]


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
        """Raises ValueError, KeyError or TypeError where that is no schema."""
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
        """Raises DataError where it is damaged."""
        arrays = read_npz(data, where, most=len(data))  # nothing in it is packed
        try:
            key, size, etag, bad, *more = parse_json(arrays["facts"].tobytes())
            starts, crcs = arrays["starts"], arrays["crcs"]
            if not (starts.dtype == crcs.dtype == np.uint32 and starts.ndim == 1 and starts.shape == crcs.shape):
                raise ValueError("its samples have no starts or checksums")
            if not isinstance(bad, list) or not all(isinstance(text, str) for text in (etag, *bad)):
                raise ValueError("a name is no text")
            if _disordered(starts, np.zeros(len(starts), np.int64), np.array([whole(size, most=MOST_BYTES)])):
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
        """How many samples a chunk holds: q, or fewer where a data set ends."""
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
        """The fingerprint without the names of the classes, which tars do not hold: it stays where a copy was indexed anew."""
        return replace(self, schema=replace(self.schema, class_names=())).fingerprint

    def ranges(self, chunk: int) -> list[tuple[int, int, int]]:
        """The (shard, first byte, end byte) that make up a chunk, in order; mostly one, more where it straddles shards."""
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

    Raises DataError where there is no sample at all.
    """
    shards = [shard for shard in shards if len(shard.starts)]
    if not shards:
        raise DataError("There is no sample in the shards; check what they were made from.")
    rows = tuple(Shard(shard.key, shard.size, shard.etag, len(shard.starts)) for shard in shards)
    samples = sum(row.samples for row in rows)
    q = chunk_samples or choose_chunk(samples, sum(row.bytes for row in rows))
    starts = np.concatenate([shard.starts for shard in shards])
    crcs = np.concatenate([shard.crcs for shard in shards])
    ends = [np.append(shard.starts[1:].astype(np.int64) * BLOCK, shard.size) for shard in shards]
    lengths = np.concatenate(ends) - starts.astype(np.int64) * BLOCK
    return Manifest(schema, rows, q, starts[::q].copy(), combine_crcs(crcs, lengths, q), source)


def combine_crcs(crcs: Uint32s, lengths: npt.NDArray[np.int64], group: int) -> Uint32s:
    """CRC-32 of every `group` neighbouring pieces joined, from the CRC-32 and byte length of each piece; the last may be fewer."""
    shift = _power_of_x(lengths)
    joined = crcs[::group].copy()
    for i in range(1, group):
        piece = crcs[i::group]
        joined[: len(piece)] = _multiply(joined[: len(piece)], shift[i::group]) ^ piece
    return joined


def _multiply(a: Uint32s, b: Uint32s) -> Uint32s:
    """Product of polynomials over GF(2) modulo the CRC-32 polynomial; bit 31 is x^0, as in zlib."""
    product = np.zeros_like(a)
    b = b.copy()
    for bit in range(31, -1, -1):
        product ^= np.where((a >> np.uint32(bit)) & np.uint32(1), b, np.uint32(0))
        b = np.where(b & np.uint32(1), (b >> np.uint32(1)) ^ np.uint32(0xEDB88320), b >> np.uint32(1))
    return product


def _power_of_x(lengths: npt.NDArray[np.int64]) -> Uint32s:
    """x^(8 length) modulo the CRC-32 polynomial, by square and multiply."""
    power = np.full(len(lengths), 1 << 31, dtype=np.uint32)
    square = np.full(1, 1 << 23, dtype=np.uint32)  # x^8
    for bit in range(int(lengths.max(initial=0)).bit_length()):
        power = np.where((lengths >> bit) & 1, _multiply(power, np.broadcast_to(square, power.shape)), power)
        square = _multiply(square, square)
    return power


def coarser(manifest: Manifest, chunk_samples: int) -> Manifest:
    """The same data set in larger chunks; `chunk_samples` is a multiple of what they have now."""
    group = chunk_samples // manifest.chunk_samples
    first = np.arange(len(manifest.starts)) * manifest.chunk_samples
    shard = np.searchsorted(manifest.first_samples, first, side="right") - 1
    before = np.cumsum([0, *(row.bytes for row in manifest.shards)], dtype=np.int64)
    lengths = np.diff(np.append(before[shard] + manifest.starts.astype(np.int64) * BLOCK, before[-1]))
    crcs = combine_crcs(manifest.crcs, lengths, group)
    return replace(manifest, chunk_samples=chunk_samples, starts=manifest.starts[::group].copy(), crcs=crcs)


def join(parts: Sequence[tuple[str, int, Manifest]]) -> Manifest:
    """The mixture of data sets, each with its URI and weight. Raises DataError where they do not fit together."""
    schema = parts[0][2].schema
    q = max(manifest.chunk_samples for _, _, manifest in parts)
    for uri, _, manifest in parts:
        if manifest.parts:
            raise DataError(f"{uri} is a mixture itself; name its data sets one by one.")
        if replace(manifest.schema, class_names=()) != replace(schema, class_names=()):
            raise DataError(
                f"{uri} has other images or classes than {parts[0][0]}; prepare both with one image_size, dtype and classes."
            )
        if manifest.samples < q:
            raise DataError(f"{uri} has {manifest.samples} samples, fewer than the {q} of a chunk; leave it out.")
    found = [coarser(manifest, q) for _, _, manifest in parts]
    rows = [
        replace(shard, key=f"{uri}/{shard.key}")
        for (uri, _, _), manifest in zip(parts, found, strict=True)
        for shard in manifest.shards
    ]
    return Manifest(
        schema,
        tuple(rows),
        q,
        np.concatenate([manifest.starts for manifest in found]),
        np.concatenate([manifest.crcs for manifest in found]),
        "mixture",
        tuple(Part(uri, weight, len(manifest.shards), manifest.samples, manifest.bytes) for uri, weight, manifest in parts),
    )


def is_run(store: Store) -> bool:
    """Whether training writes there: a data set needs a place of its own."""
    return not store.exists(NAME) and store.exists("config.yaml")


def _header(store: Store) -> dict[str, Any] | None:
    """What the manifest at a place says first, whatever the rest of it; None where there is none, or no JSON."""
    try:
        found = parse_json(store.get(NAME), MANIFEST_BYTES)
    except (MissingObject, *_DAMAGE):
        return None
    return found if isinstance(found, dict) else None


def save_mixture(store: Store, weights: Mapping[str, int]) -> Manifest:
    """Writes the mixture of the data sets at these URIs.

    Raises DataError where one is missing or does not fit to the others, and where a data set with tars of its own stands already.
    """
    if (before := _header(store)) and before.get("format") == MANIFEST:
        raise DataError(
            f"{store.home} holds a data set of its own, whose manifest would be lost; name another data.uri for a mixture"
        )
    parts = [(uri, weight, load_manifest(open_like(store, uri))) for uri, weight in weights.items()]
    joined = join(parts)
    rows = [{"uri": uri, "weight": weight, "fingerprint": manifest.fingerprint} for uri, weight, manifest in parts]
    text = sealed_json({"format": "freeguide mixture", "version": VERSION, "parts": rows})
    identity = hashlib.sha256(text).hexdigest()
    claim(store, "index", identity)
    try:
        store.put(NAME, text)
    finally:
        release(store, identity)
    return joined


def _load_mixture(store: Store, where: str, header: dict[str, Any]) -> Manifest:
    rows = [(row["uri"], whole(row["weight"], 1, MOST_SAMPLES), row["fingerprint"]) for row in header["parts"]]
    if not 0 < len(rows) <= MOST_PARTS or not all(isinstance(uri, str) for uri, _, _ in rows):
        raise ValueError("its data sets have no names, or are none or too many")
    parts = []
    for uri, weight, fingerprint in rows:
        manifest = _load(open_like(store, uri), parts=False)
        if fingerprint not in (manifest.fingerprint, manifest.content):
            raise DataError(f"{uri} has changed since it became part of {where}; run `freeguide index` with data.mixture again.")
        parts.append((uri, weight, manifest))
    return join(parts)


def save_manifest(store: Store, manifest: Manifest, new: bool = False) -> None:
    """Writes the index, then the JSON that names it: until the second is there, so is no data set.

    With `new`, a manifest that is there already stays as it is.
    """
    out = io.BytesIO()
    np.save(out, np.stack([manifest.starts, manifest.crcs], axis=1).astype("<u4"), allow_pickle=False)
    digest = hashlib.sha256(out.getvalue()).hexdigest()
    index = f"index-{digest[:16]}.npy"
    store.put(index, out.getvalue())
    columns: dict[str, Any] = {
        name: [getattr(shard, name) for shard in manifest.shards] for name in ("key", "bytes", "etag", "samples")
    }
    header = {
        "format": MANIFEST,
        "version": VERSION,
        "fingerprint": manifest.fingerprint,
        "source": manifest.source,
        "samples": manifest.samples,
        "schema": manifest.schema.to_dict(),
        "chunk_samples": manifest.chunk_samples,
        "index": {"key": index, "sha256": digest},
        "shards": columns,
        **({"passed_over": dict(manifest.passed_over)} if manifest.passed_over else {}),
    }
    text = sealed_json(header)
    store.create(NAME, text) if new else store.put(NAME, text)


def claim(store: Store, work: str, identity: str) -> bool:
    """Marks a place as being written by `work` (prepare, ...) of that identity; whether it was not marked so before.

    Of two that begin at once one is the first; a second of the same identity joins it. Raises DataError where the first is of
    another identity and has not provably ended.
    """
    mine = json.dumps({"work": work, "identity": identity, "writer": writer()}).encode()
    there = store.create(BEGUN, mine)
    if there == mine:
        return True
    try:
        found = parse_json(there)
        first, same, over = str(found["work"]), found["identity"] == identity, found.get("over") is True or ended(found["writer"])
    except _DAMAGE:
        first, same, over = "job", False, False
    if same:
        return False
    if over:
        store.put(BEGUN, mine)
        if store.get(BEGUN, MARK_BYTES) == mine:
            return True
    raise DataError(
        f"Another {first} writes to {store.home}, or was broken off there; let it end (its own command goes on where it stopped), "
        f"or delete {store.home}/parts and start again."
    )


def release(store: Store, identity: str) -> None:
    """Takes away the mark of `claim`, where it is of that identity."""
    if marked(store, identity):
        store.delete(BEGUN)


def leave(store: Store, work: str, identity: str) -> None:
    """Says that the work of `claim` was given up: who began it can go on, and others need not wait for its process to end."""
    if marked(store, identity):
        store.put(BEGUN, json.dumps({"work": work, "identity": identity, "writer": writer(), "over": True}).encode())


def begun_by(store: Store) -> str:
    """The work whose mark stands here, at work or broken off; "" = none."""
    try:
        return str(parse_json(store.get(BEGUN, MARK_BYTES))["work"])
    except (MissingObject, *_DAMAGE):
        return ""


def marked(store: Store, identity: str) -> bool:
    try:
        return bool(parse_json(store.get(BEGUN, MARK_BYTES))["identity"] == identity)
    except (MissingObject, *_DAMAGE):
        return False


def load_manifest(store: Store) -> Manifest:
    """Raises DataError where there is no manifest, or one that is damaged or of another version."""
    return _load(store, parts=True)


def stored_schema(store: Store) -> Schema | None:
    """What a manifest says of its samples, even where all else of it is damaged; None where it does not."""
    try:
        return Schema.from_dict(parse_json(store.get(NAME, MANIFEST_BYTES), MANIFEST_BYTES)["schema"])
    except (MissingObject, *_DAMAGE):
        return None


# How a JSON text that is no manifest shows, whatever else it is.
_DAMAGE = (ValueError, KeyError, TypeError, IndexError, AttributeError)


def _load(store: Store, parts: bool) -> Manifest:
    where = f"{store.home}/{NAME}"
    try:
        raw = store.get(NAME, MANIFEST_BYTES)
    except MissingObject as error:
        if store.uri.endswith(".tar"):
            folder, _, name = store.uri.rpartition("/")
            raise DataError(f"{store.uri} is one tar; run `freeguide index` with data.uri={folder} data.shards={name}.") from error
        if is_run(store):
            raise DataError(
                f"{store.uri} is a run, and no data set; set data.uri to where `freeguide prepare` wrote the data"
            ) from error
        raise DataError(
            f"There is no manifest at {where}; run `freeguide prepare` to write shards, or `freeguide index` for existing tars."
        ) from error
    check_seal(raw, f"The manifest {where}", "run `freeguide index` again.")
    try:
        header = parse_json(raw, MANIFEST_BYTES)
        if header["format"] == "freeguide mixture" and header["version"] == VERSION:
            if not parts:
                raise ValueError("it is a mixture in a mixture")
            return _load_mixture(store, where, header)
        if header["format"] != MANIFEST or header["version"] != VERSION:
            raise DataError(f"{where} is a manifest of another version; run `freeguide index` again.")
        index = store.get(checked(header["index"]["key"]), MANIFEST_BYTES)
        if hashlib.sha256(index).hexdigest() != header["index"]["sha256"]:
            raise ValueError("the index is not the one that the manifest names")
        manifest = _parsed(header, read_npy(index, "<u4", 2))
        if manifest.fingerprint != header["fingerprint"]:
            raise ValueError("the fingerprint does not fit the content")
    except (MissingObject, *_DAMAGE) as error:
        raise DataError(f"The manifest {where} is damaged ({error}); run `freeguide index` again.") from error
    return manifest


def _parsed(header: dict[str, Any], table: npt.NDArray[Any]) -> Manifest:
    """Raises one of _DAMAGE where the shards and their chunks cannot be."""
    columns, q = header["shards"], whole(header["chunk_samples"], 1, MOST_SAMPLES)
    rows = [
        Shard(checked(key), whole(size, most=MOST_BYTES), etag, whole(samples, 1, MOST_SAMPLES))
        for key, size, etag, samples in zip(*(columns[name] for name in ("key", "bytes", "etag", "samples")), strict=True)
    ]
    if not rows or not all(isinstance(text, str) for text in (header["source"], *(row.etag for row in rows))):
        raise ValueError("it has no shards, or a name that is no text")
    if sum(row.samples for row in rows) > MOST_SAMPLES:
        raise ValueError("it has more samples than can be")
    starts, crcs = table.T  # with two columns
    passed = {str(kind): whole(count) for kind, count in header.get("passed_over", {}).items()}
    manifest = Manifest(Schema.from_dict(header["schema"]), tuple(rows), q, starts, crcs, header["source"], passed_over=passed)
    if len(starts) != -(-manifest.samples // q):
        raise ValueError(f"it has {len(starts)} chunks of {q} for {manifest.samples} samples")
    shard = np.searchsorted(manifest.first_samples, np.arange(len(starts)) * q, side="right") - 1
    if _disordered(starts, shard, np.array([row.bytes for row in rows])):
        raise ValueError("its chunks do not fit into its shards")
    return manifest


def _disordered(starts: Uint32s, shard: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> bool:
    """Whether pieces that begin at these blocks of these shards, which have these bytes, do not follow each other within them."""
    at = starts.astype(np.int64) * BLOCK
    return bool((at >= sizes[shard]).any() or ((np.diff(at) <= 0) & (np.diff(shard) == 0)).any())
