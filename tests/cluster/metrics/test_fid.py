"""FID against closed forms with commuting and non-commuting covariances, and against 40-digit arithmetic."""

import mpmath
import numpy as np
import pytest

from freeguide.cluster.evaluation.statistics.fid import fid, fid_infinity, fid_spread, frechet_distance
from freeguide.cluster.evaluation.statistics.moments import Moments, from_features
from freeguide.configs.errors import DataError


def _transport_pair(d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, float]:
    """C1, C2 = T C1 T with T symmetric and positive, and their distance Tr (T - I) C1 (T - I), all exact integers in float64.

    T is the optimal transport map between the two Gaussians, so the closed form holds though C1 and C2 do not commute.
    """
    generator = np.random.default_rng(seed)
    a = generator.integers(-2, 3, size=(d, d + 8)).astype(np.float64)
    u = generator.integers(-1, 2, size=(d, 4)).astype(np.float64)
    c1 = a @ a.T
    t = 3 * np.eye(d) + u @ u.T
    c2 = t @ c1 @ t
    assert np.abs(c2).max() < 2**53 / d, "an entry may have been rounded"
    shift = t - np.eye(d)
    return c1, c2, float(np.trace(shift @ c1 @ shift))


def test_diagonal_gaussians_have_the_closed_form():
    generator = np.random.default_rng(0)
    a, b = generator.uniform(0.01, 100, size=(2, 64))
    m1, m2 = generator.normal(size=(2, 64))
    expected = ((m1 - m2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(m1, np.diag(a), m2, np.diag(b)) == pytest.approx(expected, rel=1e-12)  # 64 roundings


def test_non_commuting_gaussians_have_the_closed_form_at_64_dimensions():
    c1, c2, expected = _transport_pair(64)
    assert np.abs(c1 @ c2 - c2 @ c1).max() > 1.0
    mean = np.zeros(64)
    # The bar is 1e-6; float64 eigenvalues of matrices this well conditioned do better by far.
    assert frechet_distance(mean, c1, mean, c2) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(mean, c2, mean, c1) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(mean + 3, c1, mean, c2) == pytest.approx(expected + 9 * 64, rel=1e-10)


@pytest.mark.slow
def test_non_commuting_gaussians_have_the_closed_form_at_2048_dimensions():
    c1, c2, expected = _transport_pair(2048)
    mean = np.zeros(2048)
    assert frechet_distance(mean, c1, mean, c2) == pytest.approx(expected, rel=1e-6)


def test_moments_of_samples_agree_with_40_digit_arithmetic():
    generator = np.random.default_rng(3)
    mixing = generator.normal(size=(8, 8)) * np.geomspace(1e-3, 10, 8)  # covariances of condition 1e8
    a = from_features(generator.normal(size=(300, 8)) @ mixing)
    b = from_features(generator.normal(size=(200, 8)) @ mixing.T + 0.5)
    with mpmath.workdps(40):
        c1, c2 = mpmath.matrix(a.covariance.tolist()), mpmath.matrix(b.covariance.tolist())
        values, vectors = mpmath.eigsy(c1)
        root = vectors * mpmath.diag([mpmath.sqrt(value) for value in values]) * vectors.T
        product = root * c2 * root
        cross = sum(mpmath.sqrt(value) for value in mpmath.eigsy((product + product.T) / 2, eigvals_only=True))
        shift = sum((mpmath.mpf(x) - mpmath.mpf(y)) ** 2 for x, y in zip(a.mean.tolist(), b.mean.tolist(), strict=True))
        exact = float(shift + sum(c1[i, i] + c2[i, i] for i in range(8)) - 2 * cross)
    # Squared roundings of the smallest eigenvalues appear through a square root: 1e-8 of them, far below 1e-9 of the whole.
    assert fid(a, b) == pytest.approx(exact, rel=1e-9)


def test_equal_sets_have_distance_zero_even_with_a_singular_covariance():
    x = np.random.default_rng(0).normal(size=(40, 64))
    m = from_features(x)
    with pytest.warns(UserWarning, match="40 (generated|reference) images for 64 features"):
        distance = fid(m, m)
    assert 0.0 <= distance < 1e-10  # of a trace of 64


def test_a_singular_covariance_has_the_closed_form():
    """Rank 3 against the identity in 64 dimensions: sum over the axes of (sqrt a - 1)^2."""
    a = np.zeros(64)
    a[:3] = 4.0
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(64, 64)))[0]
    cov = rotation @ np.diag(a) @ rotation.T
    zero = np.zeros(64)
    assert frechet_distance(zero, cov, zero, np.eye(64)) == pytest.approx(3 + 61, rel=1e-12)
    # As the second matrix its rounding noise of 1e-16 is seen through a square root, 61 times.
    assert frechet_distance(zero, np.eye(64), zero, cov) == pytest.approx(3 + 61, rel=1e-7)


