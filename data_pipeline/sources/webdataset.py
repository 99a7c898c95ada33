"""WebDataset tars that someone else made, and that a manifest has been written of."""

from dataclasses import replace

from freeguide.configs.errors import DataError
from freeguide.configs.schema import DataConfig
from freeguide.data_pipeline.decode import RECORDED, WHITE, BadSample, decode_sample
from freeguide.data_pipeline.fetch import Fetch, Fetcher, Fields
from freeguide.data_pipeline.manifest import Manifest, Schema
from freeguide.data_pipeline.shards import Sample, Source
from freeguide.data_pipeline.sources.labels import check_classes
from freeguide.data_pipeline.sources.shuffle import Blockwise
from freeguide.data_pipeline.store.base import Store
from freeguide.data_pipeline.store.open import access_to, open_store
from freeguide.data_pipeline.stored import load_manifest

BLOCK_BYTES = 4 * 2**20  # of tars that are read in blocks


def open_tars(data: DataConfig) -> Source:
    """WebDataset tars in a folder or bucket that `freeguide index` has been run on, read in blocks of about 4 MiB.

    Images are read as a person sees them (see `decode_picture`), labels as the manifest says. Raises DataError if there is no
    manifest, or it speaks of another number of classes or another dtype.
    """
    store = open_store(data.path, access=access_to(data, data.path))
    manifest = load_manifest(store)
    check_classes(f"{data.path} has {manifest.schema.classes} classes", manifest.schema.classes, data.classes)
    if manifest.schema.dtype != data.dtype:
        raise DataError(f"{data.path} has samples of {manifest.schema.dtype}, but data.dtype is {data.dtype}; set it to that")
    schema = Schema(data.image_size, data.channels, manifest.schema.classes, manifest.schema.class_names, data.dtype)
    stored = replace(schema, label_key=manifest.schema.label_key)
    chunk_bytes = max(1, manifest.bytes * manifest.chunk_samples // manifest.samples)
    per_block = manifest.chunk_samples * max(1, BLOCK_BYTES // chunk_bytes)
    rows = [min(per_block, manifest.samples - first) for first in range(0, manifest.samples, per_block)]

    def load(block: int) -> list[Fields | BadSample]:
        return _read_tars(store, manifest, range(block * per_block, block * per_block + rows[block]))

    def use(fields: Fields | BadSample, block: int, row: int) -> Sample:
        try:
            if isinstance(fields, BadSample):
                raise fields
            image, label = decode_sample(fields, stored, data.resize, data.background)
        except BadSample as error:
            raise BadSample(error.cause, f"{manifest.describe(block * per_block + row)}: {error}") from error
        return Sample(image, label)

    old = f"tars {RECORDED[data.resize]} {manifest.fingerprint}"
    seen = f"seen {old}" + (f" on {data.background}" if data.background != WHITE else "")
    return Source(
        schema,
        manifest.samples,
        Blockwise(load, use, rows, manifest.bytes),
        seen if data.dtype == "uint8" else old,
        manifest.passed_over,
        formerly=old if data.dtype == "uint8" else "",
    )


def _read_tars(store: Store, manifest: Manifest, ids: range) -> list[Fields | BadSample]:
    """The samples with these neighbouring ids, read and checked as for training."""
    q = manifest.chunk_samples
    chunks = tuple(range(ids.start // q, -(-ids.stop // q)))
    wanted = tuple(tuple((id_ - chunk * q, id_) for id_ in range(chunk * q, min(chunk * q + q, ids.stop))) for chunk in chunks)
    fetcher = Fetcher(store, manifest, 1)
    try:
        found = fetcher.read(Fetch(0, 0, chunks, wanted))
    finally:
        fetcher.close()
    return [found[id_] for id_ in ids]
