"""The Frechet distance between two sets of features taken as Gaussians (Heusel et al. 2017), and its limit of infinite samples.

    d^2 = |mu_1 - mu_2|^2 + Tr C_1 + Tr C_2 - 2 Tr (C_1 C_2)^(1/2)

The last trace is the sum of the square roots of the eigenvalues of C_1 C_2, which are those of the symmetric matrix R C_2 R^T with
R^T R = C_1. Two symmetric eigenproblems in float64 give it: half the time of a general matrix square root, real by construction,
and without that function's failures on nearly singular covariances.

An FID of N images is biased upwards by about k / N, with k a property of the model; FIDs of different N are never comparable.
`fid_infinity` fits that line and reports its intercept (Chong & Forsyth 2020).

How far another set of N images of the same model would lie is `fid_spread`, see `jackknife`.

Where the label of image i is i mod classes, every set of n images has the same labels. Both then take whole cycles of them: in
subsets and groups that are not balanced, the differences between classes would pass for bias and for spread.
"""

import warnings
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from freeguide.cluster.evaluation.statistics import jackknife
from freeguide.cluster.evaluation.statistics.moments import Moments, from_features
from freeguide.configs.errors import DataError

Array = NDArray[np.float64]


class Gaussian(Protocol):
    """What a Frechet distance needs of a set; `Moments` and the reference statistics are Gaussians."""

    @property
    def n(self) -> int:
        """Images behind it; 0 = not stated."""

    @property
    def mean(self) -> Array:
        """(d,)."""

    @property
    def covariance(self) -> Array:
        """(d, d)."""


def frechet_distance(mean1: Array, cov1: Array, mean2: Array, cov2: Array) -> float:
    """Frechet distance (the squared one, as "FID" means it) of N(mean1, cov1) and N(mean2, cov2); means (d,), covariances (d, d).

    Raises DataError for shapes that do not fit, NaN or infinity, and a matrix that is not a covariance.
    """
    _check(mean1, cov1)
    _check(mean2, cov2)
    if mean1.shape != mean2.shape:
        raise DataError(
            f"features of {mean1.shape[0]} and of {mean2.shape[0]} dimensions have no distance; use one extractor for both"
        )
    return _distance(mean1, cov1, _root(cov1), mean2, cov2)


def fid(generated: Gaussian, reference: Gaussian) -> float:
    """FID of two sets of features. Warns where a set is no larger than the dimension, because the bias then hides the model.

    Raises DataError as `frechet_distance` does, and for fewer than two samples.
    """
    for name, moments in (("generated", generated), ("reference", reference)):
        if 0 < moments.n <= len(moments.mean):
            warnings.warn(
                f"{moments.n} {name} images for {len(moments.mean)} features: the covariance is singular and the FID mostly bias; "
                f"use more images, and {3 * (len(moments.mean) + 1)} for fid_infinity beside it",
                stacklevel=2,
            )
    return frechet_distance(reference.mean, reference.covariance, generated.mean, generated.covariance)


@dataclass(frozen=True)
class FidInfinity:
    value: float  # the intercept: the FID of infinitely many images
    slope: float  # k of FID_N = value + k / N
    ns: tuple[int, ...]  # sizes of the subsets
    fids: tuple[float, ...]  # FID of each subset


