"""The real images that samples are measured against: their statistics, and the features of some of them.

They come from a manifest (measured here), from an `.npz` of statistics (ADM's `mu, sigma, mu_s, sigma_s`, EDM's `mu, sigma`, or
one written here) or from an `.npz` of images (`arr_0`). A file that holds both, as ADM's references do, gives its statistics to
FID and its images to precision, recall and KID. Pickles are refused: reading one runs whatever its author wrote.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from freeguide.cluster.evaluation.extractors.features import UNIT, Extractor, Measured, concatenated
from freeguide.cluster.evaluation.statistics import moments
from freeguide.configs.errors import DataError
from freeguide.data_pipeline.artifact import names_of, read_npz, to_npz
from freeguide.data_pipeline.manifest import Manifest
from freeguide.data_pipeline.scan import scan
from freeguide.data_pipeline.store.base import Access, Store
from freeguide.data_pipeline.store.open import read_object

Array = NDArray[np.float64]

_AGAIN = "measure the reference again"
_NAME = 4096  # bytes of a name in a file
_LARGEST = 1e15  # of a feature, a mean or a covariance: beyond it, a distance is rounding
KEPT = 10_000  # images whose features are kept for precision, recall and KID, as in ADM's reference files


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean (d,) and covariance (d, d) of n images' features; n = 0 where their file does not say."""

    mean: Array
    covariance: Array
    n: int


@dataclass(frozen=True, eq=False)
class Reference:
    dataset: str  # name of the data set, as published tables call it ("imagenet64"); "" = not named
    pool: Statistics  # of the extractor's features
    spatial: Statistics | None = None  # of its spatial features, for sFID
    features: NDArray[np.float32] | None = None  # (M, d) of up to KEPT images
    file: str = ""  # sha256 of the file that others made, from which all of it comes
    class_names: tuple[str, ...] = ()  # in the order of the labels; () = not known

    @property
    def sha256(self) -> str:
        """What rows call the reference: its file's hash, or a fingerprint of everything that metrics read, little-endian.

        A file of images keeps its name wherever it is measured, although two devices round its features differently.
        """
        if self.file:
            return self.file
        digest = hashlib.sha256()
        for statistics in (self.pool, self.spatial):
            if statistics is not None:
                digest.update(f"n={statistics.n} d={len(statistics.mean)}\n".encode())
                digest.update(np.ascontiguousarray(statistics.mean, "<f8").tobytes())
                digest.update(np.ascontiguousarray(statistics.covariance, "<f8").tobytes())
        if self.features is not None:
            digest.update(f"features {self.features.shape}\n".encode() + np.ascontiguousarray(self.features, "<f4").tobytes())
        return digest.hexdigest()

    def to_bytes(self, extractor: Extractor) -> bytes:
        """An `.npz` that other tools read too (mu, sigma, mu_s, sigma_s) and that names the extractor; no pickle."""
        arrays: dict[str, Any] = {"mu": self.pool.mean, "sigma": self.pool.covariance, "n": np.int64(self.pool.n)}
        if self.spatial is not None:
            arrays |= {"mu_s": self.spatial.mean, "sigma_s": self.spatial.covariance}
        if self.features is not None:
            arrays["features"] = self.features
        facts = {"extractor": extractor.hash, "dataset": self.dataset, "origin": self.file}
        arrays |= {name: np.str_(fact) for name, fact in facts.items()}
        if self.class_names:
            arrays["class_names"] = np.str_(json.dumps(self.class_names))  # as JSON it may hold any character
        return to_npz(arrays)


def from_manifest(store: Store, manifest: Manifest, extractor: Extractor, dataset: str = "", device: str = "cpu") -> Reference:
    """Measure every image of a manifest, in its order. Raises DataError for unreadable images."""
    found = _measured(_blocks(image for image, _ in scan(store, manifest)), manifest.samples, extractor, dataset, device)
    return replace(found, class_names=manifest.schema.class_names)


