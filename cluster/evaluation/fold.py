"""Folding: the units of one w become one row, once, on whichever actor is free.

At the paper's n = 50 000 and 2048 features a row takes minutes (precision and recall, FID-infinity, the jackknife), so rows are
published as units are, under a name that says what decides them, and whoever asks again finds them. Its units are not needed any
more then. BLAS has a fixed number of threads meanwhile: another number adds in another order and gives other bits.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from freeguide.cluster.evaluation import measure, units
from freeguide.cluster.evaluation.executor import Resources
from freeguide.cluster.evaluation.extractors.features import Measured
from freeguide.cluster.evaluation.measure import Yardstick
from freeguide.cluster.evaluation.rows import Row, model_conditions
from freeguide.cluster.evaluation.series import COLUMNS, Series
from freeguide.cluster.evaluation.units import Unit
from freeguide.configs.errors import DataError
from freeguide.data_pipeline.artifact import fingerprint, read_npz, to_npz
from freeguide.data_pipeline.closure import code_version
from freeguide.data_pipeline.store.base import Store
from freeguide.trainer.sampler import evaluations

_MOST = 2**32  # bytes of a unit, or of a row
_AGAIN = "delete it and give the command again"


@dataclass(frozen=True)
class Fold:
    """What one actor does in one go: the row of images [0, images) of a series at w."""

    series: int
    w: float
    images: int
    key: str  # where its result stands, below the store of the series


def planned(weights: Sequence[Sequence[float]], images: int, yardsticks: Sequence[Yardstick]) -> list[Fold]:
    """The rows of images [0, `images`) of each series at its `weights`."""
    decides = {
        "format": 1,
        "measured": measure.conditions(*yardsticks),
        "code": code_version(units.MEASURING),
        "numpy": np.__version__,
    }
    name = fingerprint(decides)
    return [Fold(series, w, images, f"rows/w{w:g}-n{images}-{name}.npz") for series, curve in enumerate(weights) for w in curve]


@dataclass(frozen=True)
class Made:
    """What a unit took."""

    images: int
    seconds: float
    evaluations: int
    device: str


@dataclass(frozen=True, eq=False)
class Folded:
    """All that a report needs of the units of a row.

    The grid is uint8 (rows, COLUMNS classes at most, H, W, C), of one class (rows, COLUMNS images at most, H, W, C); None where
    labels are drawn, so that no column is a class.
    """

    values: dict[str, float | None]  # see `measure.values`
    grid: NDArray[np.uint8] | None
    made: dict[Unit, Made]

    def row(self, series: Series, fold: Fold, yardsticks: Sequence[Yardstick]) -> Row:
        """Its row, with all conditions."""
        return Row.of(
            w=fold.w,
            nfe=evaluations(series.config, fold.w),
            n=fold.images,
            **self.values,
            **measure.conditions(*yardsticks),
            **model_conditions(
                series.config,
                series.weights.step,
                units.code_version(),
                origin=series.origin,
                device=series.kind,
                ema_distance=series.weights.distance,
            ),
        )

    def to_bytes(self) -> bytes:
        """As `.npz`."""
        made = [[u.w, u.first, u.last, m.images, m.seconds, m.evaluations, m.device] for u, m in self.made.items()]
        arrays: dict[str, Any] = {"values": np.str_(json.dumps(self.values)), "made": np.str_(json.dumps(made))}
        if self.grid is not None:
            arrays["grid"] = self.grid
        return to_npz(arrays)

    @staticmethod
    def read(store: Store, key: str) -> "Folded":
        """What `to_bytes` wrote. Raises DataError if it is damaged."""
        arrays = _arrays(store, key)
        try:
            made = {Unit(*u[:3]): Made(*u[3:]) for u in json.loads(str(arrays["made"]))}
            return Folded(json.loads(str(arrays["values"])), arrays.get("grid"), made)
        except (KeyError, ValueError, TypeError) as error:
            raise DataError(f"{store.uri}/{key} holds no row ({type(error).__name__}: {error}); {_AGAIN}") from None


class RowWorker:
    """Folds units into rows: one per actor."""

    def __init__(self, series: Sequence[Series], yardsticks: Sequence[Yardstick], resources: Resources) -> None:
        torch.set_num_threads(resources.threads)
        self.series, self.yardsticks, self.threads = series, yardsticks, resources.threads

    def __call__(self, fold: Fold) -> None:
        series = self.series[fold.series]
        if not series.store.exists(fold.key):
            with threadpool_limits(self.threads):
                folded = _fold(series, fold, self.yardsticks)
            series.store.create(fold.key, folded.to_bytes())


def _fold(series: Series, fold: Fold, yardsticks: Sequence[Yardstick]) -> Folded:
    plan = units.split([fold.w], fold.images, series.config.evaluate.unit)
    parts = [_arrays(series.store, unit.key("npz")) for unit in plan]
    classes = series.config.data.classes
    labels = np.concatenate([part["labels"] for part in parts]) if classes > 1 else None  # of one class they say nothing
    grid = None
    if series.config.sampling.labels == "balanced":
        shown = np.concatenate([part["images"] for part in parts])
        columns = min(classes if classes > 1 else len(shown), COLUMNS)  # of one class they are lines of pictures
        grid = shown[: len(shown) // columns * columns].reshape(-1, columns, *shown.shape[1:])
    made = {
        unit: Made(unit.last - unit.first, float(part["seconds"]), int(part["evaluations"]), str(part["device"]))
        for unit, part in zip(plan, parts, strict=True)
    }
    return Folded(measure.values([Measured.from_arrays(part) for part in parts], labels, *yardsticks), grid, made)


def _arrays(store: Store, key: str) -> dict[str, Any]:
    """The arrays of an `.npz` by name. Raises DataError if it is damaged."""
    return read_npz(store.get(key, _MOST), f"{store.uri}/{key}", _AGAIN)
