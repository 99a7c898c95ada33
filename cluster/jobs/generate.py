"""The generation job: a labelled set of samples as WebDataset shards with a manifest, and as one `.npz`.

A work unit is one shard. The set is a data set like any other, so it can be trained on. Image i is the sample with key i; it
depends on i and on what the manifest's `source` says (run, checkpoint, seed, w and every other option), never on the worker that
made it. The `.npz` (uint8 NHWC `arr_0`, labels `arr_1`) is what the ADM evaluator reads. No process ever holds the whole set: the
driver needs 60 bytes per image for the manifest, and the `.npz` its own size on the disk of TMPDIR (and again in a run's folder).
"""

import dataclasses
import functools
import json
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from freeguide.cluster.evaluation import units
from freeguide.cluster.evaluation.conditions import sampled
from freeguide.cluster.evaluation.executor import Executor, Resources
from freeguide.cluster.evaluation.kept import delete_old, needed_by
from freeguide.cluster.evaluation.series import Series, Trained, as_trained
from freeguide.cluster.evaluation.units import Unit
from freeguide.cluster.runtime.engines import executor
from freeguide.cluster.runtime.progress import progress
from freeguide.configs.errors import ConfigError, DataError, counted
from freeguide.configs.schema import Config
from freeguide.data_pipeline.artifact import fingerprint
from freeguide.data_pipeline.closure import code_version
from freeguide.data_pipeline.manifest import Manifest, Schema, ShardIndex, build_manifest
from freeguide.data_pipeline.scan import scan
from freeguide.data_pipeline.shards import Sample, pack_shard
from freeguide.data_pipeline.store.base import Store, read_each
from freeguide.data_pipeline.store.folder import FolderStore
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stored import NAME, load_manifest, save_manifest
from freeguide.trainer.networks.kernels import choose_kernels
from freeguide.trainer.rounding import to_uint8
from freeguide.trainer.sampler import image_labels
from freeguide.trainer.training.loop import misguided

NPZ = "samples.npz"
MAKING = "freeguide.cluster.jobs.generate:_Generate"  # decides what a shard holds


def generate(config: Config) -> str:
    """Make `generate.images` images at `generate.w`; returns the URI of the set. Finished shards are not made again.

    Raises UserError before Ray starts for whatever can be known before.
    """
    trained = as_trained(config, "generate")
    for sentence in misguided(trained.config, "generate"):
        print(f"WARNING: {sentence}", file=sys.stderr, flush=True)
    run = open_store(config.run)
    run.clean_up()
    with executor(config, config.cluster.actors) as engine:
        return units.on_one_kind(run, engine, functools.partial(_generated, trained))


def _generated(trained: Trained, kind: str, engine: Executor) -> str:
    config, step = trained.config, trained.weights.step
    run, options = open_store(config.run), config.generate
    conditions = {
        "sampling": dataclasses.asdict(config.sampling) | {"checkpoint": trained.weights.all_of},
        "options": {key: value for key, value in sampled(config).items() if key.split(".")[0] not in ("sampling", "evaluate")},
        "generate": {"images": options.images, "unit": options.unit, "w": options.w},
        "threads": config.cluster.cpus_per_worker,
        "device": kind,
        "code": code_version(MAKING),
    }
    if config.data.dtype != "uint8":
        conditions["latents"] = {"dtype": config.data.dtype, "scale": config.data.latent_scale}
    store = run.child(f"generate/w{options.w:g}-n{options.images}-{fingerprint(conditions)}/")
    schema = Schema(config.data.image_size, config.data.channels, config.data.classes, dtype=config.data.dtype)
    plan = units.split([options.w], options.images, options.unit)
    wanted = options.npz and not store.exists(NPZ)
    if wanted:
        _check_disk(store, schema, options.images)
    if not store.exists(NAME):
        if todo := units.missing(store, plan, "tar.npz"):
            needed_by(store, trained.weights)
            make = functools.partial(_Generate, Series(config, trained.weights, store, trained.origin, kind))
            for _ in progress(engine.run(todo, make), len(todo), "shard", engine.at_once):
                pass
        source = json.dumps({"run": run.uri, "step": step} | conditions, sort_keys=True)
        save_manifest(store, build_manifest(schema, _indexes(store, plan), source), new=True)
    if wanted:
        _check_disk(store, schema, options.images)  # again, as the shards took hours and room
        write_npz(store, load_manifest(store))
    files = f"{NAME} and {NPZ}" if options.npz else NAME
    delete_old(run, config.train.keep_checkpoints)
    print(f"{counted(options.images, 'image')} at w={options.w:g}: {counted(len(plan), 'shard')}, {files} in {store.uri}")
    return store.uri


