"""Metric: a number that a row has of its images, as a record of all that is to be known about it.

A metric says what it needs, how it is computed, and how tables, curves and TensorBoard show it. It is given the images as one
extractor sees them (`Seen`), and says nothing of how these came to be. `cluster/evaluation/metrics.py` has the dictionary of what
there is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from freeguide.cluster.evaluation.extractors.features import INCEPTION, Extractor, Measured, concatenated
from freeguide.cluster.evaluation.reference import Reference

Need = Literal["probabilities", "labels", "real features", "spatial features"]
Value = tuple[float | None, float | None]  # of a metric, and its spread; None for what too few images do not allow


@dataclass(frozen=True, eq=False)
class Seen:
    """N generated images, in units and in their order, and the real ones, as one extractor sees them."""

    units: Sequence[Measured]
    labels: NDArray[np.integer] | None  # (N,) that made the images; None if they are not known or there is one class only
    extractor: Extractor
    reference: Reference

    def has(self, need: Need) -> bool:
        """Whether a metric with that need can be computed."""
        if need == "probabilities":
            return self.extractor.has_classes and self.whole.probabilities is not None
        if need == "labels":  # that number the extractor's classes: Inception's 1008 are not numbered as ImageNet's labels
            return self.labels is not None and self.extractor.name != INCEPTION
        if need == "real features":
            return self.reference.features is not None
        return self.reference.spatial is not None and self.whole.spatial is not None

    @cached_property
    def whole(self) -> Measured:
        """All units as one."""
        return concatenated(self.units)

    @property
    def features(self) -> NDArray[np.float32]:
        """(N, d)."""
        return self.whole.features

    @property
    def probabilities(self) -> NDArray[np.float32]:
        """(N, K), for a metric that needs "probabilities"."""
        assert self.whole.probabilities is not None
        return self.whole.probabilities

    @property
    def real(self) -> NDArray[np.float32]:
        """Features (M, d) of real images, for a metric that needs "real features"."""
        assert self.reference.features is not None
        return self.reference.features

    @cached_property
    def cycle(self) -> int:
        """Images after which balanced labels (image i has i mod classes) begin again; 1 for labels in any other order, or none."""
        if self.labels is None:
            return 1
        classes = max(int(self.labels.max()) + 1, 1)
        return classes if np.array_equal(self.labels, np.arange(len(self.labels)) % classes) else 1


def distance(value: float) -> str:
    """Two decimals, as the paper prints FID; three significant digits below one."""
    return f"{value:.2f}" if value >= 1 else f"{value:.3g}"


def deviation(value: float) -> str:
    """Two significant digits, without an exponent up to a million."""
    return f"{float(f'{value:.2g}'):g}"


@dataclass(frozen=True, kw_only=True)
class Metric:
    """`title` and `tensorboard` may hold `{fid}`, for which stands what the row's FID is called."""

    compute: Callable[[Seen], Value]  # raises DataError for images of which it cannot be computed
    title: str  # of its column
    better: Literal["lower", "higher"]
    needs: tuple[Need, ...] = ()  # beside features; without them, the row does not have it
    role: str = ""  # of the extractor whose features it is of, see `extractors.roles`; "" = the one that FID is of
    spread: Literal["", "jackknife", "splits"] = ""  # what stands after ± and in the row as <name>_std; "" = nothing
    scale: int = 1  # by which tables multiply it
    form: Callable[[float], str] = distance  # how tables print it, multiplied by `scale`
    spread_form: Callable[[float], str] = deviation
    arrow: bool = True  # whether its column says which direction is better
    curve: int | None = None  # of a share of images: its place among those that the report draws over w; None = not drawn
    tensorboard: str = ""  # what it is called there; "" = not shown

    def titled(self, fid_name: str) -> str:
        """What tables call it."""
        return self.title.replace("{fid}", fid_name)

    def head(self, fid_name: str) -> str:
        """The head of its column."""
        return self.titled(fid_name) + ({"lower": " ↓", "higher": " ↑"}[self.better] if self.arrow else "")

    def cell(self, value: float | None, spread: float | None) -> str:
        """What stands in its column."""
        if value is None:
            return "-"
        return self.form(self.scale * value) + ("" if spread is None else f" ± {self.spread_form(self.scale * spread)}")
