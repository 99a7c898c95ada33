"""Precision and recall against their definition written out, and at the cases that everybody knows the answer to."""

import numpy as np
import pytest

from freeguide.cluster.evaluation.statistics import precision_recall as module
from freeguide.cluster.evaluation.statistics.precision_recall import precision, recall
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
    found = precision(generated, real, k), recall(generated, real, k)
    assert found == _by_definition(generated, real, k)
    assert 0 < found[1] < found[0] < 1


def test_equal_sets_score_one_and_distant_sets_zero():
    x = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    assert (precision(x, x), recall(x, x)) == (1.0, 1.0)
    far = x + np.float32(50)
    assert (precision(far, x), recall(far, x)) == (0.0, 0.0)


@pytest.mark.parametrize("image", range(5))
@pytest.mark.parametrize("d", [64, 513])  # at 513 a BLAS rounds x.x and x.y of equal rows differently
def test_a_collapsed_generator_is_precise_and_recalls_one_image(image, d):
    x = np.random.default_rng(image).normal(size=(200, d)).astype(np.float32) * 3 + np.float32(100)
    collapsed = np.tile(x[image], (50, 1))
    assert precision(collapsed, x) == 1.0
    assert recall(collapsed, x) == 1 / 200  # the balls have radius zero, exactly, though distances are formed from norms


@pytest.mark.parametrize("share", [precision, recall])
def test_sets_that_cannot_be_compared_are_refused(share):
    x = np.random.default_rng(0).normal(size=(20, 4))
    with pytest.raises(DataError, match="more than 3 generated"):
        share(x[:3], x)
    with pytest.raises(DataError, match="of 4 and of 3 dimensions"):
        share(x, x[:, :3])
    with pytest.raises(DataError, match="real features hold NaN"):
        share(x, np.where(np.arange(20)[:, None] == 5, np.nan, x))
