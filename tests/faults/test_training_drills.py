"""Drills: what is done to a training, and that it ends with the weights of the training to which nothing was done.

Each drill prints how long it took until the training made steps again.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from configs.load import load_config
from data_pipeline.shards import write_shards
from data_pipeline.sources import digits
from data_pipeline.store import create_bucket, open_store
from trainer import checkpoint
from trainer.engine import KINDS
from trainer.failures import HUNG, TERMINATED

ROOT = Path(__file__).parents[2]
STEPS, EVERY, BATCH = 120, 20, 12
Ranks = list["subprocess.Popen[bytes]"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """config(name, **train options) -> the file of a config that trains a very small network on digits."""
    data = str(tmp_path_factory.mktemp("digits"))
    write_shards(digits(), open_store(data), shard_samples=600)

    def make(name: str, **train: object) -> Path:
        folder = tmp_path_factory.mktemp(name)
        options = {"steps": STEPS, "global_batch": BATCH, "lr": 1e-3, "zero_stage": 2, "checkpoint_every": EVERY, "log_every": 5}
        content = {
            "name": name,
            "run": str(folder / "run"),
            "data": {"uri": data, "image_size": 8, "channels": 1, "classes": 10},
            "model": {"channels": 16, "channel_mult": [1, 2], "res_blocks": 1, "attention": [4], "head_channels": 16},
            "train": options | train,
            "sampling": {"steps": 2},
            "cluster": {"workers": 2},
        }
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(content))
        return path

    return make


@pytest.fixture
def start() -> Iterator[Callable[..., Ranks]]:
    """start(config, world_size, script=...) starts `python -m trainer` on each rank; whatever is left is killed in the end."""
    started: Ranks = []

    def run(path: Path, world_size: int = 2, script: tuple[str, ...] = ("-m", "trainer"), **environment: str) -> Ranks:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        shared = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
        shared |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
        ranks = []
        for rank in range(world_size):
            with open(path.parent / f"rank{rank}.log", "ab") as log:
                ranks.append(
                    subprocess.Popen(
                        [sys.executable, *script, str(path)],
                        env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                        stdout=log,
                        stderr=log,
                        cwd=ROOT,
                    )
                )
        started.extend(ranks)
        return ranks

    yield run
    for process in started:
        process.kill()
        process.wait()


def ended(ranks: Ranks) -> list[int]:
    return [rank.wait(timeout=200) for rank in ranks]


def output(path: Path, rank: int = 0) -> str:
    return (path.parent / f"rank{rank}.log").read_text()


def saved(path: Path) -> list[int]:
    return checkpoint.describe(open_store(load_config(path).run))["checkpoints"]  # type: ignore[no-any-return]


def wait_for(condition: Callable[[], object], ranks: Ranks = ()) -> float:  # type: ignore[assignment]
    """Seconds until `condition` holds; a rank that ends before it fails the drill."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < 200
        assert all(rank.poll() is None for rank in ranks), "a rank ended by itself"
        time.sleep(0.01)
    return time.monotonic() - began


def state(path: Path, step: int = 0) -> dict[str, Tensor]:
    store = open_store(load_config(path).run)
    found = checkpoint.find(store, step)
    return {f"{kind} {n}": v for kind in (*KINDS, *found.averages) for n, v in checkpoint.load(store, found, kind).items()}


