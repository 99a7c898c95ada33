"""One way from features to a row's values: what can be measured is, what cannot is None, and units decide the bits."""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from freeguide.cluster.evaluation.extractors.features import INCEPTION, Measured
from freeguide.cluster.evaluation.measure import Yardstick, conditions, values
from freeguide.cluster.evaluation.metrics import value_names
from freeguide.cluster.evaluation.reference import Reference, Statistics
from freeguide.cluster.evaluation.rows import Row
from freeguide.cluster.evaluation.statistics.fid import fid, fid_infinity, fid_spread, frechet_distance
from freeguide.cluster.evaluation.statistics.inception_score import inception_score
from freeguide.cluster.evaluation.statistics.kid import kid
from freeguide.cluster.evaluation.statistics.moments import from_features, merged
from freeguide.cluster.evaluation.statistics.precision_recall import precision, recall
from freeguide.configs.errors import DataError

N, D = 400, 5
GENERATOR = np.random.default_rng(0)
FEATURES = GENERATOR.normal(size=(N, D)).astype(np.float32)
SPATIAL = GENERATOR.normal(size=(N, 3)).astype(np.float32)
PROBABILITIES = GENERATOR.dirichlet(np.ones(4), size=N).astype(np.float32)
LABELS = np.arange(N) % 4
REAL = GENERATOR.normal(size=(300, D)).astype(np.float32) + 0.2


@dataclass(frozen=True)
class Judge:
    name: str = "toy"
    hash: str = "c3" * 32
    resize: str = "none"
    channels: int = 1
    width: int = D
    has_classes: bool = True

    def measure(self, images: np.ndarray, device: str = "cpu") -> Measured:
        raise AssertionError("nothing is measured here")


def _statistics(features: np.ndarray) -> Statistics:
    moments = from_features(features)
    return Statistics(moments.mean, moments.covariance, moments.n)


def _units(*edges: int, **without: None) -> list[Measured]:
    parts = {"features": FEATURES, "probabilities": PROBABILITIES, "spatial": SPATIAL}
    bounds = zip((0, *edges), (*edges, N), strict=True)
    return [Measured(**{name: array[first:last] for name, array in parts.items() if name not in without}) for first, last in bounds]


FULL = Yardstick(Judge(), Reference("toys", _statistics(REAL), _statistics(SPATIAL[:200] + 1), REAL))
BARE = Yardstick(Judge(INCEPTION), Reference("", _statistics(REAL)))


def test_every_value_is_that_of_its_own_function():
    found = values(_units(150), LABELS, FULL)
    units = [from_features(FEATURES[:150]), from_features(FEATURES[150:])]
    spatial = merged([from_features(SPATIAL[:150]), from_features(SPATIAL[150:])])
    distance = kid(FEATURES, REAL)
    assert FULL.reference.spatial is not None
    assert found == {
        "fid": fid(merged(units), FULL.reference.pool),
        "fid_std": fid_spread(FEATURES, FULL.reference.pool, cycle=4),
        "fid_infinity": fid_infinity(FEATURES, FULL.reference.pool, cycle=4).value,
        "inception_score": inception_score(PROBABILITIES).mean,
        "inception_score_std": inception_score(PROBABILITIES).std,
        "accuracy": float(np.mean(PROBABILITIES.argmax(axis=1) == LABELS)),
        "precision": precision(FEATURES, REAL),
        "recall": recall(FEATURES, REAL),
        "kid": distance.mean,
        "kid_std": distance.std,
        "sfid": fid(spatial, FULL.reference.spatial),
        "sfid_std": fid_spread(SPATIAL, FULL.reference.spatial, cycle=4),
    }
    assert values(_units(150), LABELS, FULL.described()) == found


@pytest.mark.parametrize(
    ("labels", "cycle"),
    [
        (np.arange(N) % 7, 7),  # 400 is no multiple
        (np.arange(N) % 80, 80),
        ((np.arange(N) % 200).astype(np.uint8), 200),
        (np.zeros(N, np.int64), 1),
        (np.full(N, -1), 1),
        (np.random.default_rng(0).permutation(LABELS), 1),
        (np.append(LABELS[:-1], 0), 1),
        (np.sort(LABELS), 1),
        (None, 1),
    ],
)
def test_only_balanced_labels_are_taken_in_cycles(labels, cycle):
    found = values(_units(), labels, BARE)
    assert found["fid_std"] == fid_spread(FEATURES, BARE.reference.pool, cycle)
    assert found["fid_infinity"] == fid_infinity(FEATURES, BARE.reference.pool, cycle=cycle).value
    assert (found["fid_std"] is None) == (cycle == 200), "two cycles have no spread"


