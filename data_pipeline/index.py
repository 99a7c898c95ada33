"""A manifest for tars that someone else made: each is read once, walked, and told about where it is broken.

Nothing is rewritten: the manifest stands beside the tars as a sidecar. The index of every finished tar is kept under `parts/` by
its key and etag, so a run that was cut off continues, and only changed tars are read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, replace

from configs.errors import DataError
from data_pipeline import tar
from data_pipeline.decode import BadSample, decode_sample
from data_pipeline.manifest import (
    Manifest,
    Schema,
    ShardIndex,
    build_manifest,
    claim,
    load_manifest,
    release,
    save_manifest,
    stored_schema,
)
from data_pipeline.shards import index_tar
from data_pipeline.store import MissingObject, ObjectInfo, Store

MAX_SHARDS = 10**7  # a brace range beyond this is a slip of the keyboard


@dataclass(frozen=True)
class Broken:
    """A tar that cannot be trusted, and why."""

    key: str
    reason: str


def expand(pattern: str) -> list[str]:
    """Brace notation as webdataset's users write it: `a-{000..002}.tar` and `{train,val}.tar`, in any number and order.

    Raises DataError where a brace is malformed.
    """
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    if any(mark in piece for piece in pieces for mark in "{}"):
        raise DataError(f"The braces of {pattern!r} do not match; write shard-{{000000..000999}}.tar.")
    choices: list[list[str]] = []
    for number, piece in enumerate(pieces):
        span = re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", piece)
        if number % 2 == 0:
            choices.append([piece])
        elif span:
            first, last = int(span.group(1)), int(span.group(2))
            if last < first or last - first >= MAX_SHARDS:
                raise DataError(f"The range {{{piece}}} of {pattern!r} is empty or too long; write {{000000..000999}}.")
            choices.append([str(value).zfill(len(span.group(1))) for value in range(first, last + 1)])
        else:
            choices.append(piece.split(","))
    return ["".join(parts) for parts in itertools.product(*choices)]


def index_shards(
    store: Store,
    schema: Schema,
    pattern: str = "",
    *,
    skip_broken: bool = False,
    threads: int = 4,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Manifest, list[Broken]]:
    """Writes the manifest of the tars that `pattern` names (all `*.tar` where it is empty), and returns it with what is broken.

    What a manifest that stands there already knows stays: the names of the classes, and where the tars are still those that it
    speaks of, all else that does not follow from their bytes. So tars that were only copied are the same data set as before.
    Besides the walk, the first sample of each tar must decode. Broken tars are left out whole where `skip_broken` says so, else
    DataError names them. Memory: one tar per thread.
    """
    work = hashlib.sha256(f"index {pattern} {skip_broken} {schema}".encode()).hexdigest()
    claim(store, "index", work)
    try:
        return _indexed(store, schema, pattern, skip_broken, threads, progress)
    finally:
        release(store, work)


def _indexed(
    store: Store,
    schema: Schema,
    pattern: str,
    skip_broken: bool,
    threads: int,
    progress: Callable[[int, int], None] | None,
) -> tuple[Manifest, list[Broken]]:
    before = _before(store)
    if not schema.classes:
        if before is None:
            raise DataError(f"The tars in {store.uri} do not say how many classes there are; set data.classes.")
        schema = replace(schema, classes=before.schema.classes)
    known = before.schema if before is not None else stored_schema(store)
    if known is not None and replace(known, class_names=()) == replace(schema, class_names=()):
        schema = replace(schema, class_names=schema.class_names or known.class_names)
    tars = _find(store, pattern)
    if before is not None and not pattern:
        rank = {shard.key: number for number, shard in enumerate(before.shards)}
        tars.sort(key=lambda info: rank.get(info.key, len(rank)))
    indexes: list[ShardIndex] = []
    broken: list[Broken] = []
    with futures.ThreadPoolExecutor(threads) as pool:
        for done, result in enumerate(pool.map(lambda info: _index(store, schema, info), tars), 1):
            (broken if isinstance(result, Broken) else indexes).append(result)  # type: ignore[arg-type]
            if progress is not None:
                progress(done, len(tars))
    if broken and not skip_broken:
        listed = "; ".join(f"{item.key}: {item.reason}" for item in broken[:10])
        more = f"; and {len(broken) - 10} more" if len(broken) > 10 else ""
        raise DataError(f"{len(broken)} of {len(tars)} tars in {store.uri} are broken ({listed}{more}); repair or skip them.")
    manifest = build_manifest(schema, indexes, source="index")
    if before is not None and before.samples == manifest.samples:
        again = build_manifest(schema, indexes, chunk_samples=before.chunk_samples)
        if again.fingerprint == before.fingerprint:
            manifest = replace(before, shards=again.shards)
    save_manifest(store, manifest)
    for info in store.list("parts/index-"):
        store.delete(info.key)
    return manifest, broken


def _before(store: Store) -> Manifest | None:
    """The manifest that stands there, where it can be used and is of tars beside it."""
    try:
        found = load_manifest(store)
    except DataError:
        return None
    return None if found.parts else found


def _find(store: Store, pattern: str) -> list[ObjectInfo]:
    there = {info.key: info for info in store.list() if info.key.endswith(".tar")}
    if not pattern:
        if not there and store.uri.endswith(".tar"):
            folder, _, name = store.uri.rpartition("/")
            raise DataError(f"{store.uri} is one tar; give data.uri={folder} data.shards={name}.")
        if not there:
            raise DataError(f"There are no tars in {store.uri}; check the location.")
        return list(there.values())
    keys = expand(pattern)
    missing = [key for key in keys if key not in there]
    if missing:
        raise DataError(f"{len(missing)} of {len(keys)} tars are missing in {store.uri}, first {missing[0]}; check the pattern.")
    return [there[key] for key in keys]


def _index(store: Store, schema: Schema, info: ObjectInfo) -> ShardIndex | Broken:
    part = (
        f"parts/index-{hashlib.sha256(f'{info.key} {info.etag} {replace(schema, class_names=())}'.encode()).hexdigest()[:32]}.npz"
    )
    with contextlib.suppress(MissingObject, DataError):  # a damaged one is made anew
        return ShardIndex.from_bytes(store.get(part))
    data = store.get(info.key)
    try:
        starts, crcs = index_tar(data)
        _first_decodes(tar.samples(data), data, schema)
    except tar.TarError as error:
        return Broken(info.key, f"at byte {error.offset}, {error.reason}")
    except BadSample as error:
        return Broken(info.key, f"the first sample is unusable, {error}")
    index = ShardIndex(info.key, len(data), info.etag, starts, crcs)
    store.put(part, index.to_bytes())
    return index


def _first_decodes(spans: Iterator[tar.Span], data: bytes, schema: Schema) -> None:
    first = next(spans, None)
    if first is None:
        raise BadSample("fields", "it holds no sample")
    decode_sample(first.read(data), schema)