def test_an_offset_of_100_in_float32_features_leaves_the_fid_right():
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(2, 4000, 32)).astype(np.float32)
    far_x, far_y = x + np.float32(100), y + np.float32(100)
    # Float32 itself stores the shifted features to 4e-6 only, so compare with the stored values, shifted back in float64.
    near = fid(from_features(far_x.astype(np.float64) - 100), from_features(far_y.astype(np.float64) - 100))
    assert fid(from_features(far_x), from_features(far_y)) == pytest.approx(near, rel=1e-9)


def test_fid_infinity_removes_the_bias_of_finite_samples():
    """Equal white laws in d dimensions: E FID_N = d/N + d(d+1)/4N to first order, and the intercept is zero."""
    d, n = 16, 12000
    reference = Moments(10**6, np.zeros(d), np.eye(d) * (10**6 - 1))
    x = np.random.default_rng(0).normal(size=(n, d)).astype(np.float32)
    result = fid_infinity(x, reference, smallest=600)
    theory = d + d * (d + 1) / 4
    assert result.ns[0] == 600
    assert result.ns[-1] == n
    assert result.fids[-1] == pytest.approx(fid(from_features(x), reference), rel=1e-9)  # the whole set in another order
    # One draw of 12 000: the FID itself scatters by about a tenth of its value.
    assert result.slope == pytest.approx(theory, rel=0.25)
    assert abs(result.value) < 0.3 * result.fids[-1]
    assert fid_infinity(x, reference, smallest=600) == result


@pytest.mark.parametrize(("points", "smallest"), [(1, 100), (5, 16), (5, 200)])
def test_fid_infinity_refuses_subsets_that_cannot_work(points, smallest):
    x = np.random.default_rng(0).normal(size=(200, 16))
    with pytest.raises(DataError, match="generate more images"):
        fid_infinity(x, from_features(x), points=points, smallest=smallest)


def test_statistics_that_cannot_be_used_are_refused():
    mean, cov = np.zeros(4), np.eye(4)
    with pytest.raises(DataError, match="NaN"):
        frechet_distance(mean, cov, mean * np.nan, cov)
    with pytest.raises(DataError, match="NaN"):
        frechet_distance(mean, np.where(cov == 1, np.inf, cov), mean, cov)
    with pytest.raises(DataError, match=r"\(d, d\)"):
        frechet_distance(mean, cov[:3], mean, cov)
    with pytest.raises(DataError, match="of 4 and of 5 dimensions"):
        frechet_distance(mean, cov, np.zeros(5), np.eye(5))
    with pytest.raises(DataError, match="eigenvalue -2"):
        frechet_distance(mean, np.diag([1.0, 1.0, -2.0, 1.0]), mean, cov)
    with pytest.raises(DataError, match="at least 2 samples"), pytest.warns(UserWarning, match="1 generated images"):
        fid(from_features(np.ones((1, 4))), from_features(np.random.default_rng(0).normal(size=(20, 4))))


