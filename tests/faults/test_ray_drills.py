"""Drills under Ray: workers, drivers and nodes are killed, or asked to end, and the training ends with the weights it should have.

Each drill prints how long it took until the training made steps again. Nodes are raylets of their own on this machine.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.cluster_utils import Cluster

from freeguide.configs.load import load_config
from freeguide.data_pipeline.store.open import open_store
from freeguide.trainer.checkpoints import search
from freeguide.trainer.training.failures import TERMINATED
from tests.faults.conftest import EVERY, PATIENCE, ROOT, Ranks, ended, output, saved, wait_for
from tests.runs import assert_same_bits, losses, state

pytestmark = pytest.mark.slow


def ray_train(path: Path, **environment: str) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    with open(path.parent / "rank0.log", "ab") as log:
        command = [sys.executable, "-m", "cluster", "train", str(path)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT)


def ray_workers(driver: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    children = psutil.Process(driver.pid).children(recursive=True)
    return [child for child in children if child.is_running() and "TrainWorker" in " ".join(child.cmdline())]


def said(path: Path, words: str) -> list[int]:
    """The steps in all lines "<words>STEP..." that the training has printed, each once: several nodes here bring the same logs."""
    lines = [line.split(words)[1] for line in output(path).splitlines() if words in line]
    return list(dict.fromkeys(int(line.split()[0].rstrip(";")) for line in lines))


def resumed(path: Path) -> list[int]:
    return said(path, "resuming from step ")


def left(path: Path) -> list[int]:
    return said(path, "asked to end: saved at step ")


def world_size(path: Path) -> int:
    return int(search.find(open_store(load_config(path).run)).world_size)


@pytest.mark.parametrize("victim", ["worker", "driver"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_signal_leaves_the_weights_of_the_undisturbed_run(
    config: Callable[..., Path],
    start: Callable[..., Ranks],
    victim: str,
    number: signal.Signals,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path, undisturbed = config(f"ray-{victim}", steps=300), config("undisturbed", steps=300)
    driver = ray_train(path)
    try:
        wait_for(lambda: saved(path), [driver])
        began = time.monotonic()
        if victim == "worker":
            ray_workers(driver)[1].send_signal(number)
        else:
            driver.send_signal(number)
            assert driver.wait(timeout=PATIENCE) == (TERMINATED if number == signal.SIGTERM else -signal.SIGKILL), output(path)
            driver = ray_train(path)
        wait_for(lambda: resumed(path), [driver])
        recovery = time.monotonic() - began
        assert driver.wait(timeout=PATIENCE) == 0, output(path)
    finally:
        driver.kill()
    assert left(path) == (resumed(path) if number == signal.SIGTERM else [])  # saved where it stood, and nothing done twice
    assert ended(start(undisturbed)) == [0, 0]  # without Ray
    assert_same_bits(state(undisturbed), state(path))
    with capsys.disabled():
        print(f"\n  {number.name} of the {victim} under Ray: resumed after {recovery:.1f} s")


def test_a_worker_that_hangs_is_given_up_and_the_group_goes_on(
    config: Callable[..., Path], start: Callable[..., Ranks], capsys: pytest.CaptureFixture[str]
) -> None:
    path, undisturbed = config("ray-hang", steps=300, watchdog_seconds=10), config("undisturbed", steps=300)
    driver = ray_train(path)
    try:
        wait_for(lambda: saved(path), [driver])
        ray_workers(driver)[1].send_signal(signal.SIGSTOP)  # as in a system call that never returns: it cannot even end itself
        recovery = wait_for(lambda: resumed(path), [driver])
        assert driver.wait(timeout=PATIENCE) == 0, output(path)
    finally:
        driver.kill()
    assert ended(start(undisturbed)) == [0, 0]
    assert_same_bits(state(undisturbed), state(path))
    with capsys.disabled():
        print(f"\n  a worker hangs under Ray: resumed after {recovery:.1f} s (watchdog 10 s)")


def test_what_a_user_has_to_mend_is_not_tried_again(config: Callable[..., Path]) -> None:
    path = config("mend")
    data = Path(load_config(path).data.uri)
    copy = path.parent / "data"
    shutil.copytree(data, copy)
    for shard in copy.rglob("*.tar"):
        shard.write_bytes(bytes(len(shard.read_bytes())))
    path.write_text(path.read_text().replace(str(data), str(copy)))
    driver = ray_train(path)
    assert driver.wait(timeout=PATIENCE) == 2, output(path)
    assert output(path).count("starting at step 0") == 1
    assert output(path).splitlines()[-1].startswith("freeguide: error: ")


# --- nodes ---


@pytest.fixture
def nodes() -> Iterator[Cluster]:
    """A cluster whose head has room for one worker."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield cluster
    cluster.shutdown()


