"""A manifest as it is stored: written last, read first, and checked as bytes that anybody may have written.

`manifest.json` names the index by its SHA-256 and is sealed itself, so a reader trusts neither. A mixture names its data sets by
their fingerprints, which it checks when it is read.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from freeguide.configs.errors import DataError
from freeguide.configs.untrusted import MALFORMED, parse_json, whole
from freeguide.data_pipeline.artifact import check_seal, read_npy, sealed_json
from freeguide.data_pipeline.claim import claim, release
from freeguide.data_pipeline.manifest import MOST_BYTES, MOST_SAMPLES, Manifest, Schema, Shard, disordered
from freeguide.data_pipeline.mixture import join
from freeguide.data_pipeline.store.base import MissingObject, Store, checked
from freeguide.data_pipeline.store.open import open_like

NAME = "manifest.json"
MANIFEST = "freeguide manifest"  # its format, if the data set is no mixture
MIXTURE = "freeguide mixture"
VERSION = 1
MANIFEST_BYTES = 2**31  # 10 million shards
MOST_PARTS = 10**4  # data sets of a mixture


def load_manifest(store: Store) -> Manifest:
    """Raises DataError if there is no manifest, or one that is damaged or of another version."""
    return _load(store, parts=True)


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


def save_mixture(store: Store, weights: Mapping[str, int]) -> Manifest:
    """Writes the mixture of the data sets at these URIs.

    Raises DataError if one is missing or does not fit to the others, and if a data set with tars of its own stands already.
    """
    if (before := _header(store)) and before.get("format") == MANIFEST:
        raise DataError(
            f"{store.home} holds a data set of its own, whose manifest would be lost; name another data.uri for a mixture"
        )
    parts = [(uri, weight, load_manifest(open_like(store, uri))) for uri, weight in weights.items()]
    joined = join(parts)
    rows = [{"uri": uri, "weight": weight, "fingerprint": manifest.fingerprint} for uri, weight, manifest in parts]
    text = sealed_json({"format": MIXTURE, "version": VERSION, "parts": rows})
    identity = hashlib.sha256(text).hexdigest()
    claim(store, "index", identity)
    try:
        store.put(NAME, text)
    finally:
        release(store, identity)
    return joined


def stored_schema(store: Store) -> Schema | None:
    """What a manifest says of its samples, even if all else of it is damaged; None if it does not."""
    try:
        return Schema.from_dict(parse_json(store.get(NAME, MANIFEST_BYTES), MANIFEST_BYTES)["schema"])
    except (MissingObject, *MALFORMED):
        return None


def is_run(store: Store) -> bool:
    """Whether training writes there: a data set needs a place of its own."""
    return not store.exists(NAME) and store.exists("config.yaml")


def _header(store: Store) -> dict[str, Any] | None:
    """What the manifest at a place says first, whatever the rest of it; None if there is none, or no JSON."""
    try:
        found = parse_json(store.get(NAME), MANIFEST_BYTES)
    except (MissingObject, *MALFORMED):
        return None
    return found if isinstance(found, dict) else None


def _load(store: Store, parts: bool) -> Manifest:
    where = f"{store.home}/{NAME}"
    try:
        raw = store.get(NAME, MANIFEST_BYTES)
    except MissingObject as error:
        if store.uri.endswith(".tar"):
            folder, _, name = store.uri.rpartition("/")
            raise DataError(f"{store.uri} is one tar; run `freeguide index` with data.uri={folder} data.shards={name}") from error
        if is_run(store):
            raise DataError(
                f"{store.uri} is a run, and no data set; set data.uri to where `freeguide prepare` wrote the data"
            ) from error
        raise DataError(
            f"There is no manifest at {where}; run `freeguide prepare` to write shards, or `freeguide index` for existing tars"
        ) from error
    check_seal(raw, f"The manifest {where}", "run `freeguide index` again")
    try:
        header = parse_json(raw, MANIFEST_BYTES)
        if header["format"] == MIXTURE and header["version"] == VERSION:
            if not parts:
                raise ValueError("it is a mixture in a mixture")
            return _load_mixture(store, where, header)
        if header["format"] != MANIFEST or header["version"] != VERSION:
            raise DataError(f"{where} is a manifest of another version; run `freeguide index` again")
        index = store.get(checked(header["index"]["key"]), MANIFEST_BYTES)
        if hashlib.sha256(index).hexdigest() != header["index"]["sha256"]:
            raise ValueError("the index is not the one that the manifest names")
        manifest = _parsed(header, read_npy(index, "<u4", 2))
        if manifest.fingerprint != header["fingerprint"]:
            raise ValueError("the fingerprint does not fit the content")
    except (MissingObject, *MALFORMED) as error:
        raise DataError(f"The manifest {where} is damaged ({error}); run `freeguide index` again") from error
    return manifest


def _load_mixture(store: Store, where: str, header: dict[str, Any]) -> Manifest:
    rows = [(row["uri"], whole(row["weight"], 1, MOST_SAMPLES), row["fingerprint"]) for row in header["parts"]]
    if not 0 < len(rows) <= MOST_PARTS or not all(isinstance(uri, str) for uri, _, _ in rows):
        raise ValueError("its data sets have no names, or are none or too many")
    parts = []
    for uri, weight, fingerprint in rows:
        manifest = _load(open_like(store, uri), parts=False)
        if fingerprint not in (manifest.fingerprint, manifest.content):
            raise DataError(f"{uri} has changed since it became part of {where}; run `freeguide index` with data.mixture again")
        parts.append((uri, weight, manifest))
    return join(parts)


def _parsed(header: dict[str, Any], table: npt.NDArray[Any]) -> Manifest:
    """Raises one of MALFORMED if the shards and their chunks cannot be."""
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
    if disordered(starts, shard, np.array([row.bytes for row in rows])):
        raise ValueError("its chunks do not fit into its shards")
    return manifest
