"""KID against the double sum of its definition; unbiased where an FID is not; fixed by its seed."""

import numpy as np
import pytest

from freeguide.cluster.evaluation.statistics.kid import kid, squared_mmd
from freeguide.configs.errors import DataError


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


@pytest.mark.parametrize("shift", [0.0, 0.4])
def test_the_spread_is_that_of_other_sets_of_as_many_images(shift):
    """Against 120 sets of 200 images: their deviation is known to 1 / sqrt(240) = 6.5 %, so the mean spread is within 4 of that.

    Every subset of 1000 holds all 200, so the deviation of the subsets is that of the choice among the real images, far too small.
    Laws that are equal have no part of first order in 1 / n; then a jackknife is too large by up to sqrt(2) for a term of second.
    """
    generator = np.random.default_rng(0)
    real = generator.normal(size=(300, 6))
    found = [kid(generator.normal(size=(200, 6)) + shift, real, subsets=5) for _ in range(120)]
    true, stated = np.std([one.mean for one in found], ddof=1), np.mean([one.std for one in found])
    assert 1 - 4 * 0.065 < stated / true < (1 + 4 * 0.065) * (1 if shift else 2**0.5)


def test_the_spread_of_balanced_classes_leaves_out_whole_cycles():
    """Two classes far apart: in sets of 400 with 200 of each, most of what single images vary by does not vary."""
    generator = np.random.default_rng(0)
    real = generator.normal(size=(300, 4)) + 3.0 * (np.arange(300) % 2)[:, None]
    sets = [generator.normal(size=(400, 4)) + 3.0 * (np.arange(400) % 2)[:, None] for _ in range(60)]
    true = np.std([kid(x, real, subsets=3).mean for x in sets], ddof=1)  # known to 9 %
    assert np.mean([kid(x, real, subsets=3, cycle=2).std for x in sets]) == pytest.approx(true, rel=4 * 0.09)


def test_the_spread_of_a_set_beyond_what_is_looked_at_falls_with_its_size(monkeypatch):
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(4000, 4)) + 0.3, generator.normal(size=(500, 4))
    whole = kid(x, y, subsets=10, subset_size=200)
    monkeypatch.setattr("freeguide.cluster.evaluation.statistics.kid.SPREAD", 1000)
    assert kid(x, y, subsets=10, subset_size=200).std == pytest.approx(whole.std, rel=0.7)  # of 19 degrees of freedom both
    assert kid(x, y, subsets=10, subset_size=200).mean == whole.mean


def test_too_few_images_have_no_spread():
    x = np.random.default_rng(0).normal(size=(4, 3))
    assert kid(x, x + 1).std is None
