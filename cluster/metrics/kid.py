"""The kernel Inception distance (Binkowski et al. 2018): an unbiased distance between two sets of features.

KID is the squared maximum mean discrepancy under the cubic kernel k(x, y) = (x.y / d + 1)^3. Its estimator leaves out the
diagonal and so has mean zero for equal laws at every number of images, where an FID is biased upwards. It may be negative.
The mean over random subsets is reported, with the standard deviation of the subsets.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from configs.errors import DataError

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Kid:
    mean: float
    std: float  # of one subset's estimate; the mean of s subsets of large sets is about sqrt(s) times surer


def kid(
    generated: NDArray[np.floating], real: NDArray[np.floating], subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> Kid:
    """KID of generated features (N, d) against real ones (M, d); not multiplied by 1000.

    Each subset takes `subset_size` rows of both (fewer if a set is smaller) without replacement; `seed` fixes the choice.
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
    return Kid(float(np.mean(estimates)), float(np.std(estimates)))


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