def from_npz(data: bytes, where: str, extractor: Extractor, dataset: str = "", device: str = "cpu") -> Reference:
    """Read the statistics or images of an `.npz`. `where` names it in errors. Raises DataError for whatever does not fit."""
    # ADM's files hold thousands of images that are not wanted where features are already there.
    wanted = _NAMES - ({"arr_0"} if "features" in names_of(data) else set())
    arrays = read_npz(data, where, "save mu and sigma, or images as arr_0, with np.savez", wanted=wanted.__contains__)
    for name in ("extractor", "dataset", "origin"):
        if name in arrays and (arrays[name].shape != () or arrays[name].dtype.kind != "U" or arrays[name].nbytes > _NAME):
            raise DataError(f"{where} holds {name} as {arrays[name].dtype} {arrays[name].shape}, not as a name; {_AGAIN}")
    if "extractor" in arrays and str(arrays["extractor"]) != extractor.hash:
        raise DataError(
            f"{where} was measured with the weights {str(arrays['extractor'])[:12]} and not with those of {extractor.name} "
            f"({extractor.hash[:12]}); measure the reference again"
        )
    dataset = dataset or str(arrays.get("dataset", ""))
    file = str(arrays.get("origin", "")) if "extractor" in arrays else hashlib.sha256(data).hexdigest()
    images = arrays.get("arr_0")
    if "mu" not in arrays:
        if images is None:
            raise DataError(f"{where} holds neither mu and sigma nor images as arr_0; give a file of one or the other")
        _check_images(images, where)
        return replace(_measured(_blocks(iter(images)), len(images), extractor, dataset, device), file=file)
    n = _count(arrays["n"], where) if "n" in arrays else 0
    pool = _statistics(arrays, "mu", "sigma", n, where)
    if len(pool.mean) != extractor.width:
        raise DataError(
            f"{where} holds statistics of {len(pool.mean)} features and {extractor.name} gives {extractor.width}; "
            "use the extractor that made the statistics"
        )
    spatial = _statistics(arrays, "mu_s", "sigma_s", n, where) if "mu_s" in arrays else None
    features = arrays.get("features")
    if images is not None:
        _check_images(images, where)
        features = extractor.measure(images[_spread(len(images))], device).features
    if features is not None and not (
        features.ndim == 2
        and features.shape[1] == len(pool.mean)
        and np.issubdtype(features.dtype, np.floating)
        and (np.abs(features) < _LARGEST).all()  # and so no NaN
    ):
        raise DataError(
            f"{where} holds features {features.shape} beside statistics of {len(pool.mean)}, or NaN among them, or values that are "
            f"no floats or absurd; {_AGAIN}"
        )
    if features is not None:
        features = features.astype(np.float32, copy=False)
    return Reference(dataset, pool, spatial, features, file, _class_names(arrays))


def has_images(data: bytes) -> bool:
    """Whether an `.npz` holds images that have to be measured before it is a reference; not whether it can be used."""
    names = names_of(data)
    return "arr_0" in names and "features" not in names


def read_file(uri: str, access: Access | None = None) -> bytes:
    """The file at a path or URI, for `from_npz`."""
    if uri.endswith((".pkl", ".pickle")):
        raise DataError(f"{uri} is a pickle, which could run code and is never read; save its mu and sigma with np.savez")
    return read_object(uri, "correct the path of the reference", access)


def load_npz(uri: str, extractor: Extractor, dataset: str = "", device: str = "cpu", access: Access | None = None) -> Reference:
    """`from_npz` of a path or URI."""
    return from_npz(read_file(uri, access), uri, extractor, dataset, device)


_NAMES = {"mu", "sigma", "mu_s", "sigma_s", "n", "features", "extractor", "dataset", "origin", "arr_0", "class_names"}


def _class_names(arrays: dict[str, Any]) -> tuple[str, ...]:
    """What `to_bytes` wrote; () for a file of others, who may call anything class_names."""
    with contextlib.suppress(ValueError, RecursionError):
        names = json.loads(str(arrays.get("class_names", ""))) if "extractor" in arrays else ()
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return tuple(names)
    return ()


