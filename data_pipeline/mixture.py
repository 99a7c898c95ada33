"""Several data sets as one: the chunks of all of them, one data set after the other.

If the last chunk of one is not full, the ids that it lacks stand for no sample. `order.Mixture` deals the windows.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from freeguide.configs.errors import DataError
from freeguide.data_pipeline.crc import combine_crcs
from freeguide.data_pipeline.manifest import Manifest, Part
from freeguide.data_pipeline.tar import BLOCK


def coarser(manifest: Manifest, chunk_samples: int) -> Manifest:
    """The same data set in larger chunks; `chunk_samples` is a multiple of what they have now."""
    group = chunk_samples // manifest.chunk_samples
    first = np.arange(len(manifest.starts)) * manifest.chunk_samples
    shard = np.searchsorted(manifest.first_samples, first, side="right") - 1
    before = np.cumsum([0, *(row.bytes for row in manifest.shards)], dtype=np.int64)
    lengths = np.diff(np.append(before[shard] + manifest.starts.astype(np.int64) * BLOCK, before[-1]))
    crcs = combine_crcs(manifest.crcs, lengths, group)
    return replace(manifest, chunk_samples=chunk_samples, starts=manifest.starts[::group].copy(), crcs=crcs)


def join(parts: Sequence[tuple[str, int, Manifest]]) -> Manifest:
    """The mixture of data sets, each with its URI and weight. Raises DataError if they do not fit together."""
    schema = parts[0][2].schema
    q = max(manifest.chunk_samples for _, _, manifest in parts)
    for uri, _, manifest in parts:
        if manifest.parts:
            raise DataError(f"{uri} is a mixture itself; name its data sets one by one")
        if replace(manifest.schema, class_names=()) != replace(schema, class_names=()):
            raise DataError(
                f"{uri} has other images or classes than {parts[0][0]}; prepare both with one image_size, dtype and classes."
            )
        if manifest.samples < q:
            raise DataError(f"{uri} has {manifest.samples} samples, fewer than the {q} of a chunk; leave it out")
    found = [coarser(manifest, q) for _, _, manifest in parts]
    rows = [
        replace(shard, key=f"{uri}/{shard.key}")
        for (uri, _, _), manifest in zip(parts, found, strict=True)
        for shard in manifest.shards
    ]
    return Manifest(
        schema,
        tuple(rows),
        q,
        np.concatenate([manifest.starts for manifest in found]),
        np.concatenate([manifest.crcs for manifest in found]),
        "mixture",
        tuple(Part(uri, weight, len(manifest.shards), manifest.samples, manifest.bytes) for uri, weight, manifest in parts),
    )
