"""The generation job: a labelled set of samples as WebDataset shards with a manifest, and as one `.npz`.

A work unit is one shard. The set can be trained on (it is a data set like any other), and its `.npz` (uint8 NHWC `arr_0`, labels
`arr_1`) is what the ADM evaluator reads. A run on latents makes latents, in the units of those it was given: float NCHW, for
the decoder that they belong to.
"""

import dataclasses
import functools
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

from cluster import units
from cluster.metrics.images import to_uint8
from cluster.session import Resources, progress, session
from cluster.units import Unit
from configs.load import from_yaml, to_yaml
from configs.schema import Config
from data_pipeline.manifest import NAME, Manifest, Schema, ShardIndex, build_manifest, save_manifest
from data_pipeline.scan import scan
from data_pipeline.shards import Sample, pack_shard
from data_pipeline.store import Store, open_store
from trainer import checkpoint
from trainer.sampler import Sampler, image_labels


def generate(config: Config) -> str:
    """Make `generate.images` images at `generate.w`; returns the URI of the set. Finished shards are not made again.

    Raises UserError before Ray starts for whatever can be known before.
    """
    run = open_store(config.run)
    run.check()
    trained = checkpoint.find(run, config.sampling.checkpoint)
    options = config.generate
    conditions = {
        "sampling": dataclasses.asdict(config.sampling) | {"checkpoint": trained.sha256},
        "generate": dataclasses.asdict(options),
        "threads": config.cluster.cpus_per_worker,
        "code": units.code_version(),
    }
    if config.data.dtype != "uint8":
        conditions["latents"] = {"dtype": config.data.dtype, "scale": config.data.latent_scale}
    store = run.child(f"generate/w{options.w:g}-n{options.images}-{units.fingerprint(conditions)}/")
    plan = units.split([options.w], options.images, options.unit)
    if not (store.exists(NAME) and store.exists("samples.npz")):
        todo = units.missing(store, plan, "tar.npz")
        if todo:
            with session(config, config.cluster.actors) as resources:
                make = functools.partial(_Generate, to_yaml(config), store, trained.step, resources)
                for _ in progress(units.run(todo, make, config, resources), len(todo), "shard"):
                    pass
        data = config.data
        schema = Schema(data.image_size, data.channels, data.classes, dtype=data.dtype)
        manifest = build_manifest(schema, [ShardIndex.from_bytes(store.get(u.key("tar.npz"))) for u in plan])
        write_npz(store, manifest)
        save_manifest(store, manifest)
    print(f"{options.images} images at w={options.w:g}: {len(plan)} shards, {NAME} and samples.npz in {store.uri}")
    return store.uri


class _Generate:
    """Samples units and packs them as shards: one per actor."""

    def __init__(self, text: str, store: Store, step: int, resources: Resources) -> None:
        torch.set_num_threads(resources.threads)
        self.config, self.store = from_yaml(text), store
        self.sampler = Sampler.from_run(self.config, step, torch.device("cuda" if resources.gpus else "cpu"))

    def __call__(self, unit: Unit) -> None:
        index = torch.arange(unit.first, unit.last)
        labels = image_labels(self.config, index)
        x, data = self.sampler.sample(index, labels, unit.w), self.config.data
        images = to_uint8(x) if data.dtype == "uint8" else (x / data.latent_scale).numpy().astype(data.dtype)
        samples = (Sample(image, int(label)) for image, label in zip(images, labels, strict=True))
        packed = pack_shard(samples, unit.first, data.dtype)
        key = unit.key("tar")
        self.store.put(unit.key("tar.npz"), packed.index(key, self.store.put(key, packed.data)).to_bytes())


def write_npz(store: Store, manifest: Manifest) -> None:
    """All images of a set as `samples.npz`, written shard by shard: `arr_0` uint8 (N, H, W, C) or float (N, C, H, W), `arr_1` int64 (N,)."""
    schema = manifest.schema
    labels: list[int] = []
    with tempfile.TemporaryDirectory(prefix="freeguide-npz-") as folder:
        path = Path(folder) / "samples.npz"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as out:
                header = {"descr": np.dtype(schema.dtype).str, "fortran_order": False, "shape": (manifest.samples, *schema.shape)}
                np.lib.format.write_array_header_2_0(out, header)
                for pixels, label in scan(store, manifest):
                    out.write(pixels.tobytes())
                    labels.append(label)
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as out:
                np.lib.format.write_array(out, np.array(labels, np.int64), allow_pickle=False)
        store.put("samples.npz", path.read_bytes())