def losses(path: Path) -> dict[int, float]:
    """The logged loss of every step; what a resumed run has written wins."""
    seen: dict[int, float] = {}
    for file in sorted((Path(load_config(path).run) / "events").iterdir(), key=lambda p: p.stat().st_mtime_ns):
        log = EventAccumulator(str(file), size_guidance={"scalars": 0})
        log.Reload()
        seen |= {event.step: event.value for event in log.Scalars("train/loss")}
    return seen


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def test_kill_9_and_sigterm_leave_the_weights_of_the_undisturbed_run(
    config: Callable[..., Path], start: Callable[..., Ranks], capsys: pytest.CaptureFixture[str]
) -> None:
    path, undisturbed = config("disturbed"), config("undisturbed")
    calm = start(undisturbed)
    assert ended(calm) == [0, 0], output(undisturbed)

    ranks = start(path)
    wait_for(lambda: EVERY in saved(path), ranks)
    ranks[1].send_signal(signal.SIGTERM)  # one rank hears it, all leave at the same step
    assert ended(ranks) == [TERMINATED, TERMINATED], output(path)
    (stopped,) = [
        int(line.split("saved at step ")[1].split(";")[0]) for line in output(path).splitlines() if "asked to end" in line
    ]
    assert stopped in saved(path)

    ranks = start(path)
    began = time.monotonic()
    wait_for(lambda: f"resuming from step {stopped} " in output(path), ranks)
    recovery = time.monotonic() - began
    target = (stopped // EVERY + 1) * EVERY
    wait_for(lambda: target in saved(path), ranks)
    ranks[0].kill()
    codes = ended(ranks)
    assert codes[0] == -signal.SIGKILL
    assert codes[1] != 0, "a rank went on alone"

    assert ended(start(path)) == [0, 0], output(path)
    assert output(path).count("resuming from step") == 2
    assert_same_bits(state(undisturbed), state(path))
    with capsys.disabled():
        print(
            f"\n  SIGTERM: saved at step {stopped}; stepping again {recovery:.1f} s after the next start (start of Python included)"
        )


def test_a_rank_that_hangs_ends_and_so_does_the_rank_that_waits_for_it(
    config: Callable[..., Path], start: Callable[..., Ranks], capsys: pytest.CaptureFixture[str]
) -> None:
    path = config("hang", steps=100_000, watchdog_seconds=3)
    ranks = start(path)
    wait_for(lambda: EVERY in saved(path), ranks)
    ranks[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert ranks[0].wait(timeout=60) != 0
    waited = time.monotonic() - began
    ranks[1].send_signal(signal.SIGCONT)
    assert ranks[1].wait(timeout=60) != 0
    assert waited < 3 * 3
    assert saved(path)
    with capsys.disabled():
        print(
            f"\n  hang: the rank that waits ended after {waited:.1f} s (watchdog 3 s), exit codes {[r.returncode for r in ranks]}"
        )


@pytest.mark.slow
def test_a_rank_that_hangs_alone_is_ended_by_its_watchdog(config: Callable[..., Path], start: Callable[..., Ranks]) -> None:
    path = config("alone", steps=100_000, watchdog_seconds=2)
    (rank,) = start(path, world_size=1)
    wait_for(lambda: EVERY in saved(path), [rank])
    rank.send_signal(signal.SIGSTOP)
    time.sleep(3)
    rank.send_signal(signal.SIGCONT)
    assert rank.wait(timeout=60) == HUNG, output(path)
    assert output(path).splitlines()[-1].startswith("freeguide: rank 0: no progress for 2 s after step ")


def test_a_batch_that_is_not_a_number_moves_nothing_is_named_and_counts_under_a_budget(
    config: Callable[..., Path], start: Callable[..., Ranks]
) -> None:
    positions = [2 * BATCH + 1, 4 * BATCH]  # of the steps 3 and 5, on rank 0
    train = {"checkpoint_every": 1, "keep_checkpoints": 9, "log_every": 1, "bad_steps": 1}
    paths = {s: config(f"nan{s}", zero_stage=s, precision="bf16" if s else "fp32", steps=4, **train) for s in (0, 2, 3)}
    over = config("over", steps=9, **train)
    script = (str(Path(__file__).parent / "poisoned.py"), *map(str, paths.values()))
    ranks = start(over, script=script, POISON=",".join(map(str, positions)))
    assert ended(ranks) == [1, 1], output(over)
    for stage, path in paths.items():
        before, after, end = state(path, 2), state(path, 3), state(path, 4)
        moved = {name.split()[0] for name in before if not torch.equal(before[name], after[name])}
        assert moved == {"ema"}, stage  # the average goes on towards the weights, which stand still
        assert all(torch.isfinite(values).all() for values in end.values()), stage
        assert not torch.equal(after["master out_conv.weight"], end["master out_conv.weight"]), stage
        store = open_store(load_config(path).run)
        assert checkpoint.find(store).bad_steps == [3], stage
        (row,) = [json.loads(line) for line in store.get("incidents.jsonl").decode().splitlines()]
        assert (row["step"], row["what"]) == (3, "not finite")
        assert (row["samples"][0]["index"], row["samples"][0]["loss"]) == (positions[0], "nan")
    (sentence,) = [line for line in output(over).splitlines() if line.startswith("freeguide: error: ")]
    assert "the gradients of 2 steps were not finite (the last of them 5), more than train.bad_steps=1" in sentence


# --- under Ray ---


def ray_train(path: Path, **environment: str) -> "subprocess.Popen[bytes]":
    environment = os.environ | {"RAY_ADDRESS": "local", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    with open(path.parent / "rank0.log", "ab") as log:
        command = [sys.executable, "-m", "cluster", "train", str(path)]
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=ROOT)


def ray_workers(driver: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    children = psutil.Process(driver.pid).children(recursive=True)
    return [child for child in children if child.is_running() and "TrainWorker" in " ".join(child.cmdline())]


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["worker", "driver"])
def test_a_kill_under_ray_leaves_the_weights_of_the_undisturbed_run(
    config: Callable[..., Path], victim: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, undisturbed = config(f"ray-{victim}", steps=300), config("undisturbed", steps=300)
    assert ray_train(undisturbed).wait(timeout=250) == 0, output(undisturbed)
    driver = ray_train(path)
    try:
        wait_for(lambda: EVERY in saved(path), [driver])
        began = time.monotonic()
        if victim == "worker":
            ray_workers(driver)[1].kill()
        else:
            driver.kill()
            driver.wait()
            driver = ray_train(path)
        wait_for(lambda: "resuming from step" in output(path), [driver])
        recovery = time.monotonic() - began
        assert driver.wait(timeout=250) == 0, output(path)
    finally:
        driver.kill()
    assert_same_bits(state(undisturbed), state(path))
    with capsys.disabled():
        print(f"\n  SIGKILL of the {victim} under Ray: resumed after {recovery:.1f} s")


@pytest.mark.slow
def test_what_a_user_has_to_mend_is_not_tried_again_under_ray(config: Callable[..., Path]) -> None:
    path = config("mend")
    data = Path(load_config(path).data.uri)
    copy = path.parent / "data"
    shutil.copytree(data, copy)
    for shard in copy.rglob("*.tar"):
        shard.write_bytes(bytes(len(shard.read_bytes())))
    path.write_text(path.read_text().replace(str(data), str(copy)))
    driver = ray_train(path)
    assert driver.wait(timeout=250) == 2, output(path)
    assert output(path).count("starting at step 0") == 1
    assert output(path).splitlines()[-1].startswith("freeguide: error: ")


@pytest.mark.slow
def test_training_goes_on_with_fewer_workers_when_a_node_is_lost(
    config: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from ray.cluster_utils import Cluster

    path, undisturbed = config("elastic", steps=200, precision="fp32"), config("undisturbed", steps=200, precision="fp32")
    path.write_text(path.read_text().replace("workers: 2", "workers: 2\n  min_workers: 1"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    node = cluster.add_node(num_cpus=1)
    driver = ray_train(path, RAY_ADDRESS=cluster.address, RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S="20")
    try:
        wait_for(lambda: EVERY in saved(path), [driver])
        assert checkpoint.describe(open_store(load_config(path).run))["world_size"] == 2
        began = time.monotonic()
        cluster.remove_node(node, allow_graceful=False)
        wait_for(lambda: "resuming from step" in output(path), [driver])
        recovery = time.monotonic() - began
        assert driver.wait(timeout=280) == 0, output(path)
    finally:
        driver.kill()
        cluster.shutdown()
    assert checkpoint.describe(open_store(load_config(path).run))["world_size"] == 1
    assert ray_train(undisturbed).wait(timeout=280) == 0
    (line,) = [line for line in output(path).splitlines() if "resuming from step" in line]
    resumed = int(line.split("resuming from step ")[1].split()[0])
    calm, fewer = losses(undisturbed), losses(path)
    for step in range(resumed + 1, resumed + 21):
        # Only the order of sums differs; 20 steps let its rounding grow a little beyond the 1e-5 of single steps.
        assert fewer[step] == pytest.approx(calm[step], rel=1e-4), step
    with capsys.disabled():
        print(f"\n  a node lost, elastic 2 -> 1: resumed after {recovery:.1f} s")


@pytest.mark.slow
def test_a_store_that_is_gone_for_a_minute_does_not_end_the_training(
    config: Callable[..., Path], start: Callable[..., Ranks], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    s3 = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    s3["AWS_DEFAULT_REGION"] = "us-east-1"
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    path, undisturbed = config("outage", steps=200), config("undisturbed", steps=200)
    path.write_text(path.read_text().replace(load_config(path).run, "s3://bucket/run"))
    server = subprocess.Popen([sys.executable, "-m", "moto.server", "-p", str(port)], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, [server])
        create_bucket("s3://bucket")
        ranks = start(path)
        wait_for(lambda: EVERY in saved(path), ranks)
        server.send_signal(signal.SIGSTOP)
        time.sleep(60)
        server.send_signal(signal.SIGCONT)
        began = time.monotonic()
        count = len(saved(path)) and max(saved(path))
        wait_for(lambda: max(saved(path)) > count, ranks)
        recovery = time.monotonic() - began
        assert ended(ranks) == [0, 0], output(path)
        assert "resuming" not in output(path)
        end = state(path)
    finally:
        server.kill()
    assert ended(start(undisturbed)) == [0, 0]
    assert_same_bits(state(undisturbed), end)
    with capsys.disabled():
        print(f"\n  store gone for 60 s: the next checkpoint was whole {recovery:.1f} s after it came back")
