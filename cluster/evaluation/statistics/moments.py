"""First and second moments of features: all that a Frechet distance needs, and the piece in which it travels.

For features f_1 .. f_n in R^d the state is (n, sum f, sum f f^T), in float64. States add, so a set of images may be measured in
units on any machines: mean = sum f / n, covariance = (sum f f^T - n mean mean^T) / (n - 1).

Addition of floats is not associative, so the unit (one range of image indices) is the atom: one machine computes it alone, and
`merged` adds the units in the order of their indices. The bits of the result then depend on the units, never on who computed
them. Float64 is needed: with float32 sums a feature offset of 100 spoils the covariance in the first digits, with float64 sums
it costs 1e-12.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from freeguide.configs.errors import DataError
from freeguide.data_pipeline.artifact import read_npz, to_npz

BLOCK = 4096  # rows upcast to float64 at a time; part of the definition of a unit's bits, so never tune it per machine


@dataclass(frozen=True, eq=False)
class Moments:
    n: int
    total: NDArray[np.float64]  # (d,) sum of the features
    outer: NDArray[np.float64]  # (d, d) sum of their outer products

    @property
    def d(self) -> int:
        return int(self.total.shape[0])

    @property
    def mean(self) -> NDArray[np.float64]:
        """(d,) float64. Raises DataError without samples."""
        self._require(1, "a mean")
        return self.total / self.n

    @property
    def covariance(self) -> NDArray[np.float64]:
        """(d, d) float64, unbiased (n - 1). Raises DataError for fewer than two samples."""
        self._require(2, "a covariance")
        return (self.outer - np.outer(self.total, self.total) / self.n) / (self.n - 1)

    @property
    def sha256(self) -> str:
        """Fingerprint of the state: of n, d and the little-endian bytes of both sums."""
        digest = hashlib.sha256(f"moments n={self.n} d={self.d}\n".encode())
        digest.update(np.ascontiguousarray(self.total, "<f8").tobytes())
        digest.update(np.ascontiguousarray(self.outer, "<f8").tobytes())
        return digest.hexdigest()

    def to_bytes(self) -> bytes:
        """A sealed `.npz` without pickle; equal states give equal bytes."""
        return to_npz({"n": np.int64(self.n), "total": self.total.astype("<f8"), "outer": self.outer.astype("<f8")})

    def _require(self, samples: int, what: str) -> None:
        if self.n < samples:
            raise DataError(f"{what} needs at least {samples} samples and these moments hold {self.n}; measure more images")


def from_features(features: NDArray[np.floating]) -> Moments:
    """Moments of features (n, d). Each row is upcast to float64 before anything is added.

    Raises DataError if the array is not two-dimensional floating point or holds NaN or infinity.
    """
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
        raise DataError(
            f"features must be floats of shape (n, d) but are {features.dtype} {features.shape}; flatten each image's features"
        )
    n, d = features.shape
    total, outer = np.zeros(d), np.zeros((d, d))
    for start in range(0, n, BLOCK):
        block = features[start : start + BLOCK].astype(np.float64)
        finite = np.isfinite(block).all(axis=1)
        if not finite.all():
            row = start + int(np.argmin(finite))
            raise DataError(f"the features of image {row} are not finite; look at that image, or measure an earlier checkpoint")
        total += block.sum(axis=0)
        outer += block.T @ block
    return Moments(n, total, outer)


def merged(units: Iterable[Moments]) -> Moments:
    """The sum of the units, added one by one in the order given: pass them in the order of their indices, unmerged.

    Raises DataError if there is none, or if two differ in d.
    """
    iterator = iter(units)
    first = next(iterator, None)
    if first is None:
        raise DataError("there are no moments to merge; measure at least one unit of images")
    n, total, outer = first.n, first.total.copy(), first.outer.copy()
    for unit in iterator:
        if unit.d != first.d:
            raise DataError(f"moments of {first.d} and of {unit.d} features cannot be merged; measure all units with one extractor")
        n += unit.n
        total += unit.total
        outer += unit.outer
    return Moments(n, total, outer)


def from_bytes(data: bytes, where: str = "moments") -> Moments:
    """Read what `to_bytes` wrote. `where` names the file in errors. Raises DataError if it is not one, or not finite."""
    arrays = read_npz(data, where, "delete it and measure again", what="a moments archive")
    try:
        n, total, outer = arrays["n"], arrays["total"], arrays["outer"]
    except KeyError as error:
        raise DataError(f"{where} is not a moments archive ({error} is missing); delete it and measure again") from None
    d = total.shape[0] if total.ndim == 1 else -1
    if (
        n.shape != ()
        or n.dtype != np.int64
        or n < 0
        or total.dtype != np.float64
        or outer.dtype != np.float64
        or outer.shape != (d, d)
    ):
        raise DataError(
            f"{where} does not hold n, total (d,) and outer (d, d) but {n.dtype} {n.shape}, {total.dtype} {total.shape} and "
            f"{outer.dtype} {outer.shape}; delete it and measure again"
        )
    if not (np.isfinite(total).all() and np.isfinite(outer).all()):
        raise DataError(f"{where} holds NaN or infinity; delete it and measure again")
    return Moments(int(n), total, outer)
