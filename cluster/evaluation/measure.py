"""From what extractors said of a set of images to the values of its row: the one way for `evaluate` and for `score`.

The set comes in units, in the order of the images. Moments are formed per unit and added in that order, so a row's bits depend on
the units and never on who made them.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from freeguide.cluster.evaluation.extractors.features import Extractor, Measured, concatenated
from freeguide.cluster.evaluation.reference import Reference
from freeguide.cluster.evaluation.rows import INCEPTION
from freeguide.cluster.evaluation.statistics import moments
from freeguide.cluster.evaluation.statistics.fid import fid, fid_infinity, fid_spread
from freeguide.cluster.evaluation.statistics.inception_score import class_accuracy, inception_score
from freeguide.cluster.evaluation.statistics.kid import kid
from freeguide.cluster.evaluation.statistics.precision_recall import precision_recall
from freeguide.configs.errors import DataError

POINTS = 15  # subsets of FID-infinity
# Fields of a row that `values` decides.
VALUES = (
    *("fid", "fid_std", "fid_infinity", "inception_score", "inception_score_std", "accuracy"),
    *("precision", "recall", "kid", "kid_std", "sfid", "sfid_std", "fd_dinov2", "fd_dinov2_std"),
)


@dataclass(frozen=True, eq=False)
class Yardstick:
    """An extractor and the real images as it sees them."""

    extractor: Extractor
    reference: Reference
    weights: str = ""  # where its weights stand, for other processes to load them

    def described(self) -> "Yardstick":
        """Without the extractor's network, which may weigh a gigabyte: `values` and `conditions` do not need it."""
        facts = {name: getattr(self.extractor, name) for name in ("name", "hash", "resize", "channels", "width", "has_classes")}
        return replace(self, extractor=cast("Extractor", SimpleNamespace(**facts)))


def values(
    units: Sequence[Measured],
    labels: NDArray[np.integer] | None,
    yardstick: Yardstick,
    dinov2: Yardstick | None = None,
) -> dict[str, float | None]:
    """The values of a row, by the names of its fields, from N images in units; `labels` (N,) are those that made the images, None
    where they are not known or there is one class only.

    With the yardstick `dinov2`, the units hold DINOv2's features too (`measure_with`).
    What the reference or the extractor does not allow is None: precision, recall and KID without features of real images, sFID
    without spatial ones, FID-infinity and the distances' spreads for fewer images, or cycles of balanced labels, than they need.
    IS and class accuracy need an extractor with classes, and accuracy an own evaluator: Inception's 1008 classes are not numbered
    as ImageNet's labels. Raises DataError where FID, IS or FD-DINOv2 cannot be computed.
    """
    reference, whole = yardstick.reference, concatenated(units)
    if yardstick.extractor.has_classes and whole.probabilities is None:
        raise DataError(f"some units hold no probabilities of {yardstick.extractor.name}'s classes; measure these images again")
    n, d = whole.features.shape
    cycle = _cycle(n, labels)
    enough = n // 3 > d and n >= 2 * cycle
    found: dict[str, float | None] = {
        "fid": fid(moments.merged(moments.from_features(unit.features) for unit in units), reference.pool),
        "fid_std": fid_spread(whole.features, reference.pool, cycle),
        "fid_infinity": fid_infinity(whole.features, reference.pool, POINTS, cycle=cycle).value if enough else None,
    }
    if yardstick.extractor.has_classes and whole.probabilities is not None:
        score = inception_score(whole.probabilities)
        found |= {"inception_score": score.mean, "inception_score_std": score.std}
        if labels is not None and yardstick.extractor.name != INCEPTION:
            found["accuracy"] = class_accuracy(whole.probabilities, labels)
    if reference.features is not None:
        near = precision_recall(whole.features, reference.features)
        distance = kid(whole.features, reference.features, cycle=cycle)
        found |= {"precision": near.precision, "recall": near.recall, "kid": distance.mean, "kid_std": distance.std}
    if reference.spatial is not None and whole.spatial is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # too few images were reported with the FID already
            spatial = moments.merged(moments.from_features(unit.spatial) for unit in units if unit.spatial is not None)
            found["sfid"] = fid(spatial, reference.spatial)
            found["sfid_std"] = fid_spread(whole.spatial, reference.spatial, cycle)
    if dinov2 is not None:
        if whole.dinov2 is None:
            raise DataError("some units hold no DINOv2 features; measure these images again with evaluate.dinov2 set")
        pool = moments.merged(moments.from_features(unit.dinov2) for unit in units if unit.dinov2 is not None)
        found["fd_dinov2"] = fid(pool, dinov2.reference.pool)
        found["fd_dinov2_std"] = fid_spread(whole.dinov2, dinov2.reference.pool, cycle)
    return found


def _cycle(n: int, labels: NDArray[np.integer] | None) -> int:
    """Images after which balanced labels (image i has i mod classes) begin again; 1 for labels in any other order, or none."""
    if labels is None:
        return 1
    classes = max(int(labels.max()) + 1, 1)
    return classes if np.array_equal(labels, np.arange(n) % classes) else 1


def conditions(yardstick: Yardstick, dinov2: Yardstick | None = None) -> dict[str, Any]:
    """The conditions of a row that the measurement decides, by the names of its fields."""
    known = {
        "dataset": yardstick.reference.dataset,
        "reference": yardstick.reference.sha256,
        "reference_n": yardstick.reference.pool.n,
        "extractor": yardstick.extractor.name,
        "extractor_hash": yardstick.extractor.hash,
        "resize": yardstick.extractor.resize,
    }
    if dinov2 is not None:
        known |= {"dinov2": dinov2.extractor.hash, "dinov2_reference": dinov2.reference.sha256}
    return known
