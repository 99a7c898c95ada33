"""Tests of quality.py on the model data set: 1.024 M samples in 1000 shards of one kind each, batches of 256."""

import numpy as np
import pytest

from freeguide.data_pipeline.manifest import Manifest, Schema, Shard
from freeguide.data_pipeline.order import Order
from freeguide.data_pipeline.quality import measure, table, true_random

SHARDS = tuple(Shard(f"{number:04d}.tar", 1024 * 10_000, "", 1024) for number in range(1000))
EMPTY = np.zeros(32_000, np.uint32)
MODEL = Manifest(Schema(64, 3, 1000), SHARDS, 32, EMPTY, EMPTY)


def test_true_random_draws_have_their_closed_forms() -> None:
    """Expected distinct shards: 1000 (1 - 0.999^256) = 226. Spread 1 and correlation 0 within 4 standard errors of 512 batches."""
    figures = true_random(MODEL, 256)
    assert figures.distinct_shards == pytest.approx(1000 * (1 - 0.999**256), abs=1)
    assert figures.mean_spread == pytest.approx(1, abs=4 / np.sqrt(2 * 512))
    assert abs(figures.autocorrelation) < 4 / np.sqrt(512)


def test_many_streams_and_windows_of_8_chunks_mix_like_true_random() -> None:
    """Tolerances: four standard errors of 512 batches; the correlation may show the shared windows, but no more than 0.3."""
    figures = measure(MODEL, Order(1_024_000, 32, 256, 8, seed=0), 256)
    assert figures.distinct_shards == pytest.approx(226, abs=2)
    assert figures.mean_spread == pytest.approx(1, abs=4 / np.sqrt(2 * 512))
    assert figures.autocorrelation < 0.3


def test_windows_of_one_chunk_are_seen_to_correlate() -> None:
    assert measure(MODEL, Order(1_024_000, 32, 256, 1, seed=0), 256).autocorrelation > 0.8


def test_one_stream_is_seen_to_mix_badly() -> None:
    figures = measure(MODEL, Order(1_024_000, 32, 1, 8, seed=0), 256)
    assert figures.distinct_shards <= 8
    assert figures.mean_spread > 3


def test_the_table_names_the_order() -> None:
    lines = table(MODEL, Order(1_024_000, 32, 256, 8, seed=0), 256).splitlines()
    assert lines[0] == "256 streams, windows of 8 chunks, chunks of 32 samples"
    assert len({len(line) for line in lines[1:]}) == 1


def test_one_shard_has_nothing_to_mix() -> None:
    one = Manifest(Schema(8, 1, 10), (Shard("a.tar", 10**6, "", 1000),), 1, np.zeros(1000, np.uint32), np.zeros(1000, np.uint32))
    assert measure(one, Order(1000, 1, 1, 1000, 0), 50).mean_spread == 0
