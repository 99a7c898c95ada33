"""KID against the double sum of its definition; unbiased where an FID is not; fixed by its seed."""

import numpy as np
import pytest

from cluster.metrics.kid import kid, squared_mmd
from configs.errors import DataError


def test_equals_the_double_sum():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(6, 4)), generator.normal(size=(9, 4)) + 0.3

    def k(a, b):
        return (a @ b / 4 + 1) ** 3

    xx = np.mean([k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j])
    yy = np.mean([k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j])
    xy = np.mean([k(a, b) for a in x for b in y])
    assert squared_mmd(x, y) == pytest.approx(xx + yy - 2 * xy, rel=1e-12)


def test_one_dimension_has_the_closed_form():
    """For the cubic kernel in one dimension MMD^2 = sum over j of C(3,j) (E x^j - E y^j)^2; two-point laws make it exact."""
    n = 1000
    x, y = np.tile([[1.0], [-1.0]], (n // 2, 1)), np.full((n, 1), 1.0)
    expected = 3 * (0 - 1) ** 2 + 3 * (1 - 1) ** 2 + 1 * (0 - 1) ** 2
    # Leaving out the diagonal shifts the finite sum by at most 2 (max k) / n = 16 / 1000.
    assert squared_mmd(x, y) == pytest.approx(expected, abs=16 / n)


def test_equal_laws_have_mean_zero_at_every_size():
    generator = np.random.default_rng(0)
    for size in (20, 200):
        estimates = [squared_mmd(*generator.normal(size=(2, size, 8))) for _ in range(300)]
        error = np.std(estimates) / np.sqrt(len(estimates))
        assert abs(np.mean(estimates)) < 4 * error  # four standard errors of the mean
        assert min(estimates) < 0


def test_the_seed_fixes_the_bits_and_a_shift_is_seen():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 1500, 8)).astype(np.float32)
    first = kid(x, y, subsets=10, subset_size=300)
    assert kid(x, y, subsets=10, subset_size=300) == first
    assert kid(x, y, subsets=10, subset_size=300, seed=1) != first
    shifted = kid(x + np.float32(0.5), y, subsets=10, subset_size=300)
    assert shifted.mean > 10 * abs(first.mean) + 3 * first.std


def test_sets_that_cannot_be_compared_are_refused():
    x = np.zeros((5, 3))
    with pytest.raises(DataError, match="one extractor"):
        kid(x, np.zeros((5, 4)))
    with pytest.raises(DataError, match="two rows or more"):
        kid(x, x[:1])
    with pytest.raises(DataError, match="NaN"):
        kid(x, x * np.nan)
