"""The prepare job: a source of images becomes WebDataset shards and a manifest, once. And `index`, for tars made elsewhere.

A shard is a work unit whose bytes depend on its items alone, so it does not matter who writes it: a few shards are written here,
more of them on the actors of a Ray cluster.
"""

import functools
import time
from collections.abc import Iterator
from dataclasses import replace

from freeguide.cluster.evaluation.executor import Resources
from freeguide.cluster.runtime.engines import executor
from freeguide.configs.errors import ConfigError, counted, visible
from freeguide.configs.schema import Config
from freeguide.data_pipeline.index import index_shards
from freeguide.data_pipeline.manifest import Manifest, Schema
from freeguide.data_pipeline.pictures import count_of
from freeguide.data_pipeline.shards import Plan, Source, write_shards
from freeguide.data_pipeline.sources.labels import read_class_names
from freeguide.data_pipeline.sources.open import open_source
from freeguide.data_pipeline.store.base import Store
from freeguide.data_pipeline.store.open import open_data, open_like
from freeguide.data_pipeline.stored import is_run, save_mixture

FEW = 16  # shards that are written before a Ray cluster would have started


def prepare(config: Config) -> Manifest:
    """Write `data.source` to `data.uri`; where it already is, do nothing. Raises UserError."""
    # What is read without credentials, data.path, is copied to a place of one's own.
    store = open_data(replace(config.data, unsigned=False))
    store.check()
    _check_place(open_like(store, config.data.uri))
    store.clean_up()
    source = open_source(config.data)
    began, left_out = time.monotonic(), 0

    def progress(done: int, of: int, bad: tuple[str, ...]) -> None:
        nonlocal left_out
        left_out += len(bad)
        for name in bad:
            print(f"left out: {visible(name)}", flush=True)
        print(f"shard {done}/{of}", flush=True)

    manifest = write_shards(
        source,
        store,
        shard_samples=config.data.shard_samples,
        bad_images=config.data.bad_images,
        progress=progress,
        elsewhere=functools.partial(_write_on_actors, config, source, store),
    )
    if left_out:
        print(f"{counted(left_out, 'image')} left out, data.bad_images={config.data.bad_images:g} allows it")
    if manifest.source == Plan.make(source, config.data.shard_samples).formerly:
        print(
            f"{store.uri} was prepared by an earlier version, which took pictures as they are stored (EXIF and transparency did "
            "not count), and stays as it is; choose another data.uri to prepare it anew"
        )
    _describe(manifest, store.uri, time.monotonic() - began)
    return manifest


def _write_on_actors(config: Config, source: Source, store: Store, plan: Plan, missing: list[int]) -> Iterator[int]:
    if len(missing) <= FEW:
        yield from missing
        return
    config = replace(config, cluster=replace(config.cluster, gpus_per_worker=0.0))
    with executor(config, config.cluster.actors) as engine:
        yield from engine.run(missing, functools.partial(_Write, source, store, plan))


class _Write:
    """Writes shards: one per actor."""

    def __init__(self, source: Source, store: Store, plan: Plan, _: Resources) -> None:
        self.source, self.store, self.plan = source, store, plan

    def __call__(self, unit: int) -> None:
        self.plan.write(self.source, self.store, unit)


def index(config: Config) -> Manifest:
    """Write the manifest of WebDataset tars that stand at `data.uri` already, or of the mixture of other data sets.

    Raises UserError, naming what is broken.
    """
    store, data = open_data(config.data), config.data
    store.check()
    _check_place(open_like(store, config.data.uri))
    store.clean_up()
    began = time.monotonic()
    if data.mixture:
        mixture = save_mixture(store, data.mixture)
        _describe(mixture, store.uri, time.monotonic() - began)
        return mixture
    names = read_class_names(data)
    key = data.label_key or ("label" if names else "")
    manifest, broken = index_shards(
        store,
        Schema(data.image_size, data.channels, data.classes, names, data.dtype, key),
        data.shards,
        skip_broken=data.skip_broken,
        threads=data.fetch_threads,
        progress=lambda done, of: print(f"tar {done}/{of}", flush=True),
    )
    for tar in broken:
        print(f"left out: {tar.key}: {tar.reason}")
    _describe(manifest, store.uri, time.monotonic() - began)
    return manifest


def _check_place(store: Store) -> None:
    if is_run(store):
        raise ConfigError(f"data.uri={store.uri} is a run, and a data set needs a place of its own; name another data.uri")


def _describe(manifest: Manifest, uri: str, seconds: float) -> None:
    schema = manifest.schema
    kind = counted(manifest.samples, "image" if schema.dtype == "uint8" else "latent")
    if schema.dtype != "uint8":
        kind += f" of {schema.dtype}"
    classes, shards = counted(schema.classes, "class", "classes"), counted(len(manifest.shards), "shard")
    print(
        f"{kind} {'x'.join(map(str, schema.shape))}, {classes}, {shards}, "
        f"{manifest.bytes / 2**20:.1f} MiB, fingerprint {manifest.fingerprint[:12]}, {seconds:.1f} s: {uri}"
    )
    if manifest.passed_over:
        print(f"passed over: {count_of(manifest.passed_over)}")
