"""Work units: how a job is cut, what is left to do, and what happens when actors fail."""

import functools
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster import units
from cluster.session import session
from cluster.units import Unit
from configs.errors import DataError, UserError
from configs.load import load_config
from configs.schema import Config
from data_pipeline.store import Store, open_store

ROOT = Path(__file__).parents[2]


class Count:
    """Publishes its unit. Dies once, without a word, at each unit whose `first` is in `deaths`; refuses those in `refusals`."""

    def __init__(self, store: Store, deaths: tuple[int, ...], refusals: tuple[int, ...]) -> None:
        self.store, self.deaths, self.refusals = store, deaths, refusals

    def __call__(self, unit: Unit) -> None:
        if unit.first in self.deaths and not self.store.exists(f"died/{unit.first}"):
            self.store.put(f"died/{unit.first}", b"")
            os._exit(1)
        if unit.first in self.refusals:
            raise DataError(f"unit {unit.first} is refused; leave it out.")
        tries = f"made/{unit.w:g}-{unit.first}-{os.getpid()}"
        self.store.put(tries, b"")
        self.store.put(unit.key("npz"), b"done")


def in_a_driver(config: Config, plan: list[Unit], make: Callable[[], Count]) -> list[Unit]:
    """`units.run` in a process of its own: what Ray leaves behind in a driver ends that process when the cluster goes."""

    def drive() -> None:
        try:
            with session(config, 2) as resources:
                answer.put(list(units.run(plan, make, config, resources)))
        except UserError as error:
            answer.put(error)

    context = multiprocessing.get_context("fork")
    answer: multiprocessing.Queue[list[Unit] | UserError] = context.Queue()
    driver = context.Process(target=drive)
    driver.start()
    got = answer.get(timeout=200)
    driver.join(timeout=60)
    if isinstance(got, UserError):
        raise got
    return got


@pytest.fixture
def config() -> Config:
    return load_config(ROOT / "configs" / "digits.yaml", ["cluster.actors=2"])


@pytest.fixture
def on_cluster(ray_head: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", ray_head[0])


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


def test_units_survive_the_death_of_their_actors_and_are_published_once(on_cluster: None, config: Config, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    plan = units.split([0.0, 1.0], 40, 10)
    done = in_a_driver(config, plan, functools.partial(Count, store, (10, 30), ()))
    assert sorted(done) == plan
    assert units.missing(store, plan, "npz") == []
    assert {info.key for info in store.list("died/")} == {"died/10", "died/30"}
    assert len(store.list("made/")) == len(plan)


def test_an_actors_error_reaches_the_user_as_its_own_sentence(on_cluster: None, config: Config, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    with pytest.raises(UserError, match=r"^unit 20 is refused; leave it out\.$"):
        in_a_driver(config, units.split([0.0], 40, 10), functools.partial(Count, store, (), (20,)))


def test_the_code_version_follows_the_sources_that_decide_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = units.code_version()
    for place in units._DECISIVE:
        target = tmp_path / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("") if place.endswith(".py") else target.mkdir()
    monkeypatch.setattr(units, "ROOT", tmp_path)
    units.code_version.cache_clear()
    changed = units.code_version()
    assert changed != before
    assert changed.split("+")[0] == before.split("+")[0]
    monkeypatch.undo()
    units.code_version.cache_clear()
    assert units.code_version() == before
