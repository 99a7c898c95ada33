"""Frontiers: what FID a model pays for an Inception score, and what seeds leave of a difference.

Guidance trades FID against IS, so two models are compared where their IS is equal, never where their w is. The paper's Table 1 is
the warning: at w = 1 the model of p_uncond = 0.5 has the lowest FID of the three (9.13 against 12.6), and at every IS up to 200 it
has the highest. Rows without a score have no frontier: the lower FID is the better one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from freeguide.cluster.evaluation.metrics import METRICS
from freeguide.cluster.evaluation.rows import Row, require_comparable


def fid_at(rows: Sequence[Row], inception_score: float) -> float | None:
    """FID at an Inception score, on straight lines between rows that follow each other in w; None where the rows do not reach it.

    Where the curve turns back and passes the score twice, the lower FID counts: one would choose that w.
    """
    points = [(row.inception_score, row.fid) for row in sorted(rows, key=lambda row: row.w) if row.inception_score is not None]
    found = [fid for score, fid in points if score == inception_score]
    for (score_a, fid_a), (score_b, fid_b) in pairwise(points):
        if min(score_a, score_b) < inception_score < max(score_a, score_b):
            share = (inception_score - score_a) / (score_b - score_a)
            found.append(fid_a + share * (fid_b - fid_a))
    return min(found, default=None)


def common_scores(series: Sequence[Sequence[Row]], count: int = 10) -> list[float]:
    """Up to `count` round Inception scores, rising, that every series reaches; empty if their ranges do not overlap, or if a series
    has none.
    """
    reached = [[row.inception_score for row in rows if row.inception_score is not None] for rows in series]
    if not all(reached) or (high := min(map(max, reached))) <= (low := max(map(min, reached))):
        return []
    for step in (m * 10.0**e for e in range(-4, 5) for m in (1.0, 2.0, 5.0)):
        first, last = int(np.ceil(low / step)), int(np.floor(high / step))
        if last - first + 1 <= count:
            return [round(i * step, 6) for i in range(first, last + 1)]
    return []


def near_frontier(curves: Sequence[Sequence[Row]]) -> list[list[float]]:
    """The w of each curve that may lie on the common frontier of all of them, and their neighbours in w: what deserves more images.

    A row is beaten by one of at least its Inception score, if it has one, whose FID is lower by more than the sum of both spreads
    (`fid_std`). Where a spread is not known, nobody knows who is beaten.
    """
    known = [(_score(row), row.fid, row.fid_std) for rows in curves for row in rows if row.fid_std is not None]

    def beaten(row: Row) -> bool:
        if row.fid_std is None:
            return False
        limit = row.fid - row.fid_std
        return any(score >= _score(row) and fid + std < limit for score, fid, std in known)

    found = []
    for rows in curves:
        ordered = sorted(rows, key=lambda row: row.w)
        kept = [not beaten(row) for row in ordered]
        found.append([row.w for i, row in enumerate(ordered) if any(kept[max(0, i - 1) : i + 2])])
    return found


def _score(row: Row) -> float:
    return -math.inf if row.inception_score is None else row.inception_score


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (denominator k - 1) of a value over k seeds; the deviation is None for one seed."""

    mean: float
    std: float | None
    k: int


@dataclass(frozen=True)
class SeedRow:
    """What several seeds say of one w: the values that all of them have, by the names of a row's fields."""

    w: float
    values: dict[str, Spread]


def over_seeds(rows: Sequence[Row], names: Sequence[str] = ("seed",)) -> list[SeedRow]:
    """Rows that differ in w and in the MODEL conditions `names` only, gathered by w: ("seed",) asks what sampling leaves open,
    ("run",) with runs of several training seeds what training leaves open. The mean is reported, never the best; so a w that not
    all of them have is left out, as a screen keeps the better ones.

    Raises DataError if anything else differs.
    """
    require_comparable(rows, names)
    members = len({tuple(getattr(row, name) for name in names) for row in rows})
    gathered = []
    for w in sorted({row.w for row in rows}):
        here = [row for row in rows if row.w == w]
        if len(here) < members:
            continue
        found = {name: [row.value(name) for row in here] for name in METRICS}
        gathered.append(SeedRow(w, {name: spread(values) for name, values in found.items() if None not in values}))
    return gathered


def spread(values: Sequence[float]) -> Spread:
    return Spread(float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None, len(values))
