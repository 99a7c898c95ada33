"""How well an order mixes, measured where it is hardest: every shard holds one kind of sample, numbered by its shard.

Three figures per order, beside those of true random draws:

    distinct shards   different shards in one batch
    mean spread       standard deviation of the batch means over that of independent draws, sigma / sqrt(B)
    autocorrelation   of the means of neighbouring batches
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from freeguide.data_pipeline.manifest import Manifest
from freeguide.data_pipeline.order import AnyOrder, Ints


@dataclass(frozen=True)
class Quality:
    distinct_shards: float
    mean_spread: float
    autocorrelation: float


def measure(manifest: Manifest, order: AnyOrder, global_batch: int, batches: int = 512) -> Quality:
    """The figures of the first `batches` batches of the order."""
    ids = order.locate(np.arange(batches * global_batch))[1]
    return _figures(manifest, ids.reshape(batches, global_batch))


def true_random(manifest: Manifest, global_batch: int, batches: int = 512, seed: int = 0) -> Quality:
    """The same figures for independent draws."""
    return _figures(manifest, np.random.default_rng(seed).integers(0, manifest.samples, (batches, global_batch)))


def _figures(manifest: Manifest, ids: Ints) -> Quality:
    shards = np.searchsorted(manifest.first_samples, ids, side="right") - 1
    distinct = np.mean([len(np.unique(batch)) for batch in shards])
    counts = np.array([shard.samples for shard in manifest.shards])
    numbers = np.arange(len(counts))
    centre = np.average(numbers, weights=counts)
    spread = np.sqrt(np.average((numbers - centre) ** 2, weights=counts))
    if spread == 0:
        return Quality(float(distinct), 0.0, 0.0)  # one shard: there is nothing to mix
    means = shards.mean(1) - centre
    correlation = np.sum(means[1:] * means[:-1]) / max(np.sum(means**2), np.finfo(float).tiny)
    return Quality(float(distinct), float(means.std() / (spread / np.sqrt(ids.shape[1]))), float(correlation))


def table(manifest: Manifest, order: AnyOrder, global_batch: int) -> str:
    """Lines of text for `freeguide inspect --order`."""
    rows = [("this order", measure(manifest, order, global_batch)), ("true random", true_random(manifest, global_batch))]
    lines = [f"{order.streams} streams, windows of {order.window_chunks} chunks, chunks of {order.chunk_samples} samples"]
    lines.append(f"{'':12} {'distinct shards':>16} {'mean spread':>12} {'autocorrelation':>16}")
    for name, row in rows:
        lines.append(f"{name:12} {row.distinct_shards:16.1f} {row.mean_spread:12.2f} {row.autocorrelation:16.2f}")
    return "\n".join(lines)
