"""A manifest for tars that someone else made: each is read once, walked, and told about where it is broken.

Nothing is rewritten: the manifest stands beside the tars as a sidecar. The index of every finished tar is kept under `parts/` by
its key and etag, so a run that was cut off continues, and only changed tars are read again.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, replace

from freeguide.configs.errors import DataError
from freeguide.data_pipeline import tar
from freeguide.data_pipeline.claim import claim, release
from freeguide.data_pipeline.decode import ANY_LABEL, IMAGE_FIELDS, BadSample, decode_label, decode_sample, seen_otherwise
from freeguide.data_pipeline.manifest import Manifest, Schema, ShardIndex, build_manifest
from freeguide.data_pipeline.pictures import SPLITS, is_dropping, without_pictures
from freeguide.data_pipeline.shards import index_tar
from freeguide.data_pipeline.store.base import MissingObject, ObjectInfo, Store
from freeguide.data_pipeline.stored import load_manifest, save_manifest, stored_schema

COMPRESSED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.lz4", ".tar.z")
MAX_SHARDS = 10**7  # a brace range beyond this is a slip of the keyboard


@dataclass(frozen=True)
class Broken:
    """A tar that cannot be trusted, and why."""

    key: str
    reason: str


def expand(pattern: str) -> list[str]:
    """Brace notation as webdataset's users write it: `a-{000..002}.tar` and `{train,val}.tar`, in any number and order.

    Raises DataError if a brace is malformed.
    """
    pieces = re.split(r"\{([^{}]*)\}", pattern)
    if any(mark in piece for piece in pieces for mark in "{}"):
        raise DataError(f"The braces of {pattern!r} do not match; write shard-{{000000..000999}}.tar")
    choices: list[list[str]] = []
    for number, piece in enumerate(pieces):
        span = re.fullmatch(r"(\d{1,12})\.\.(\d{1,12})", piece)
        if number % 2 == 0:
            choices.append([piece])
        elif span:
            first, last = int(span.group(1)), int(span.group(2))
            if last < first or last - first >= MAX_SHARDS:
                raise DataError(f"The range {{{piece}}} of {pattern!r} is empty or too long; write {{000000..000999}}")
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
    report: Callable[[str], None] = print,
) -> tuple[Manifest, list[Broken]]:
    """Writes the manifest of the tars that `pattern` names (all `*.tar` if it is empty), and returns it with what is broken.

    What a manifest that stands there already knows stays: the names of the classes, and if the tars are still those that it
    speaks of, all else that does not follow from their bytes. So tars that were only copied are the same data set as before.
    Besides the walk, the first sample of each tar must decode. Broken tars are left out whole if `skip_broken` says so, else
    DataError names them. `report` is told what a person should know. Memory: one tar per thread.
    """
    tars = _find(store, pattern)  # before anything is written there
    work = hashlib.sha256(f"index {pattern} {skip_broken} {schema}".encode()).hexdigest()
    claim(store, "index", work)
    try:
        return _indexed(store, schema, tars, pattern, skip_broken, threads, progress, report)
    finally:
        release(store, work)


def _indexed(
    store: Store,
    schema: Schema,
    tars: list[ObjectInfo],
    pattern: str,
    skip_broken: bool,
    threads: int,
    progress: Callable[[int, int], None] | None,
    report: Callable[[str], None],
) -> tuple[Manifest, list[Broken]]:
    before = _before(store)
    known = before.schema if before is not None else stored_schema(store)
    schema = replace(schema, classes=schema.classes or len(schema.class_names) or (known.classes if known is not None else 0))
    counting = not schema.classes
    if counting:
        schema = replace(schema, classes=ANY_LABEL)
    if known is not None and not schema.label_key:
        schema = replace(schema, label_key=known.label_key)
    if known is not None and replace(known, class_names=()) == replace(schema, class_names=()):
        schema = replace(schema, class_names=schema.class_names or known.class_names)
    if before is None and not pattern:
        _check_parts(store, [info.key for info in tars])
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
        raise DataError(f"{len(broken)} of {len(tars)} tars in {store.uri} are broken ({listed}{more}); repair or skip them")
    schema = _classes(store, schema, sorted({label for index in indexes for label in index.labels}), counting, report)
    passed = sum((Counter(index.passed_over) for index in indexes), Counter[str]())
    manifest = replace(build_manifest(schema, indexes, source="index"), passed_over={kind: passed[kind] for kind in sorted(passed)})
    if otherwise := sum(index.seen_otherwise for index in indexes):
        report(
            f"{otherwise} images are turned by EXIF or transparent, and are trained on as they are stored; `freeguide prepare` "
            "with data.source=webdataset makes of them what a person sees"
        )
    if before is not None and before.samples == manifest.samples:
        again = build_manifest(schema, indexes, chunk_samples=before.chunk_samples)
        if again.fingerprint == before.fingerprint:
            manifest = replace(before, shards=again.shards)
    save_manifest(store, manifest)
    for info in store.list("parts/index-"):
        store.delete(info.key)
    return manifest, broken


def _classes(store: Store, schema: Schema, labels: list[int], counting: bool, report: Callable[[str], None]) -> Schema:
    """The schema with the number of classes that the labels say, if nobody else did. Classes without pictures are named.

    Raises DataError if nobody has said that there are such classes.
    """
    if not labels:
        return schema
    classes = labels[-1] + 1 if counting else schema.classes
    lacking = without_pictures(labels, classes)
    if lacking and counting:
        raise DataError(
            f"The labels in {store.uri} go from {labels[0]} to {labels[-1]}, and these classes have no picture: {lacking}; "
            f"set data.classes={classes} if that is meant"
        )
    if counting:
        report(f"{classes} classes, as the labels go from 0 to {labels[-1]} (data.classes is not set)")
    elif lacking:
        report(f"classes without a picture, of {classes}: {lacking}")
    return replace(schema, classes=classes)


def _before(store: Store) -> Manifest | None:
    """The manifest that stands there, if it can be used and is of tars beside it."""
    try:
        found = load_manifest(store)
    except DataError:
        return None
    return None if found.parts else found


def _find(store: Store, pattern: str) -> list[ObjectInfo]:
    every = {info.key: info for info in store.list() if not is_dropping(info.key)}
    there = {key: info for key, info in every.items() if key.endswith(".tar")}
    keys = expand(pattern) if pattern else list(there)
    packed = [key for key in every if key.lower().endswith(COMPRESSED) and (not pattern or {key, key.rpartition(".")[0]} & {*keys})]
    if packed:
        raise DataError(
            f"{len(packed)} tars in {store.uri} are compressed, such as {packed[0]}; decompress them (gunzip, unzstd), as shards "
            "are read by range, or name the others with data.shards"
        )
    if not pattern:
        if not there and store.uri.endswith(".tar"):
            folder, _, name = store.uri.rpartition("/")
            raise DataError(f"{store.uri} is one tar; give data.uri={folder} data.shards={name}")
        if not there:
            raise DataError(f"There are no tars in {store.uri}; check the location")
        return list(there.values())
    missing = [key for key in keys if key not in there]
    if missing:
        raise DataError(f"{len(missing)} of {len(keys)} tars are missing in {store.uri}, first {missing[0]}; check the pattern")
    return [there[key] for key in keys]


def _check_parts(store: Store, keys: list[str]) -> None:
    """Raises DataError if the tars are those of several parts, as train-000.tar and val-000.tar: an epoch would mix them."""
    parts: dict[str, list[str]] = {}
    for key in keys:
        words = [word for word in re.split(r"[^a-z]+", key.lower()) if word in SPLITS]
        parts.setdefault(words[0] if words else "", []).append(key)
    names = [name for name in parts if name]
    if len(names) > 1:
        some = parts[next((name for name in names if name.startswith("train")), names[0])]
        first, last = (re.fullmatch(r"(.*?)(\d+)(\D*)", key) for key in (some[0], some[-1]))
        pattern = some[0]
        if first and last and first.group(1, 3) == last.group(1, 3) and len(some) > 1:
            pattern = f"{first.group(1)}{{{first.group(2)}..{last.group(2)}}}{first.group(3)}"
        raise DataError(
            f"{store.uri} holds the tars of {' and '.join(names)}; name those that are to be one data set, such as "
            f"'data.shards={pattern}'"
        )


def _index(store: Store, schema: Schema, info: ObjectInfo) -> ShardIndex | Broken:
    facts = f"{tar.RULE} {info.key} {info.etag} {replace(schema, class_names=schema.class_names if schema.label_key else ())}"
    part = f"parts/index-{hashlib.sha256(facts.encode()).hexdigest()[:32]}.npz"
    with contextlib.suppress(MissingObject, DataError):  # a damaged one is made anew
        return ShardIndex.from_bytes(store.get(part))
    data, passed = store.get(info.key), Counter[str]()
    try:
        starts, crcs = index_tar(data, passed)
        spans = list(tar.samples(data, ended=True))
        _first_decodes(iter(spans), data, schema)
    except tar.TarError as error:
        return Broken(info.key, f"at byte {error.offset}, {error.reason}")
    except BadSample as error:
        return Broken(info.key, f"the first sample is unusable, {error}")
    otherwise, labels = _look(spans, data, schema)
    if labels and labels[-1] >= schema.classes:
        return Broken(
            info.key,
            f"it has the label {labels[-1]}, and data.classes={schema.classes} allows 0 to {schema.classes - 1} (if labels begin "
            "at 1, list them in data.class_names, one a line)",
        )
    index = ShardIndex(info.key, len(data), info.etag, starts, crcs, (), dict(passed), otherwise, labels)
    store.put(part, index.to_bytes())
    return index


def _look(spans: list[tar.Span], data: bytes, schema: Schema) -> tuple[int, tuple[int, ...]]:
    """How many images a person would see otherwise, and the labels that occur, sorted."""
    otherwise, found, view = 0, set[int](), memoryview(data)
    for span in spans:
        for ext, (start, size) in span.fields.items():
            if schema.dtype == "uint8" and ext in IMAGE_FIELDS and ext != "npy":
                otherwise += seen_otherwise(view[start : start + size])
        labels = {ext: (start, size) for ext, (start, size) in span.fields.items() if ext not in IMAGE_FIELDS}
        with contextlib.suppress(BadSample):  # counted when it is trained on, see data.bad_samples
            fields = span._replace(fields=labels).read(data)
            found.add(decode_label(fields, ANY_LABEL, schema.label_key, schema.class_names))
    return otherwise, tuple(sorted(found))


def _first_decodes(spans: Iterator[tar.Span], data: bytes, schema: Schema) -> None:
    first = next(spans, None)
    if first is None:
        raise BadSample("fields", "it holds no sample")
    decode_sample(first.read(data), schema)