@pytest.mark.parametrize("labels", [np.arange(N), (np.arange(N) % 256).astype(np.uint8)])
def test_one_cycle_has_no_limit_and_no_spread(labels):
    found = values(_units(), labels, BARE)
    assert (found["fid_std"], found["fid_infinity"]) == (None, None)


def test_dinov2_has_an_instrument_of_its_own():
    other = FEATURES[:, :2] * 3
    dinov2 = Yardstick(Judge("dinov2", "d4" * 32), Reference("toys", _statistics(REAL[:, :2])), role="dinov2")
    units = [replace(unit, others={"dinov2": part}) for unit, part in zip(_units(100), (other[:100], other[100:]), strict=True)]
    found = values(units, LABELS, FULL, dinov2)
    sums = merged([from_features(other[:100]), from_features(other[100:])])
    pool = dinov2.reference.pool
    assert found["fd_dinov2"] == frechet_distance(pool.mean, pool.covariance, sums.mean, sums.covariance)
    known = conditions(FULL, dinov2)
    assert (known["dinov2"], known["dinov2_reference"]) == ("d4" * 32, dinov2.reference.sha256)
    assert "dinov2" not in conditions(FULL)
    with pytest.raises(DataError, match="some units hold no DINOv2 features"):
        values([units[0], replace(units[1], others={})], LABELS, FULL, dinov2)


def test_values_and_conditions_are_fields_of_a_row_and_fill_it():
    found = values(_units(), LABELS, FULL)
    row = Row(w=0.0, n=N, run="x", code_version="x", rounding="r", labels="l", **found, **conditions(FULL))  # type: ignore[arg-type]
    assert (row.dataset, row.reference_n, row.extractor, row.fid_name) == ("toys", 300, "toy", "FID-toy")
    assert set(found) <= set(value_names()) <= set(Row.__dataclass_fields__)


def test_what_cannot_be_measured_is_left_out():
    found = values(_units(spatial=None), LABELS, BARE)  # 1008 classes of another order: no accuracy
    assert {name for name, value in found.items() if value is not None} == {
        *("fid", "fid_std", "fid_infinity", "inception_score", "inception_score_std")
    }
    few = [Measured(FEATURES[:12], PROBABILITIES[:12])]
    found = values(few, LABELS[:12], BARE)
    assert (found["fid_std"], found["fid_infinity"]) == (None, None)
    for units in (_units(probabilities=None), [*_units(150)[:1], *_units(150, probabilities=None)[1:]]):
        with pytest.raises(DataError, match="some units hold no probabilities of toy's classes; measure these images again"):
            values(units, LABELS, FULL)


@pytest.mark.parametrize("units", [_units(150), _units(150, probabilities=None)])
def test_an_extractor_without_classes_gives_all_but_the_inception_score_and_the_accuracy(units):
    """Whatever else it may be sure of: its probabilities are of no classes."""
    without = replace(FULL, extractor=Judge(has_classes=False))
    found = values(units, LABELS, without)
    of_classes = {"inception_score", "inception_score_std", "accuracy"}
    assert found == {name: value for name, value in values(_units(150), LABELS, FULL).items() if name not in of_classes}
    assert values(units, LABELS, without.described()) == found
    row = Row(w=0.0, n=N, run="x", code_version="x", rounding="r", labels="l", **found, **conditions(without))  # type: ignore[arg-type]
    assert (row.inception_score, row.inception_score_std, row.accuracy) == (None, None, None)


def test_too_few_images_are_said_once_and_loudly():
    wide = Yardstick(Judge(), Reference("", _statistics(np.random.default_rng(1).normal(size=(50, 20)))))
    tiny = [Measured(np.random.default_rng(2).normal(size=(12, 20)).astype(np.float32), PROBABILITIES[:12])]
    with pytest.warns(UserWarning, match="12 generated images for 20 features") as told:
        values(tiny, None, wide)
    assert len(told) == 1


def test_the_bits_depend_on_the_units_only():
    assert values(_units(64, 128), LABELS, FULL) == values(_units(64, 128), LABELS, FULL)
    one, other = values(_units(64, 128), LABELS, FULL), values(_units(200), LABELS, FULL)
    assert one["fid"] == pytest.approx(other["fid"], rel=1e-10)  # another order of float64 sums