class _Generate:
    """Samples units and packs them as shards: one per actor."""

    def __init__(self, series: Series, resources: Resources) -> None:
        choose_kernels()
        torch.set_num_threads(resources.threads)
        self.config, self.store = series.config, series.store
        units.check_kind(series.kind, units.kind_of(resources.device))
        self.sampler = series.load(resources.device)

    def __call__(self, unit: Unit) -> None:
        index = torch.arange(unit.first, unit.last)
        labels = image_labels(self.config, index)
        x, data = self.sampler.sample(index, labels, unit.w), self.config.data
        images = to_uint8(x) if data.dtype == "uint8" else (x / data.latent_scale).numpy().astype(data.dtype)
        samples = (Sample(image, int(label)) for image, label in zip(images, labels, strict=True))
        packed = pack_shard(samples, unit.first, data.dtype)
        key = unit.key("tar")
        if self.store.create(key, packed.data) != packed.data:
            raise DataError(
                f"{self.store.uri}/{key} holds other images than these: another command makes them on a device that rounds "
                "otherwise, or it is damaged; let that end, or delete it and give the command again"
            )
        self.store.create(unit.key("tar.npz"), packed.index(key, self.store.stat(key).etag).to_bytes())


def _indexes(store: Store, plan: list[Unit]) -> list[ShardIndex]:
    """The index of every shard, in their order: 10^7 images have ten thousand of them."""
    return read_each(
        store, [unit.key("tar.npz") for unit in plan], lambda key, data: ShardIndex.from_bytes(data, f"{store.uri}/{key}")
    )


def _check_disk(store: Store, schema: Schema, images: int) -> None:
    """Raises ConfigError where the `.npz` would not fit into TMPDIR and, where that is a folder, into the store."""
    size = images * int(np.prod(schema.shape)) * np.dtype(schema.dtype).itemsize
    places = [Path(tempfile.gettempdir()), *([store.folder] if isinstance(store, FolderStore) else [])]
    disks = [_disk_of(place) for place in places]
    for place, (device, free) in zip(places, disks, strict=True):
        needed = size * [other for other, _ in disks].count(device)
        if needed > free:
            twice = ", twice its size as it is made and kept on one disk," if needed > size else ""
            raise ConfigError(
                f"{NPZ} of {images} images takes {needed / 1e9:.1f} GB{twice} and {place} has {free / 1e9:.1f} GB free; make room, "
                "set TMPDIR to a larger disk, or generate.npz=false for shards only"
            )


def _disk_of(place: Path) -> tuple[int, int]:
    """The number of the disk that a folder is on, or will be on, and its free bytes."""
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    return there.stat().st_dev, shutil.disk_usage(there).free


def write_npz(store: Store, manifest: Manifest) -> None:
    """The whole set as `samples.npz`, by way of the disk of TMPDIR. Raises ConfigError where that refuses it, and cleans it up."""
    try:
        with tempfile.TemporaryDirectory(prefix="freeguide-npz-") as folder:
            _write_arrays(Path(folder) / NPZ, store, manifest)
            store.put_file(NPZ, Path(folder) / NPZ)
    except OSError as error:
        raise ConfigError(
            f"{NPZ} could not be written in {tempfile.gettempdir()} ({error.strerror or error}); make room there or set TMPDIR to "
            "a larger disk, then give the same command again: the shards are kept"
        ) from error


def _write_arrays(path: Path, store: Store, manifest: Manifest) -> None:
    """The `.npz`, image by image: `arr_0` uint8 (N, H, W, C) or float (N, C, H, W), `arr_1` int64 (N,)."""
    schema = manifest.schema
    labels = np.empty(manifest.samples, np.int64)
    images = progress(scan(store, manifest), manifest.samples, f"{NPZ}: image")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as out:
            header = {"descr": np.dtype(schema.dtype).str, "fortran_order": False, "shape": (manifest.samples, *schema.shape)}
            np.lib.format.write_array_header_2_0(out, header)
            for i, (values, label) in enumerate(images):
                out.write(values.tobytes())
                labels[i] = label
        with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as out:
            np.lib.format.write_array(out, labels, allow_pickle=False)