@contextmanager
def node_with_notice(nodes: Cluster) -> Iterator["subprocess.Popen[bytes]"]:
    """A node as Kubernetes starts it, `ray start --block`: SIGTERM is its notice."""
    command = [str(Path(sys.executable).parent / "ray"), "start", f"--address={nodes.address}", "--num-cpus=1", "--block"]
    process = subprocess.Popen([*command, "--disable-usage-stats"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        for child in [*psutil.Process(process.pid).children(recursive=True)] if process.poll() is None else []:
            child.kill()
        process.kill()
        process.wait()


def ray_train_on(nodes: Cluster, path: Path) -> "subprocess.Popen[bytes]":
    return ray_train(path, RAY_ADDRESS=nodes.address, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="20")


def test_at_a_fixed_size_a_node_that_goes_with_or_without_notice_is_waited_for(
    config: Callable[..., Path], start: Callable[..., Ranks], nodes: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    path, undisturbed = config("nodes", steps=600), config("undisturbed", steps=600)
    times = []
    with node_with_notice(nodes) as first:
        driver = ray_train_on(nodes, path)
        try:
            wait_for(lambda: saved(path), [driver])
            first.send_signal(signal.SIGTERM)
            times.append(wait_for(lambda: left(path), [driver]))
            second: Any = nodes.add_node(num_cpus=1)
            times.append(wait_for(lambda: len(resumed(path)) == 1, [driver]))
            assert resumed(path) == left(path)
            wait_for(lambda: max(saved(path), default=0) >= resumed(path)[0] + EVERY, [driver])
            nodes.remove_node(second, allow_graceful=False)
            nodes.add_node(num_cpus=1)
            times.append(wait_for(lambda: len(resumed(path)) == 2, [driver]))
            assert driver.wait(timeout=PATIENCE) == 0, output(path)
        finally:
            driver.kill()
    assert world_size(path) == 2
    assert ended(start(undisturbed)) == [0, 0]
    assert_same_bits(state(undisturbed), state(path))
    with capsys.disabled():
        print("\n  SIGTERM of a node: saved {:.1f} s after it, resumed {:.1f} s after another joined".format(*times[:2]))
        print(f"  a node lost at a fixed size: resumed {times[2]:.1f} s after, another joined at once")


def test_an_elastic_training_goes_on_with_fewer_workers_and_takes_a_new_node_in(
    config: Callable[..., Path], start: Callable[..., Ranks], nodes: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"steps": 100_000, "precision": "fp32", "checkpoint_every": 100, "keep_checkpoints": 10_000}
    path = config("elastic", **train)
    path.write_text(path.read_text().replace("workers: 2", "workers: 2\n  min_workers: 1"))
    node = nodes.add_node(num_cpus=1)
    driver = ray_train_on(nodes, path)
    try:
        wait_for(lambda: saved(path), [driver])
        nodes.remove_node(node, allow_graceful=False)
        lost = wait_for(lambda: len(resumed(path)) == 1, [driver])
        fewer = resumed(path)[0]
        wait_for(lambda: max(saved(path), default=0) > fewer, [driver])
        assert world_size(path) == 1
        nodes.add_node(num_cpus=1)
        grown = wait_for(lambda: len(resumed(path)) == 2, [driver])
        more = resumed(path)[1]
        assert left(path) == [more]  # a resize loses no step
        wait_for(lambda: max(saved(path), default=0) > more, [driver])
        assert world_size(path) == 2
        driver.send_signal(signal.SIGTERM)
        assert driver.wait(timeout=PATIENCE) == TERMINATED, output(path)
    finally:
        driver.kill()
    seen = losses(path)
    for step, old_size in ((fewer, 2), (more, 1)):
        branch = config(f"branch{step}", **train | {"steps": step + 5})
        folder = Path(load_config(path).run) / f"checkpoints/step-{step:08d}"
        shutil.copytree(folder, Path(load_config(branch).run) / "checkpoints" / folder.name)
        assert ended(start(branch, world_size=old_size)) == [0] * old_size
        # As if the size had not changed: only the order of sums differs, for five steps.
        for at, loss in losses(branch).items():
            assert seen[at] == pytest.approx(loss, rel=1e-5), at
    with capsys.disabled():
        print(f"\n  a node lost, elastic 2 -> 1: resumed after {lost:.1f} s; a node joined, 1 -> 2: resumed after {grown:.1f} s")
