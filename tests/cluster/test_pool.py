"""The pool of actors: what happens when they fail."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ray.cluster_utils import Cluster

from freeguide.cluster.evaluation import units
from freeguide.cluster.evaluation.executor import Resources, Worker
from freeguide.cluster.evaluation.units import Unit
from freeguide.cluster.runtime import pool
from freeguide.configs.errors import DataError, UserError
from freeguide.data_pipeline.store.base import Store
from freeguide.data_pipeline.store.open import open_store

ROOT = Path(__file__).parents[2]
ONCE = SimpleNamespace(begin=SimpleNamespace(remote=lambda number: 1))  # no unit was begun before


def drive(
    address: str, store: Store, weights: list[float], deaths: list[int], refusals: list[int]
) -> "subprocess.CompletedProcess[str]":
    """`pool.run` over 40 images in units of 10, two actors, in a process of its own."""
    lists = [json.dumps(numbers) for numbers in (weights, deaths, refusals)]
    return subprocess.run(
        [sys.executable, str(Path(__file__).with_name("drive_pool.py")), str(store.uri), "40", *lists, "0"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_units_survive_the_death_of_their_actors_and_are_published_once(ray_head: tuple[str, str], tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    plan = units.split([0.0, 1.0], 40, 10)
    driver = drive(ray_head[0], store, [0.0, 1.0], [10, 30], [])
    assert driver.returncode == 0, driver.stdout + driver.stderr
    assert json.loads(driver.stdout.splitlines()[-1]) == [[u.w, u.first, u.last] for u in plan]
    assert units.missing(store, plan, "npz") == []
    assert {info.key for info in store.list("died/")} == {"died/10", "died/30"}
    made = {info.key.rsplit("-", 1)[0] for info in store.list("made/")}  # without the process: Ray may lose more actors under load
    assert made == {f"made/{unit.w:g}-{unit.first}" for unit in plan}


def test_an_actors_error_reaches_the_user_as_its_own_sentence(ray_head: tuple[str, str], tmp_path: Path) -> None:
    driver = drive(ray_head[0], open_store(str(tmp_path)), [0.0], [], [20])
    assert driver.returncode == 2, driver.stdout + driver.stderr
    assert driver.stdout.splitlines()[-1] == "unit 20 is refused; leave it out"


@pytest.mark.slow
def test_a_unit_that_ends_every_actor_ends_the_job_with_a_sentence(ray_head: tuple[str, str], tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    driver = drive(ray_head[0], store, [0.0], [-20], [])
    assert driver.returncode == 2, driver.stdout + driver.stderr
    sentence = f"Unit(w=0.0, first=20, last=30) was begun {pool.DEATHS} times, and each time its actor died"
    assert sentence in driver.stdout.splitlines()[-1]
    assert len(store.list("died/")) == pool.DEATHS


@pytest.mark.parametrize("error", ["", "unit 1 is refused; leave it out"])
def test_no_thread_that_holds_references_outlives_a_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: str) -> None:
    """One that lets go of them after `ray.shutdown` ends the process: another exit code, and no sentence."""
    left, holders = threading.Event(), []

    def iter_rows() -> Iterator[dict[str, Any]]:
        def hold() -> None:
            left.wait()
            time.sleep(0.2)  # Ray Data's wake up within 0.1 s

        holders.append(threading.Thread(target=hold, daemon=True))
        holders[0].start()
        try:
            for unit in range(3):
                yield {"item": unit, "error": error if unit == 1 else ""}
        finally:
            left.set()

    dataset = SimpleNamespace(map=lambda *_, **__: SimpleNamespace(iter_rows=iter_rows))
    monkeypatch.setattr(pool.ray.data, "from_items", lambda *_, **__: dataset)
    monkeypatch.setattr(pool.ray, "put", lambda job: job)
    monkeypatch.setattr(pool, "_Begun", SimpleNamespace(remote=lambda: None))
    with pytest.raises(UserError, match="refused") if error else contextlib.nullcontext():
        assert list(pool.run([10, 11, 12], lambda _: print, 1, Resources(1, 0))) == [10, 11, 12]
    assert left.is_set()
    assert not holders[0].is_alive()


def test_a_gpu_that_is_too_small_is_told_what_to_lower(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(unit: Unit) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80 GiB")

    monkeypatch.setattr(pool.ray, "get", lambda job: job)
    found = pool._Actor((lambda: work, [Unit(0.0, 0, 1)], ONCE))({"item": 0})
    assert found["error"] == "the GPU's memory is too small for a work unit (CUDA out of memory); lower sampling.batch"


def test_what_an_actor_cannot_load_reaches_the_user_as_a_sentence_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Worker[Unit]:
        raise DataError("weights are not on this node")

    monkeypatch.setattr(pool.ray, "get", lambda job: job)
    assert pool._Actor((make, [Unit(0.0, 0, 1)], ONCE))({"item": 0}) == {"item": 0, "error": "weights are not on this node"}


@pytest.mark.slow
def test_the_pool_grows_when_a_node_joins_and_goes_on_when_one_is_lost(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))

    def makers() -> set[str]:
        return {info.key.rsplit("-", 1)[1] for info in store.list("made/")}

    def wait_for(what: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not what():
            assert driver.poll() is None, driver.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})  # room for one of the two actors
    try:
        driver = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("drive_pool.py")), str(store.uri), "600", "[0.5]", "[]", "[]", "1"],
            env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": cluster.address},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        wait_for(lambda: len(store.list("made/")) >= 3)
        assert len(makers()) == 1
        node = cluster.add_node(num_cpus=1)
        wait_for(lambda: len(makers()) == 2)
        cluster.remove_node(node, allow_graceful=False)
        printed, _ = driver.communicate(timeout=240)
    finally:
        cluster.shutdown()
    assert driver.returncode == 0, printed
    assert units.missing(store, units.split([0.5], 600, 10), "npz") == []
    assert len(store.list("made/")) <= 60 + 1  # the lost node may have published the unit in hand
