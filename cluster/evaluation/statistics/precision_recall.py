"""Improved precision and recall (Kynkaanniemi et al. 2019): fidelity and coverage as two numbers instead of one.

Each set of features is thickened into a manifold: the union of balls round its points, with the distance to the k-th nearest
other point of the same set as radius. Precision is the share of generated points inside the real manifold, recall the share of
real points inside the generated one. Guidance with a large w gains the first and loses the second.

The cost is quadratic, so distances are formed in chunks of rows, as |a|^2 + |b|^2 - 2 a.b in float64 about the real mean.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from freeguide.configs.errors import DataError

Array = NDArray[np.float64]

CHUNK = 1 << 24  # distances held at a time: 128 MiB
DUPLICATE = 1e-12  # |a - b|^2 below this share of |a|^2 + |b|^2 is rounding of the expanded square: the points are equal


def precision(generated: NDArray[np.floating], real: NDArray[np.floating], k: int = 3) -> float:
    """Precision of generated features (N, d) against real ones (M, d), with balls to the k-th neighbour.

    Raises DataError if the dimensions differ, a value is not finite, or a set has k points or fewer.
    """
    generated_, real_ = _centred(generated, real, k)
    return _inside(generated_, real_, k)


def recall(generated: NDArray[np.floating], real: NDArray[np.floating], k: int = 3) -> float:
    """Recall, as `precision`."""
    generated_, real_ = _centred(generated, real, k)
    return _inside(real_, generated_, k)


def _centred(generated: NDArray[np.floating], real: NDArray[np.floating], k: int) -> tuple[Array, Array]:
    """Both sets of features, checked, about the real mean."""
    for name, features in (("generated", generated), ("real", real)):
        if features.ndim != 2 or len(features) <= k:
            raise DataError(
                f"precision and recall with k = {k} need more than {k} {name} feature rows, not {features.shape}; use more images"
            )
        if not np.isfinite(features).all():
            raise DataError(f"the {name} features hold NaN or infinity; measure those images again")
    if generated.shape[1] != real.shape[1]:
        raise DataError(
            f"features of {generated.shape[1]} and of {real.shape[1]} dimensions do not compare; use one extractor for both"
        )
    centre = real.mean(axis=0, dtype=np.float64)
    return generated.astype(np.float64) - centre, real.astype(np.float64) - centre


def _inside(points: Array, manifold: Array, k: int) -> float:
    """Share of `points` within the k-th-neighbour ball of at least one point of `manifold`."""
    # Column k of the sorted distances is the k-th other point: column 0 is the point itself.
    radii = np.concatenate([np.partition(block, k, axis=1)[:, k] for block in _squared_distances(manifold, manifold)])
    return sum(int((block <= radii).any(axis=1).sum()) for block in _squared_distances(points, manifold)) / len(points)


def _squared_distances(a: Array, b: Array) -> Iterator[Array]:
    """Squared distances of all rows of b (M, d) from rows of a, in blocks (rows, M)."""
    rows = max(1, CHUNK // len(b))
    b_norms = np.einsum("nd,nd->n", b, b)
    for start in range(0, len(a), rows):
        block = a[start : start + rows]
        norms = np.einsum("nd,nd->n", block, block)[:, None] + b_norms
        squared = norms - 2.0 * (block @ b.T)
        squared[squared <= DUPLICATE * norms] = 0.0
        yield squared
