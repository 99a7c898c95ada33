"""Moments: equal to the textbook formulas, and the same bits however the units were spread over workers."""

import io

import numpy as np
import pytest

from freeguide.cluster.evaluation.statistics import moments
from freeguide.cluster.evaluation.statistics.moments import Moments, from_bytes, from_features, merged
from freeguide.configs.errors import DataError


def _features(n: int, d: int, offset: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=(n, d)) + offset).astype(np.float32)


def test_mean_and_covariance_are_the_unbiased_ones():
    x = _features(500, 7)
    m = from_features(x)
    # Both sides are float64 sums of 500 terms of size one: they agree to a few hundred roundings.
    np.testing.assert_allclose(m.mean, x.astype(np.float64).mean(axis=0), rtol=0, atol=1e-14)
    np.testing.assert_allclose(m.covariance, np.cov(x.astype(np.float64), rowvar=False, ddof=1), rtol=0, atol=1e-13)
    assert np.array_equal(m.outer, m.outer.T)


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_the_merged_bits_do_not_depend_on_who_measured_which_unit(workers):
    units = np.array_split(_features(1000, 16), 13)
    expected = merged(from_features(unit) for unit in units)
    results: dict[int, bytes] = {}
    for worker in reversed(range(workers)):  # units come back out of order, as bytes
        for index in range(worker, len(units), workers):
            results[index] = from_features(units[index]).to_bytes()
    m = merged(from_bytes(results[index]) for index in sorted(results))
    assert m.n == 1000
    assert m.sha256 == expected.sha256
    assert m.to_bytes() == expected.to_bytes()


def test_merged_units_equal_one_pass_to_rounding_and_leave_the_units_alone():
    x = _features(1000, 16)
    units = [from_features(part) for part in np.array_split(x, 9)]
    before = [unit.sha256 for unit in units]
    m, whole = merged(units), from_features(x)
    np.testing.assert_allclose(m.outer, whole.outer, rtol=1e-12, atol=1e-10)  # sums of 1000 terms in another order
    np.testing.assert_allclose(m.total, whole.total, rtol=1e-12, atol=1e-10)
    assert [unit.sha256 for unit in units] == before


def test_blocks_do_not_lose_rows(monkeypatch):
    x = np.random.default_rng(1).integers(-50, 50, size=(1000, 5)).astype(np.float32)  # integer sums are exact in float64
    monkeypatch.setattr(moments, "BLOCK", 64)
    m = from_features(x)
    assert np.array_equal(m.total, x.astype(np.int64).sum(axis=0))
    assert np.array_equal(m.outer, x.astype(np.int64).T @ x.astype(np.int64))


def test_an_offset_of_100_in_float32_features_leaves_the_covariance_right():
    x = _features(5000, 16, offset=100.0)
    exact = np.cov(x.astype(np.float64) - 100.0, rowvar=False)
    # Cancellation of 1e4 against 1 costs four of sixteen digits, and the sum of 5000 terms up to two more.
    np.testing.assert_allclose(from_features(x).covariance, exact, rtol=0, atol=1e-10)
    float32 = (x.T @ x - np.outer(x.sum(axis=0), x.sum(axis=0)) / len(x)) / (len(x) - 1)
    assert np.abs(float32 - exact).max() > 1e-3, "the test has no power: float32 sums would pass too"


def test_the_archive_round_trips_bit_for_bit_and_equal_states_give_equal_bytes():
    m = from_features(_features(100, 8))
    again = from_bytes(m.to_bytes())
    assert again.n == m.n
    assert np.array_equal(again.total, m.total)
    assert np.array_equal(again.outer, m.outer)
    assert again.to_bytes() == m.to_bytes()
    assert again.sha256 == m.sha256


def test_the_fingerprint_sees_every_part_of_the_state():
    m = from_features(_features(100, 8))
    other_total, other_outer = m.total.copy(), m.outer.copy()
    other_total[3] = np.nextafter(other_total[3], 1e9)
    other_outer[2, 5] = np.nextafter(other_outer[2, 5], 1e9)
    states = [m, Moments(101, m.total, m.outer), Moments(100, other_total, m.outer), Moments(100, m.total, other_outer)]
    assert len({state.sha256 for state in states}) == 4


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_features_that_are_not_finite_are_refused_with_their_image(value):
    x = _features(moments.BLOCK + 10, 3)
    x[moments.BLOCK + 2, 1] = value
    with pytest.raises(DataError, match=f"image {moments.BLOCK + 2} are not finite"):
        from_features(x)


@pytest.mark.parametrize("x", [np.zeros((4, 2), np.uint8), np.zeros(4, np.float32), np.zeros((4, 2, 2), np.float32)])
def test_features_of_the_wrong_kind_are_refused(x):
    with pytest.raises(DataError, match=r"shape \(n, d\)"):
        from_features(x)


def test_merging_nothing_or_different_dimensions_is_refused():
    with pytest.raises(DataError, match="no moments"):
        merged([])
    with pytest.raises(DataError, match="of 3 and of 4 features"):
        merged([from_features(_features(5, 3)), from_features(_features(5, 4))])


def test_a_covariance_of_one_sample_is_refused():
    with pytest.raises(DataError, match="at least 2 samples and these moments hold 1"):
        _ = from_features(_features(1, 3)).covariance
    with pytest.raises(DataError, match="at least 1 samples and these moments hold 0"):
        _ = from_features(_features(0, 3)).mean


def test_damaged_archives_are_refused_by_name():
    good = from_features(_features(10, 3))
    with pytest.raises(DataError, match=r"unit 7 is not a moments archive"):
        from_bytes(b"not an archive", "unit 7")
    with pytest.raises(DataError, match="not a moments archive"):
        from_bytes(good.to_bytes()[:-30])
    with pytest.raises(DataError, match="does not hold"):
        from_bytes(Moments(10, good.total, good.outer[:2]).to_bytes())
    with pytest.raises(DataError, match="NaN"):
        from_bytes(Moments(10, good.total * np.nan, good.outer).to_bytes())


def test_a_pickle_inside_an_archive_is_not_opened():
    buffer = io.BytesIO()
    np.savez(buffer, n=np.int64(1), total=np.array([object()]), outer=np.zeros((1, 1)))
    with pytest.raises(DataError, match="not a moments archive"):
        from_bytes(buffer.getvalue())
