"""A whole data set, once, in the manifest's order: for evaluators, reference statistics and exports, never for training."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from configs.errors import DataError
from data_pipeline import tar
from data_pipeline.decode import Values, decode_sample
from data_pipeline.manifest import Manifest
from data_pipeline.store import Store


def scan(store: Store, manifest: Manifest) -> Iterator[tuple[Values, int]]:
    """Every image, uint8 (H, W, C), or latents, float (C, H, W), with its label.

    Raises DataError, naming the shard, at the first that cannot be used.
    """
    if manifest.parts:
        raise DataError(f"{store.uri} is a mixture; set data.uri to one of its data sets: {manifest.parts[0].uri}, ...")
    for shard in manifest.shards:
        data, count = store.get(shard.key), 0
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


def scan_all(store: Store, manifest: Manifest) -> tuple[Values, npt.NDArray[np.int64]]:
    """The data set in memory: images uint8 (N, H, W, C), or latents (N, C, H, W), and labels int64 (N,)."""
    images = np.empty((manifest.samples, *manifest.schema.shape), manifest.schema.dtype)
    labels = np.empty(manifest.samples, np.int64)
    for i, (image, label) in enumerate(scan(store, manifest)):
        images[i], labels[i] = image, label
    return images, labels