def _unit_gaussian(d: int) -> Moments:
    """Moments whose mean is 0 and whose covariance is exactly the identity."""
    n = 101
    return Moments(n, np.zeros(d), np.eye(d) * (n - 1))


def test_the_spread_is_the_delta_methods_for_a_shifted_gaussian():
    # With equal covariances the first-order term of the FID is |m|^2 alone: a standard deviation of 2 |m| / sqrt(n).
    n, d, shift = 2000, 4, 3.0
    generator = np.random.default_rng(0)
    spreads, fids = [], []
    for _ in range(60):
        features = generator.normal(size=(n, d))
        features[:, 0] += shift
        spreads.append(fid_spread(features, _unit_gaussian(d)))
        fids.append(fid(from_features(features), _unit_gaussian(d)))
    expected = 2 * shift / np.sqrt(n)
    # A variance over 20 groups has 19 degrees of freedom, so its root is right on average to 1/76; 60 of them scatter by 2 %.
    assert np.sqrt(np.mean(np.square(spreads))) == pytest.approx(expected, rel=0.1)
    # What it predicts is what repetition shows; 60 values give their deviation to 9 %.
    assert np.std(fids) == pytest.approx(expected, rel=0.3)
    inside = np.mean([abs(value - shift**2 - d * (d + 5) / 4 / n) < 2.09 * s for value, s in zip(fids, spreads, strict=True)])
    assert inside >= 0.85  # of 60 intervals at 95 % by Student's t of 19 degrees; fewer happens once in 300


def test_the_spread_of_equal_laws_is_that_of_repetition_where_a_bootstraps_interval_misses():
    # At the true law the FID is of second order: all bias. The jackknife still finds its deviation, to a factor.
    n, d = 1000, 16
    generator = np.random.default_rng(1)
    sets = [generator.normal(size=(n, d)) for _ in range(40)]
    fids = np.array([fid(from_features(x), _unit_gaussian(d)) for x in sets])
    spreads = np.array([fid_spread(x, _unit_gaussian(d)) for x in sets])
    assert 0.5 < np.sqrt(np.mean(spreads**2)) / np.std(fids) < 2.0
    resampled = [fid(from_features(sets[0][generator.integers(0, n, n)]), _unit_gaussian(d)) for _ in range(100)]
    assert np.quantile(resampled, 0.025) > fids[0], "every percentile of the bootstrap carries a second bias"


