"""The Inception score (Salimans et al. 2016) and the class accuracy, from the class probabilities of generated images.

    IS = exp( E_x KL( p(y|x) || p(y) ) ),   p(y) = E_x p(y|x)

It is the exponential of the mutual information between image and class, so 1 <= IS <= K: 1 if every image looks alike to the
classifier, K if each is certain and all K classes are equally frequent. The images are cut into contiguous splits; the score is
the mean over them, its spread their standard deviation. Nothing is shuffled: images must not be sorted by class. (Image i of
freeguide has label i mod K or a random one.) A split of fewer images than classes cannot hold them all and scores low, so with 10
splits scores compare from 10 K images on.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from freeguide.configs.errors import DataError

BLOCK = 512  # rows upcast at a time: 4 MB of 1008 classes


@dataclass(frozen=True)
class InceptionScore:
    mean: float
    std: float  # over the splits, with denominator `splits` as in the original code


def inception_score(probabilities: NDArray[np.floating], splits: int = 10) -> InceptionScore:
    """Inception score of class probabilities (N, K), rows summing to one.

    Raises DataError for fewer images than splits, and for rows that are not probabilities.
    """
    _check(probabilities)
    n = len(probabilities)
    if n < splits:
        raise DataError(f"an Inception score over {splits} splits needs at least as many images, not {n}; generate more")
    scores = [_score(probabilities[i * n // splits : (i + 1) * n // splits]) for i in range(splits)]
    return InceptionScore(float(np.mean(scores)), float(np.std(scores)))


def class_accuracy(probabilities: NDArray[np.floating], labels: NDArray[np.integer]) -> float:
    """Share of images whose most probable class, of probabilities (N, K), is the label (N,) that conditioned them.

    Raises DataError if the lengths differ, a label is outside 0 .. K - 1, or rows are not probabilities.
    """
    _check(probabilities)
    n, classes = probabilities.shape
    if labels.shape != (n,):
        raise DataError(f"{n} rows of probabilities need {n} labels, not {labels.shape}; pass the labels that generated the images")
    if labels.min() < 0 or labels.max() >= classes:
        raise DataError(f"labels {labels.min()} to {labels.max()} do not fit {classes} classes; use the evaluator of that data")
    return float(np.mean(probabilities.argmax(axis=1) == labels))


def _score(p: NDArray[np.floating]) -> float:
    """exp of the entropy of the mean minus the mean of the entropies, in float64, a cacheable block of rows at a time."""
    total, negative_entropy = np.zeros(p.shape[1]), 0.0
    for start in range(0, len(p), BLOCK):
        rows = p[start : start + BLOCK].astype(np.float64)
        total += rows.sum(axis=0)
        negative_entropy += _p_log_p(rows)
    return float(np.exp(negative_entropy / len(p) - _p_log_p(total / len(p))))


def _p_log_p(p: NDArray[np.float64]) -> float:
    logarithm = np.log(p, out=np.zeros_like(p), where=p > 0)  # p log p -> 0 as p -> 0
    return float(np.vdot(p, logarithm))


def _check(probabilities: NDArray[np.floating]) -> None:
    if probabilities.ndim != 2 or not probabilities.size:
        raise DataError(
            f"class probabilities must have shape (N, K) and not be empty, but are {probabilities.shape}; pass one row per image"
        )
    sums = probabilities.sum(axis=1, dtype=np.float64)
    # float32 softmax sums to one within 1e-6; logits and unnormalised scores are far outside 1e-3. NaN fails the comparison.
    bad = ~((np.abs(sums - 1.0) < 1e-3) & (probabilities.min(axis=1) >= 0.0))
    if bad.any():
        row = int(np.argmax(bad))
        raise DataError(f"row {row} is not a probability distribution (its sum is {sums[row]:.4g}); apply a softmax to the logits")
