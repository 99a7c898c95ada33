"""Which metrics there are, in the order of a table's columns. A row's fields, tables, curves and TensorBoard follow from here."""

import warnings

from freeguide.cluster.evaluation.reference import Statistics
from freeguide.cluster.evaluation.statistics import moments
from freeguide.cluster.evaluation.statistics.fid import fid, fid_infinity, fid_spread
from freeguide.cluster.evaluation.statistics.inception_score import class_accuracy, inception_score
from freeguide.cluster.evaluation.statistics.kid import kid
from freeguide.cluster.evaluation.statistics.metric import Metric, Seen, Value
from freeguide.cluster.evaluation.statistics.precision_recall import precision, recall

POINTS = 15  # subsets of FID-infinity


def _frechet(seen: Seen) -> Value:
    generated = moments.merged(moments.from_features(unit.features) for unit in seen.units)
    return fid(generated, seen.reference.pool), fid_spread(seen.features, seen.reference.pool, seen.cycle)


def _infinity(seen: Seen) -> Value:
    n, d = seen.features.shape
    if n // 3 <= d or n < 2 * seen.cycle:
        return None, None
    return fid_infinity(seen.features, seen.reference.pool, POINTS, cycle=seen.cycle).value, None


def _score(seen: Seen) -> Value:
    score = inception_score(seen.probabilities)
    return score.mean, score.std


def _accuracy(seen: Seen) -> Value:
    assert seen.labels is not None
    return class_accuracy(seen.probabilities, seen.labels), None


def _kid(seen: Seen) -> Value:
    found = kid(seen.features, seen.real, cycle=seen.cycle)
    return found.mean, found.std


def _spatial(seen: Seen) -> Value:
    real, whole = seen.reference.spatial, seen.whole.spatial
    assert isinstance(real, Statistics)
    assert whole is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # too few images were reported with the FID already
        generated = moments.merged(moments.from_features(unit.spatial) for unit in seen.units if unit.spatial is not None)
        return fid(generated, real), fid_spread(whole, real, seen.cycle)


_share = "{:.3f}".format

METRICS: dict[str, Metric] = {
    "fid": Metric(compute=_frechet, title="{fid}", better="lower", spread="jackknife", tensorboard="{fid}"),
    "inception_score": Metric(
        compute=_score,
        title="IS",
        better="higher",
        needs=("probabilities",),
        spread="splits",
        form="{:.2f}".format,
        spread_form="{:.2f}".format,
        tensorboard="inception_score",
    ),
    "accuracy": Metric(
        compute=_accuracy,
        title="accuracy",
        better="higher",
        needs=("probabilities", "labels"),
        form=_share,
        arrow=False,
        curve=2,
        tensorboard="accuracy",
    ),
    "precision": Metric(
        compute=lambda seen: (precision(seen.features, seen.real), None),
        title="precision",
        better="higher",
        needs=("real features",),
        form=_share,
        arrow=False,
        curve=0,
        tensorboard="precision",
    ),
    "recall": Metric(
        compute=lambda seen: (recall(seen.features, seen.real), None),
        title="recall",
        better="higher",
        needs=("real features",),
        form=_share,
        arrow=False,
        curve=1,
        tensorboard="recall",
    ),
    "kid": Metric(
        compute=_kid,
        title="KID × 1000",
        better="lower",
        needs=("real features",),
        spread="jackknife",
        scale=1000,
        form=lambda value: f"{float(f'{value:.3g}'):g}",
        arrow=False,
    ),
    "fid_infinity": Metric(compute=_infinity, title="{fid} ∞", better="lower", arrow=False),
    "sfid": Metric(compute=_spatial, title="sFID", better="lower", needs=("spatial features",), spread="jackknife", arrow=False),
    "fd_dinov2": Metric(compute=_frechet, title="FD-DINOv2", better="lower", role="dinov2", spread="jackknife", arrow=False),
}


def value_names() -> list[str]:
    """What rows call the values of all metrics, and their spreads."""
    return [each for name, metric in METRICS.items() for each in (name, *([f"{name}_std"] if metric.spread else []))]
