"""The seam of metrics: one entry in a dictionary, and rows, JSON, CSV, tables, curves and the refusal to compare know it."""

import json
from dataclasses import replace

import numpy as np
import pytest

from freeguide.cluster.evaluation.extractors.features import Measured
from freeguide.cluster.evaluation.extractors.roles import ROLES, Role, role_conditions
from freeguide.cluster.evaluation.frontier import over_seeds
from freeguide.cluster.evaluation.measure import Yardstick, conditions, values
from freeguide.cluster.evaluation.metrics import METRICS, value_names
from freeguide.cluster.evaluation.report.page import report_files
from freeguide.cluster.evaluation.rows import Row, from_json, instrument, require_comparable, to_json
from freeguide.cluster.evaluation.statistics.metric import Metric, Seen, Value
from freeguide.configs.errors import DataError
from tests.cluster.metrics.test_measure import BARE, FEATURES, FULL, LABELS, Judge, _units
from tests.cluster.metrics.test_rows import ROW


def _length(seen: Seen) -> Value:
    lengths = np.linalg.norm(seen.features, axis=1)
    return float(lengths.mean()), float(lengths.std())


LENGTH = Metric(compute=_length, title="length", better="lower", spread="jackknife")


def _row(w: float, *yardsticks: Yardstick, **facts: object) -> Row:
    units = [replace(unit, others={"toy": unit.features[:, :2]}) for unit in _units(150)]
    measured = values(units, LABELS, *yardsticks) | conditions(*yardsticks)
    return Row.of(w=w, n=len(FEATURES), run="x", code_version="x", rounding="r", labels="l", **measured, **facts)


@pytest.fixture
def length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "length", LENGTH)


def test_a_metric_that_was_added_stands_in_rows_json_csv_tables_and_means(length: None) -> None:
    lengths = np.linalg.norm(FEATURES, axis=1)
    mean, std = float(lengths.mean()), float(lengths.std())
    rows = [_row(w, FULL, seed=seed) for w in (0.0, 1.0) for seed in (0, 1)]
    assert (rows[0].value("length"), rows[0].value("length_std")) == (mean, std)
    assert from_json(to_json(rows)) == rows
    assert json.loads(to_json(rows))["rows"][0]["length"] == mean
    files = report_files(rows, {}, title="x", varying=["seed"])
    header, first, *_ = files["report.csv"].decode().splitlines()
    assert header.endswith(",code_version,length,length_std")
    assert first.endswith(f",x,{mean},{std}")
    table = files["table.md"].decode()
    assert f"| {mean:.2f} ± {std:.2g} |" in table
    assert "± after FID-toy, sFID, length, KID × 1000: standard deviation over sets" in table
    assert "length ↓" in table
    assert over_seeds(rows)[0].values["length"].mean == pytest.approx(mean)


def test_a_row_without_it_has_no_value_and_one_with_it_needs_a_reader_that_knows_it(
    length: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ROW.value("length") is None
    assert ROW.value("toy_reference") is None
    text = to_json([_row(0.0, FULL)])
    with pytest.raises(DataError, match="length of the row w = 0 of run 'x' is nan"):
        Row.of(**_row(0.0, FULL).to_dict() | {"length": float("nan")})
    monkeypatch.delitem(METRICS, "length")
    with pytest.raises(DataError, match=r"mine does not hold metric rows \('length'\)"):
        from_json(text, "mine")
    with pytest.raises(TypeError, match="no row has length"):
        Row.of(**ROW.to_dict(), length=1.0)


def test_a_metric_whose_needs_are_not_met_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METRICS, "length", replace(LENGTH, needs=("real features",)))
    assert "length" in values(_units(), LABELS, FULL)
    assert "length" not in values(_units(), LABELS, BARE)


def test_a_metric_of_another_extractor_is_one_with_a_role(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ROLES, "toy", Role("projection", "Projection", "length"))
    monkeypatch.setitem(METRICS, "length", replace(LENGTH, role="toy"))
    beside = Yardstick(Judge("projection", "d4" * 32, has_classes=False), FULL.reference, role="toy")
    row = _row(0.0, FULL, beside)
    assert row.value("length") == float(np.linalg.norm(FEATURES[:, :2], axis=1).mean())
    assert (row.value("toy"), row.value("toy_reference")) == ("d4" * 32, FULL.reference.sha256)
    assert from_json(to_json([row])) == [row]
    assert "Projection (d4d4d4d4d4d4) against its reference" in report_files([row], {}, title="x")["table.md"].decode()
    without = _row(1.0, FULL)
    assert (without.value("length"), without.value("toy")) == (None, "")
    with pytest.raises(DataError, match=f"cannot be compared because toy is '{'d4' * 32}' in one and '' in the other"):
        require_comparable([row, without])
    assert {"toy", "toy_reference"} <= set(instrument())
    with pytest.raises(
        DataError, match=r"some units hold no Projection features; measure these images again with evaluate\.toy set"
    ):
        values(_units(), LABELS, FULL, beside)


def test_features_of_roles_survive_npz() -> None:
    one = Measured(FEATURES[:3], others={"toy": FEATURES[:3, :2]})
    back = Measured.from_arrays(one.to_arrays() | {"seconds": 1.0})
    assert list(back.others) == ["toy"]
    assert np.array_equal(back.others["toy"], FEATURES[:3, :2])


def test_every_metric_and_role_that_is_there_has_a_field_as_old_files_do() -> None:
    assert {*value_names(), *role_conditions()} <= set(Row.__dataclass_fields__)


def test_arrows_say_which_direction_is_better() -> None:
    heads = [replace(LENGTH, better=better, arrow=arrow).head("FID") for better in ("lower", "higher") for arrow in (True, False)]
    assert heads == ["length ↓", "length", "length ↑", "length"]
    assert METRICS["fid_infinity"].titled("FID-digits") == "FID-digits ∞"
