"""The prepare job: a source of images becomes WebDataset shards and a manifest, once. And `index`, for tars made elsewhere."""

import time

from configs.schema import Config
from data_pipeline.index import index_shards
from data_pipeline.manifest import Manifest, Schema
from data_pipeline.shards import write_shards
from data_pipeline.sources import open_source
from data_pipeline.store import open_store


def prepare(config: Config) -> Manifest:
    """Write `data.source` to `data.uri`; where it already is, do nothing. Raises UserError."""
    store = open_store(config.data.uri)
    store.check()
    source = open_source(config.data)
    began, left_out = time.monotonic(), 0

    def progress(done: int, of: int, bad: tuple[str, ...]) -> None:
        nonlocal left_out
        left_out += len(bad)
        for name in bad:
            print(f"left out: {name}", flush=True)
        print(f"shard {done}/{of}", flush=True)

    manifest = write_shards(
        source, store, shard_samples=config.data.shard_samples, bad_images=config.data.bad_images, progress=progress
    )
    if left_out:
        print(f"{left_out} {'image' if left_out == 1 else 'images'} left out, data.bad_images={config.data.bad_images:g} allows it")
    _describe(manifest, store.uri, time.monotonic() - began)
    return manifest


def index(config: Config) -> Manifest:
    """Write the manifest of WebDataset tars that stand at `data.uri` already. Raises UserError, naming what is broken."""
    store, data = open_store(config.data.uri), config.data
    store.check()
    began = time.monotonic()
    manifest, broken = index_shards(
        store,
        Schema(data.image_size, data.channels, data.classes),
        data.shards,
        skip_broken=data.skip_broken,
        threads=data.fetch_threads,
        progress=lambda done, of: print(f"tar {done}/{of}", flush=True),
    )
    for tar in broken:
        print(f"left out: {tar.key}: {tar.reason}")
    _describe(manifest, store.uri, time.monotonic() - began)
    return manifest


def _describe(manifest: Manifest, uri: str, seconds: float) -> None:
    size, schema = manifest.schema.image_size, manifest.schema
    print(
        f"{manifest.samples} images {size}x{size}x{schema.channels}, {schema.classes} classes, {len(manifest.shards)} shards, "
        f"{manifest.bytes / 2**20:.1f} MiB, fingerprint {manifest.fingerprint[:12]}, {seconds:.1f} s: {uri}"
    )
