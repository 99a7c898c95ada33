"""From what extractors said of a set of images to the values of its row: the one way for `evaluate` and for `score`.

The set comes in units, in the order of the images. Moments are formed per unit and added in that order, so a row's bits depend on
the units and never on who made them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from freeguide.cluster.evaluation.extractors.features import Extractor, Measured
from freeguide.cluster.evaluation.extractors.roles import ROLES
from freeguide.cluster.evaluation.metrics import METRICS
from freeguide.cluster.evaluation.reference import Reference
from freeguide.cluster.evaluation.statistics.metric import Seen
from freeguide.configs.errors import DataError


@dataclass(frozen=True, eq=False)
class Yardstick:
    """An extractor and the real images as it sees them."""

    extractor: Extractor
    reference: Reference
    weights: str = ""  # where its weights stand, for other processes to load them
    role: str = ""  # beside the first yardstick, see `extractors.roles`; "" = it is the first, which FID is measured with

    def described(self) -> "Yardstick":
        """Without the extractor's network, which may weigh a gigabyte: `values` and `conditions` do not need it."""
        facts = {name: getattr(self.extractor, name) for name in ("name", "hash", "resize", "channels", "width", "has_classes")}
        return replace(self, extractor=cast("Extractor", SimpleNamespace(**facts)))


def values(units: Sequence[Measured], labels: NDArray[np.integer] | None, *yardsticks: Yardstick) -> dict[str, float | None]:
    """The values of a row, by their names in `METRICS`, from N images in units; `labels` (N,) are those that made the images, None
    where they are not known or there is one class only.

    The units hold the features of every yardstick (`measure_with`), of which the first has no role. A metric whose needs the
    yardstick of its role does not meet is left out: precision, recall and KID without features of real images, sFID without spatial
    ones, IS and class accuracy without an extractor with classes. FID-infinity and the distances' spreads are None for fewer
    images, or cycles of balanced labels, than they need. Raises DataError if something that was asked for cannot be computed.
    """
    judge = yardsticks[0].extractor
    if judge.has_classes and any(unit.probabilities is None for unit in units):
        raise DataError(f"some units hold no probabilities of {judge.name}'s classes; measure these images again")
    seen = {each.role: Seen(_units_of(units, each.role), labels, each.extractor, each.reference) for each in yardsticks}
    found: dict[str, float | None] = {}
    for name, metric in METRICS.items():
        if metric.role in seen and all(map(seen[metric.role].has, metric.needs)):
            found[name], spread = metric.compute(seen[metric.role])
            if metric.spread:
                found[f"{name}_std"] = spread
    return found


def _units_of(units: Sequence[Measured], role: str) -> Sequence[Measured]:
    """What the extractor of that role said."""
    if not role:
        return units
    if any(role not in unit.others for unit in units):
        title = ROLES[role].title
        raise DataError(f"some units hold no {title} features; measure these images again with evaluate.{role} set")
    return [Measured(unit.others[role]) for unit in units]


def conditions(*yardsticks: Yardstick) -> dict[str, Any]:
    """The conditions of a row that the measurement decides, by the names that rows give them."""
    first, *beside = yardsticks
    known = {
        "dataset": first.reference.dataset,
        "reference": first.reference.sha256,
        "reference_n": first.reference.pool.n,
        "extractor": first.extractor.name,
        "extractor_hash": first.extractor.hash,
        "resize": first.extractor.resize,
    }
    for each in beside:
        known |= {each.role: each.extractor.hash, f"{each.role}_reference": each.reference.sha256}
    return known
