"""Work units: how a job is cut, and what is left to do."""

from pathlib import Path

from freeguide.cluster.evaluation import units
from freeguide.cluster.evaluation.units import Unit
from freeguide.data_pipeline.store.open import open_store


def test_a_job_is_cut_the_same_way_in_any_order_of_w() -> None:
    plan = units.split([1.0, 0.0], 25, 10)
    assert plan == [Unit(w, a, b) for w in (0.0, 1.0) for a, b in ((0, 10), (10, 20), (20, 25))]
    assert plan == units.split([0.0, 1.0], 25, 10) == sorted(plan)
    assert len({unit.key("npz") for unit in plan}) == len(plan)
    assert plan[0].key("npz") == "units/w0/000000000-000000010.npz"


def test_more_images_reuse_the_units_there_are(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    for unit in units.split([0.5], 20, 10):
        store.put(unit.key("npz"), b"done")
    assert units.missing(store, units.split([0.5], 40, 10), "npz") == [Unit(0.5, 20, 30), Unit(0.5, 30, 40)]