def _balanced(n: int, centres: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Features of n images, image i of class i mod the number of classes: white around the centre of its class."""
    classes, d = centres.shape
    return centres[np.arange(n) % classes] + generator.normal(size=(n, d))


def _truth(centres: np.ndarray) -> Moments:
    """Moments of infinitely many images of all classes alike."""
    n, mean = 10**6, centres.mean(axis=0)
    covariance = np.cov(centres.T, bias=True) + np.eye(centres.shape[1])
    return Moments(n, n * mean, (n - 1) * covariance + n * np.outer(mean, mean))


def test_fid_infinity_of_balanced_labels_takes_whole_cycles_and_has_no_bias():
    """Ten separated classes, the true law: drawn image by image, subsets have a spread between classes that the whole has not."""
    generator = np.random.default_rng(0)
    centres = 5 * generator.normal(size=(10, 8))
    sets = [_balanced(1000, centres, generator) for _ in range(30)]
    results = [fid_infinity(x, _truth(centres), cycle=10) for x in sets]
    assert set(np.array([result.ns for result in results]).ravel() % 10) == {0}
    assert results[0].fids[-1] == pytest.approx(fid(from_features(sets[0]), _truth(centres)))  # all images in another order
    found = np.array([result.value for result in results])
    error = found.std(ddof=1) / np.sqrt(30)
    assert abs(found.mean()) < 3 * error
    image_by_image = np.mean([fid_infinity(x, _truth(centres)).value for x in sets])
    assert image_by_image < -10 * error  # -0.31 here, beside 0.0002 +- 0.0026


def test_fid_infinity_leaves_out_a_cycle_that_is_not_whole():
    features = np.random.default_rng(0).normal(size=(1090, 3))
    whole, cut = (fid_infinity(x, _unit_gaussian(3), smallest=300, cycle=100) for x in (features, features[:1000]))
    assert whole == cut
    assert (whole.ns[0], whole.ns[-1]) == (300, 1000)
    with pytest.raises(DataError, match="333 to 1000 in cycles of 600"):
        fid_infinity(features[:1000], _unit_gaussian(3), cycle=600)


@pytest.mark.parametrize(("shift", "factor"), [(0.5, 1.35), (0.0, 2.0)])
def test_the_spread_of_balanced_labels_is_that_of_repetition_where_a_twentieth_is_no_whole_cycle(shift, factor):
    """1000 separated classes: to groups that are not balanced, the differences between classes are spread."""
    generator = np.random.default_rng(2)
    centres = 5 * generator.normal(size=(1000, 4))
    sets = [_balanced(5120, centres, generator) + shift for _ in range(40)]
    found = np.sqrt(np.mean([fid_spread(x, _truth(centres), cycle=1000) ** 2 for x in sets]))
    true = np.std([fid(from_features(x), _truth(centres)) for x in sets], ddof=1)
    # 40 values give the true deviation to 11 %. At the true law the FID is of second order, and a jackknife is right to a factor.
    assert 1 / factor < found / true < factor  # 0.0305 for 0.0299, and 0.0015 for 0.0013
    assert fid_spread(sets[0], _truth(centres)) > 5 * true


def test_no_cycle_stays_out_of_the_groups_where_their_number_is_no_multiple_of_twenty():
    """Of 39 cycles, 20 equal groups would hold 20: at the true law, where the spread falls as 1 / n, twice too much."""
    generator = np.random.default_rng(2)
    centres = 3 * generator.normal(size=(50, 8))
    sets = [_balanced(39 * 50, centres, generator) for _ in range(40)]
    found = np.sqrt(np.mean([fid_spread(x, _truth(centres), cycle=50) ** 2 for x in sets]))
    true = np.std([fid(from_features(x), _truth(centres)) for x in sets], ddof=1)
    assert 1.0 < found / true < 1.9  # of second order a jackknife gives sqrt(2) of it: 1.5 here, and 2.3 of equal groups


def test_groups_of_whole_cycles_leave_out_the_rest_and_differ_little_in_size():
    features = np.random.default_rng(3).normal(size=(2010, 3)) + 1.0
    assert fid_spread(features, _unit_gaussian(3)) == pytest.approx(fid_spread(features[:2000], _unit_gaussian(3)), rel=0.2)
    # Five cycles of 350 and the images of a sixth that is not whole: the variance of 1750, brought to 2010.
    whole = fid_spread(features[:1750], _unit_gaussian(3), cycle=350)
    assert fid_spread(features, _unit_gaussian(3), cycle=350) == pytest.approx(whole * np.sqrt(1750 / 2010), rel=1e-12)


def test_a_spread_of_fewer_than_five_groups_or_of_too_few_images_is_none():
    features = np.random.default_rng(3).normal(size=(100, 16))
    reference = _unit_gaussian(16)
    assert fid_spread(features, reference, cycle=20) is not None
    assert fid_spread(features, reference, cycle=21) is None
    assert fid_spread(features, reference, cycle=101) is None
    assert fid_spread(features[:4, :2], _unit_gaussian(2)) is None
    assert fid_spread(features[:18], reference) is not None  # 17 beside each group of one
    assert fid_spread(features[:17], reference) is None
    assert fid_spread(features[:22], reference, cycle=4) is None  # 16 beside each cycle