def fid_infinity(
    features: NDArray[np.floating], reference: Gaussian, points: int = 15, smallest: int = 0, seed: int = 0, cycle: int = 1
) -> FidInfinity:
    """Extrapolate the FID of features (n, d) to n = infinity by least squares on 1 / N.

    `points` subsets, their sizes spaced evenly from `smallest` (0 = a third of n) to n, are drawn without replacement by `seed`: as
    whole cycles of `cycle` images, the classes in their order, or image by image where labels have no order (1).
    Only the bias of the generated set is removed; that of the reference stays. Raises DataError if a subset would not exceed d.
    """
    n, d = features.shape
    smallest = smallest or n // 3
    least, most = -(-smallest // cycle), n // cycle
    if points < 2 or smallest <= d or least >= most:
        raise DataError(
            f"FID-infinity of {d} features needs two subsets or more of more than {d} images, not {points} of {smallest} to {n} in "
            f"cycles of {cycle}; generate more images"
        )
    mean, cov = reference.mean, reference.covariance
    _check(mean, cov)
    if mean.shape != (d,):
        raise DataError(f"features of {d} and of {mean.shape[0]} dimensions have no distance; use one extractor for both")
    root = _root(cov)
    cycles = np.linspace(least, most, points).round().astype(int)
    generator = np.random.default_rng(seed)
    fids = []
    for count in cycles:
        chosen = generator.permutation(most)[:count, None] * cycle + np.arange(cycle)
        subset = from_features(features[chosen.ravel()])
        fids.append(_distance(mean, cov, root, subset.mean, subset.covariance))
    ns = cycles * cycle
    slope, value = np.polyfit(1.0 / ns, fids, 1)
    return FidInfinity(float(value), float(slope), tuple(map(int, ns)), tuple(fids))


def fid_spread(features: NDArray[np.floating], reference: Gaussian, cycle: int = 1) -> float | None:
    """Standard deviation of the FID of features (n, d) over sets of n images of the same model, by `jackknife`.

    None for fewer than 5 groups, and where what stays without one would not exceed d images.
    """
    n, d = features.shape
    edges = jackknife.edges(n, cycle)
    if edges is None or jackknife.fewest_left(edges) <= d:
        return None
    mean, cov = reference.mean, reference.covariance
    _check(mean, cov)
    root = _root(cov)
    parts = [from_features(features[first:last]) for first, last in pairwise(edges)]
    total, outer = sum(part.total for part in parts), sum(part.outer for part in parts)
    grouped = edges[-1]

    def distance(left: Moments) -> float:
        return _distance(mean, cov, root, left.mean, left.covariance)

    whole = distance(Moments(grouped, np.asarray(total), np.asarray(outer)))
    without = np.array([distance(Moments(grouped - part.n, total - part.total, outer - part.outer)) for part in parts])
    return jackknife.deviation(whole, without, edges, n)


def _check(mean: Array, cov: Array) -> None:
    if mean.ndim != 1 or cov.shape != (mean.shape[0], mean.shape[0]):
        raise DataError(
            f"a mean (d,) and a covariance (d, d) are needed, not {mean.shape} and {cov.shape}; check the statistics file"
        )
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise DataError("a mean or covariance holds NaN or infinity; measure its images again")


def _root(cov: Array) -> Array:
    """R (r, d) with R^T R = cov, r its numerical rank. Directions of rounding noise are left out: a root would magnify them."""
    values, vectors = np.linalg.eigh(cov.astype(np.float64))
    largest = max(float(values[-1]), 0.0)
    # Float32 statistics of others reach -1e-7 of the largest eigenvalue by rounding; anything beyond is not a covariance.
    if values[0] < -1e-6 * largest or (largest == 0.0 and values[0] < 0.0):
        raise DataError(f"a covariance has the eigenvalue {values[0]:.3g} and so is none; measure its images again")
    kept = values > largest * len(values) * np.finfo(np.float64).eps
    return np.sqrt(values[kept])[:, None] * vectors[:, kept].T


def _distance(mean1: Array, cov1: Array, root1: Array, mean2: Array, cov2: Array) -> float:
    product = root1 @ cov2.astype(np.float64) @ root1.T
    values = np.linalg.eigvalsh((product + product.T) / 2)
    difference = mean1.astype(np.float64) - mean2.astype(np.float64)
    distance = difference @ difference + np.trace(cov1) + np.trace(cov2) - 2.0 * np.sqrt(np.maximum(values, 0.0)).sum()
    return max(float(distance), 0.0)  # rounding alone can take the distance of equal Gaussians below zero
