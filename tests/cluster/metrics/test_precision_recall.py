"""Precision and recall against their definition written out, and at the cases that everybody knows the answer to."""

import numpy as np
import pytest

from freeguide.cluster.evaluation.statistics import precision_recall as module
from freeguide.cluster.evaluation.statistics.precision_recall import precision_recall
from freeguide.configs.errors import DataError


def _by_definition(generated: np.ndarray, real: np.ndarray, k: int) -> tuple[float, float]:
    def inside(points: np.ndarray, manifold: np.ndarray) -> float:
        radii = [sorted(np.linalg.norm(manifold - centre, axis=1))[k] for centre in manifold]
        return float(np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(manifold, radii, strict=True)) for p in points]))

    return inside(generated, real), inside(real, generated)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("chunk", [1, 1000, 1 << 24])
def test_equals_the_definition_for_any_chunk(k, chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    generator = np.random.default_rng(0)
    real, generated = generator.normal(size=(90, 3)), 0.7 * generator.normal(size=(70, 3)) + 1.0
    result = precision_recall(generated, real, k)
    assert (result.precision, result.recall) == _by_definition(generated, real, k)
    assert 0 < result.recall < result.precision < 1


def test_equal_sets_score_one_and_distant_sets_zero():
    x = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    same = precision_recall(x, x)
    assert (same.precision, same.recall) == (1.0, 1.0)
    apart = precision_recall(x + np.float32(50), x)
    assert (apart.precision, apart.recall) == (0.0, 0.0)


@pytest.mark.parametrize("image", range(5))
@pytest.mark.parametrize("d", [64, 513])  # at 513 a BLAS rounds x.x and x.y of equal rows differently
def test_a_collapsed_generator_is_precise_and_recalls_one_image(image, d):
    x = np.random.default_rng(image).normal(size=(200, d)).astype(np.float32) * 3 + np.float32(100)
    result = precision_recall(np.tile(x[image], (50, 1)), x)
    assert result.precision == 1.0
    assert result.recall == 1 / 200  # the balls have radius zero, exactly, though distances are formed from norms


def test_sets_that_cannot_be_compared_are_refused():
    x = np.random.default_rng(0).normal(size=(20, 4))
    with pytest.raises(DataError, match="more than 3 generated"):
        precision_recall(x[:3], x)
    with pytest.raises(DataError, match="of 4 and of 3 dimensions"):
        precision_recall(x, x[:, :3])
    with pytest.raises(DataError, match="real features hold NaN"):
        precision_recall(x, np.where(np.arange(20)[:, None] == 5, np.nan, x))