def _count(n: NDArray[Any], where: str) -> int:
    if n.shape != () or n.dtype.kind not in "iu" or not 0 <= int(n) < 2**53:
        raise DataError(f"{where} says that its statistics are of {str(n)[:40]} images ({n.dtype}); {_AGAIN}")
    return int(n)


def _statistics(arrays: dict[str, Any], mu: str, sigma: str, n: int, where: str) -> Statistics:
    """Checked mean and covariance, float64. Raises DataError for missing, mis-shaped, not finite or not symmetric arrays."""
    if sigma not in arrays:
        raise DataError(f"{where} holds {mu} but not {sigma}; a Frechet distance needs both")
    mean, cov = arrays[mu], arrays[sigma]
    floating = np.issubdtype(mean.dtype, np.floating) and np.issubdtype(cov.dtype, np.floating)
    if not floating or mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
        raise DataError(
            f"{where} needs {mu} (d,) and {sigma} (d, d) as floats, not {mean.dtype} {mean.shape} and {cov.dtype} {cov.shape}; "
            "compute the statistics again"
        )
    with np.errstate(over="ignore"):  # of longer floats
        mean, cov = mean.astype(np.float64), cov.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise DataError(f"{where} holds NaN or infinity in {mu} or {sigma}; compute the statistics again")
    if not len(mean) or np.abs(mean).max() >= _LARGEST or np.abs(cov).max() >= _LARGEST or cov.diagonal().min() < 0:
        raise DataError(
            f"{where} holds no features, or a negative variance, or values beyond {_LARGEST:g} in {mu} or {sigma}; "
            "compute the statistics again"
        )
    # Statistics that were computed in float32 are symmetric to about 1e-7 of their largest entry.
    if np.abs(cov - cov.T).max() > 1e-5 * np.abs(cov).max():
        raise DataError(f"{sigma} of {where} is not symmetric and so no covariance; compute the statistics again")
    return Statistics(mean, (cov + cov.T) / 2.0, n)


def _check_images(images: NDArray[Any], where: str) -> None:
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) < 2:
        raise DataError(
            f"arr_0 of {where} must hold two images or more, uint8 (N, H, W, C), not {images.dtype} {images.shape}; save them so"
        )


def _measured(blocks: Iterator[NDArray[np.uint8]], n: int, extractor: Extractor, dataset: str, device: str) -> Reference:
    wanted, seen = _spread(n), 0
    pools, spatials, kept = [], [], []
    for block in blocks:
        measured = extractor.measure(block, device)
        pools.append(moments.from_features(measured.features))
        if measured.spatial is not None:
            spatials.append(moments.from_features(measured.spatial))
        here = wanted[(wanted >= seen) & (wanted < seen + len(block))] - seen
        kept.append(Measured(measured.features[here]))
        seen += len(block)
        # One running sum instead of one matrix per block: the same additions in the same order.
        pools, spatials = [moments.merged(pools)], [moments.merged(spatials)] if spatials else []
    pool = pools[0]
    spatial = Statistics(spatials[0].mean, spatials[0].covariance, n) if spatials else None
    return Reference(dataset, Statistics(pool.mean, pool.covariance, n), spatial, concatenated(kept).features)


def _blocks(images: Iterator[NDArray[np.uint8]]) -> Iterator[NDArray[np.uint8]]:
    block: list[NDArray[np.uint8]] = []
    for image in images:
        block.append(image)
        if len(block) == UNIT:
            yield np.stack(block)
            block = []
    if block:
        yield np.stack(block)


def _spread(n: int) -> NDArray[np.int64]:
    """Up to KEPT indices below n, evenly spaced, so that data sorted by class are kept in proportion."""
    return np.arange(min(n, KEPT), dtype=np.int64) * n // min(n, KEPT)
