"""The prepare job: a source of images becomes WebDataset shards and a manifest, once."""

import time

from configs.schema import Config
from data_pipeline.manifest import Manifest
from data_pipeline.shards import write_shards
from data_pipeline.sources import open_source
from data_pipeline.store import open_store


def prepare(config: Config) -> Manifest:
    """Write `data.source` to `data.uri`; where it already is, do nothing. Raises UserError."""
    store = open_store(config.data.uri)
    store.check()
    source = open_source(config.data)
    began = time.monotonic()

    def progress(done: int, of: int) -> None:
        print(f"shard {done}/{of}", flush=True)

    manifest = write_shards(
        source, store, shard_samples=config.data.shard_samples, bad_images=config.data.bad_images, progress=progress
    )
    size, schema = manifest.schema.image_size, manifest.schema
    print(
        f"{manifest.samples} images {size}x{size}x{schema.channels}, {schema.classes} classes, {len(manifest.shards)} shards, "
        f"{manifest.bytes / 2**20:.1f} MiB, fingerprint {manifest.fingerprint[:12]}, {time.monotonic() - began:.1f} s: {store.uri}"
    )
    return manifest
