"""The kernel Inception distance (Binkowski et al. 2018): an unbiased distance between two sets of features.

KID is the squared maximum mean discrepancy under the cubic kernel k(x, y) = (x.y / d + 1)^3. Its estimator leaves out the
diagonal and so has mean zero for equal laws at every number of images, where an FID is biased upwards. It may be negative.
The mean over random subsets is reported. The standard deviation of the subsets, which others print, says nothing of it: a
subset of all images always is the same, and the mean of many subsets of a large set is far surer than one. So the spread is that
of the mean over sets of n images: what `jackknife` finds for the estimator of all images, and the choice of the subsets beside it.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from freeguide.cluster.evaluation.statistics import jackknife
from freeguide.configs.errors import DataError

Array = NDArray[np.float64]

SPREAD = 4000  # images whose pairs the spread looks at


@dataclass(frozen=True)
class Kid:
    mean: float
    std: float | None  # of the mean, over sets of N images of the same model; None where they are too few to tell


def kid(
    generated: NDArray[np.floating],
    real: NDArray[np.floating],
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    cycle: int = 1,
) -> Kid:
    """KID of generated features (N, d) against real ones (M, d); not multiplied by 1000.

    Each subset takes `subset_size` rows of both (fewer if a set is smaller) without replacement; `seed` fixes the choice. `cycle`
    is the number of images after which balanced labels begin again (1 where labels have no order).
    Raises DataError if the dimensions differ, a value is not finite, or a set has fewer than two rows.
    """
    if generated.ndim != 2 or real.ndim != 2 or generated.shape[1] != real.shape[1]:
        raise DataError(
            f"features (N, d) and (M, d) are needed, not {generated.shape} and {real.shape}; use one extractor for both"
        )
    size = min(subset_size, len(generated), len(real))
    if size < 2 or subsets < 1:
        raise DataError(f"KID needs a subset of two rows or more, not {subsets} subsets of {size}; use more images")
    if not (np.isfinite(generated).all() and np.isfinite(real).all()):
        raise DataError("the features hold NaN or infinity; measure those images again")
    generator = np.random.default_rng(seed)
    estimates = []
    for _ in range(subsets):
        x = generated[generator.permutation(len(generated))[:size]].astype(np.float64)
        y = real[generator.permutation(len(real))[:size]].astype(np.float64)
        estimates.append(squared_mmd(x, y))
    return Kid(float(np.mean(estimates)), _spread(generated, real, np.array(estimates), cycle))


def _spread(generated: NDArray[np.floating], real: NDArray[np.floating], estimates: Array, cycle: int) -> float | None:
    """Standard deviation of the mean of `estimates` over sets of N images.

    The variance of an incomplete U-statistic is that of the complete one and the subsets' own divided by their number (Blom 1976),
    up to a term of higher order. The complete one takes all pairs, so it is looked at on the first SPREAD images: its variance
    falls as 1 / N, or faster where the laws are nearly equal, and the deviation is then stated too large.
    """
    n = len(generated)
    edges = jackknife.edges(min(n, SPREAD), cycle)
    if edges is None:
        return None
    x, y = generated[: edges[-1]].astype(np.float64), real[:SPREAD].astype(np.float64)
    xx, xy = _kernel(x, x), _kernel(x, y)
    np.fill_diagonal(xx, 0.0)
    begins = edges[:-1]
    pairs = np.add.reduceat(np.add.reduceat(xx, begins, axis=0), begins, axis=1)  # summed over the images of two groups
    cross = np.add.reduceat(xy.sum(axis=1), begins)

    def distance(count: NDArray[np.integer] | int, within: Array, across: Array) -> Array:  # but for the real images' own term
        return within / (count * (count - 1)) - 2.0 * across / (count * len(y))

    whole = float(distance(len(x), pairs.sum(), cross.sum()))
    left = len(x) - np.diff(edges)
    without = distance(left, pairs.sum() - 2.0 * pairs.sum(0) + np.diag(pairs), cross.sum() - cross)
    complete = jackknife.deviation(whole, without, edges, n)
    return float(np.sqrt(complete**2 + estimates.var() / len(estimates)))


def squared_mmd(x: Array, y: Array) -> float:
    """Unbiased estimate of the squared MMD of x (m, d) and y (n, d) under the cubic kernel; m, n >= 2."""
    m, n = len(x), len(y)
    xx, yy, xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    within_x = (xx.sum() - np.trace(xx)) / (m * (m - 1))
    within_y = (yy.sum() - np.trace(yy)) / (n * (n - 1))
    return float(within_x + within_y - 2.0 * xy.mean())


def _kernel(x: Array, y: Array) -> Array:
    base = x @ y.T / x.shape[1] + 1.0
    return base * base * base
