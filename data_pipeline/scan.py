"""A whole data set, once, in the manifest's order: for evaluators, reference statistics and exports, never for training.

The bytes of every shard are those that the manifest has checksums of, or there is one sentence about it.
"""

import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from freeguide.configs.errors import DataError
from freeguide.data_pipeline import tar
from freeguide.data_pipeline.decode import Values, decode_sample
from freeguide.data_pipeline.manifest import Manifest
from freeguide.data_pipeline.store.base import AGAIN, Store


def scan(store: Store, manifest: Manifest, every: int = 1) -> Iterator[tuple[Values, int]]:
    """Every image, uint8 (H, W, C), or latents, float (C, H, W), with its label: of all shards, or of one shard in `every`.

    Raises DataError, naming the shard, at the first that cannot be used.
    """
    if manifest.parts:
        raise DataError(f"{store.uri} is a mixture; set data.uri to one of its data sets: {manifest.parts[0].uri}, ...")
    begun = (-1, 0)
    for number in range(0, len(manifest.shards), every):
        data = store.get(manifest.shards[number].key)
        wrong, begun = _check(store, manifest, number, data, begun if every == 1 else (-1, 0))
        if wrong:
            for _ in _decoded(store, manifest, number, data):
                pass  # what is wrong with a sample says more than a checksum
            where = " or ".join(f"{store.uri}/{manifest.shards[shard].key}" for shard in wrong)
            raise DataError(f"{where} does not hold the bytes that were indexed; restore it from a copy, or {AGAIN}")
        yield from _decoded(store, manifest, number, data)


def scan_all(store: Store, manifest: Manifest, every: int = 1) -> tuple[Values, npt.NDArray[np.int64]]:
    """What `scan` gives, in memory: images uint8 (N, H, W, C), or latents (N, C, H, W), and labels int64 (N,)."""
    count = sum(shard.samples for shard in manifest.shards[::every])
    images = np.empty((count, *manifest.schema.shape), manifest.schema.dtype)
    labels = np.empty(count, np.int64)
    for i, (image, label) in enumerate(scan(store, manifest, every)):
        images[i], labels[i] = image, label
    return images, labels


def _check(store: Store, manifest: Manifest, number: int, data: bytes, begun: tuple[int, int]) -> tuple[list[int], tuple[int, int]]:
    """The shards one of which is not what was indexed, by the CRC-32 of every chunk that shard `number` has a part of.

    Of a chunk that it shares with others, their parts are read. `begun` and what is returned: the chunk in which the shard before,
    or this one, ends, and the CRC-32 of it so far.
    """
    view, wrong = memoryview(data), [number] if len(data) != manifest.shards[number].bytes else []
    q, before = manifest.chunk_samples, begun
    first, end = (int(samples) for samples in manifest.first_samples[number : number + 2])
    for chunk in range(first // q, -(-end // q)):
        crc = before[1] if before[0] == chunk else 0
        for shard, start, stop in manifest.ranges(chunk):
            if shard < number and before[0] == chunk:
                continue
            part = view[start:stop] if shard == number else store.get_range(manifest.shards[shard].key, start, stop - start)
            crc = zlib.crc32(part, crc)
            if shard == number:
                begun = (chunk, crc)
        if crc != manifest.crcs[chunk]:
            wrong = wrong or [shard for shard, *_ in manifest.ranges(chunk)]
    return wrong, begun


def _decoded(store: Store, manifest: Manifest, number: int, data: bytes) -> Iterator[tuple[Values, int]]:
    shard, count = manifest.shards[number], 0
    try:
        for span in tar.counted(data, shard.samples, ended=True):
            count += 1
            yield decode_sample(span.read(data), manifest.schema)
    except DataError as error:
        raise DataError(f"{store.uri}/{shard.key}: sample {count} cannot be read: {error}") from error
    if count != shard.samples:
        raise DataError(
            f"{store.uri}/{shard.key}: holds {count} samples, the manifest says {shard.samples}; prepare the data set again."
        )
