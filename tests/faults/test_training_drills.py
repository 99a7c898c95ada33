"""Drills: what is done to a training, and that it ends with the weights of the training to which nothing was done.

Each drill prints how long it took until the training made steps again. Those under Ray are in test_ray_drills.py.
"""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from freeguide.configs.load import load_config
from freeguide.data_pipeline.store.open import create_bucket, open_store
from freeguide.trainer.checkpoints import search
from freeguide.trainer.checkpoints.manifest import Checkpoint
from freeguide.trainer.training.engine import _import_deepspeed
from freeguide.trainer.training.failures import HUNG, SPIKE, TERMINATED
from tests.faults.conftest import BATCH, EVERY, PATIENCE, ROOT, Ranks, ended, output, saved, wait_for
from tests.runs import assert_same_bits, losses, state


def test_kill_9_and_sigterm_leave_the_weights_of_the_undisturbed_run(
    config: Callable[..., Path], start: Callable[..., Ranks], capsys: pytest.CaptureFixture[str]
) -> None:
    train = {"steps": 240, "keep_checkpoints": 99}
    path, undisturbed = config("disturbed", **train), config("undisturbed", **train)
    calm = start(undisturbed)
    assert ended(calm) == [0, 0], output(undisturbed)

    ranks = start(path)
    wait_for(lambda: saved(path), ranks)
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
    wait_for(lambda: max(saved(path), default=0) > stopped, ranks)
    ranks[0].kill()  # long before it would send its scalars by the clock
    codes = ended(ranks)
    assert codes[0] == -signal.SIGKILL
    assert codes[1] != 0, "a rank went on alone"

    assert ended(start(path)) == [0, 0], output(path)
    assert output(path).count("resuming from step") == 2
    assert_same_bits(state(undisturbed), state(path))
    assert losses(undisturbed) == losses(path)
    with capsys.disabled():
        print(
            f"\n  SIGTERM: saved at step {stopped}; stepping again {recovery:.1f} s after the next start (start of Python included)"
        )


def test_a_rank_that_hangs_ends_and_so_does_the_rank_that_waits_for_it(
    config: Callable[..., Path], start: Callable[..., Ranks], capsys: pytest.CaptureFixture[str]
) -> None:
    path = config("hang", steps=100_000, watchdog_seconds=15)
    ranks = start(path)
    wait_for(lambda: saved(path), ranks)
    ranks[1].send_signal(signal.SIGSTOP)
    began = time.monotonic()
    assert ranks[0].wait(timeout=PATIENCE) != 0
    waited = time.monotonic() - began
    ranks[1].send_signal(signal.SIGCONT)
    assert ranks[1].wait(timeout=PATIENCE) != 0
    assert saved(path)
    with capsys.disabled():
        print(
            f"\n  hang: the rank that waits ended after {waited:.1f} s (watchdog 15 s), exit codes {[r.returncode for r in ranks]}"
        )


@pytest.mark.slow
def test_a_rank_that_hangs_alone_is_ended_by_its_watchdog(config: Callable[..., Path], start: Callable[..., Ranks]) -> None:
    path = config("alone", steps=100_000, watchdog_seconds=15)  # a busy machine may stop it for seconds
    (rank,) = start(path, world_size=1)
    wait_for(lambda: saved(path), [rank])
    rank.send_signal(signal.SIGSTOP)
    time.sleep(16)
    rank.send_signal(signal.SIGCONT)
    assert rank.wait(timeout=60) == HUNG, output(path)
    assert output(path).splitlines()[-1].startswith("freeguide: rank 0: no progress for 15 s after step ")


@pytest.mark.slow
def test_torchrun_restarts_a_worker_that_dies_and_passes_on_its_notice(
    config: Callable[..., Path], start: Callable[..., Ranks], capsys: pytest.CaptureFixture[str]
) -> None:
    path, undisturbed = config("torchrun", steps=300), config("undisturbed", steps=300)

    def torchrun() -> "subprocess.Popen[bytes]":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with open(path.parent / "rank0.log", "ab") as log:
            return subprocess.Popen([*command, "-m", "trainer", str(path)], env=environment, stdout=log, stderr=log, cwd=ROOT)

    agent = torchrun()
    try:
        wait_for(lambda: saved(path), [agent])
        psutil.Process(agent.pid).children()[1].kill()
        recovery = wait_for(lambda: "resuming from step" in output(path), [agent])
        target = max(saved(path), default=0) + EVERY
        wait_for(lambda: max(saved(path), default=0) >= target, [agent])
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(timeout=PATIENCE) != 0
        (stopped,) = [line.split("saved at step ")[1].split(";")[0] for line in output(path).splitlines() if "asked to end" in line]
        assert int(stopped) in saved(path)
        agent = torchrun()
        assert agent.wait(timeout=PATIENCE) == 0, output(path)
    finally:
        agent.kill()
    assert f"resuming from step {stopped} " in output(path)
    assert ended(start(undisturbed)) == [0, 0]
    assert_same_bits(state(undisturbed), state(path))
    with capsys.disabled():
        print(f"\n  SIGKILL of a worker under torchrun: resumed after {recovery:.1f} s")


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
        wait_for(lambda: saved(path), ranks)
        server.send_signal(signal.SIGSTOP)
        time.sleep(60)
        server.send_signal(signal.SIGCONT)
        began = time.monotonic()
        count = max(saved(path), default=0)
        wait_for(lambda: max(saved(path), default=0) > count, ranks)
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


@pytest.mark.slow
def test_a_disk_that_is_full_ends_the_run_with_one_sentence_and_with_room_again_it_goes_on(
    config: Callable[..., Path], start: Callable[..., Ranks], tmp_path: Path
) -> None:
    path, undisturbed = config("full"), config("undisturbed")
    run, disk = load_config(path).run, str(tmp_path / "disk")
    os.mkdir(disk)
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a disk that is too small")
    try:
        path.write_text(path.read_text().replace(run, f"{disk}/run"))
        ranks = start(path)
        wait_for(lambda: saved(path), ranks)
        used = shutil.disk_usage(disk).used
        subprocess.run(["mount", "-o", f"remount,size={used // 1024 + 64}k", disk], check=True)
        assert ended(ranks) == [2, 2], output(path)
        said = [line for line in output(path).splitlines() if line.startswith("freeguide: error: ")]
        assert len(said) == 1, output(path)
        assert "the checkpoint of step 40 could not be saved: " in said[0]
        assert "No space left on device" in said[0]
        assert saved(path) == [EVERY]
        assert shutil.disk_usage(disk).used <= used + 64 * 1024  # no half file stays
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert ended(start(path)) == [0, 0], output(path)
        assert f"resuming from step {EVERY} " in output(path)
        end = state(path)
    finally:
        subprocess.run(["umount", disk], check=True)
    assert ended(start(undisturbed)) == [0, 0]
    assert_same_bits(state(undisturbed), end)


# --- poisoned batches ---


def poison(*steps: int, factor: float = math.nan) -> dict[int, float]:
    """The second sample of each of these steps, which rank 0 trains on: position -> factor of its loss."""
    return {(step - 1) * BATCH + 1: factor for step in steps}


def train_poisoned(
    start: Callable[..., Ranks],
    poisons: dict[Path, dict[int, float]],
    stops: dict[Path, list[int]] | None = None,
    rates: dict[Path, float] | None = None,
) -> tuple[list[int], str]:
    """Train these configs on two ranks, one after the other; returns the exit codes and what rank 0 said.

    In each of the steps `stops` a rank is asked to end, all do a step later, and the run is begun again.
    """
    stops = stops or {}
    *others, last = [path for path in poisons for _ in range(1 + len(stops.get(path, [])))]
    environment = {
        "RATE": json.dumps({str(path): rate for path, rate in (rates or {}).items()}),
        "POISON": json.dumps({str(path): factors for path, factors in poisons.items()}),
        "STOP": json.dumps({str(path): [*poison(*steps)] for path, steps in stops.items()}),
    }
    script = (str(Path(__file__).parent / "poisoned.py"), *map(str, others))
    codes = ended(start(last, script=script, **environment))
    return codes, output(last)


def incidents(path: Path) -> list[dict[str, Any]]:
    lines = open_store(load_config(path).run).get("incidents.jsonl").decode().splitlines()
    return [json.loads(line) for line in lines]


def found(path: Path) -> Checkpoint:
    return search.find(open_store(load_config(path).run))


def test_a_batch_that_is_not_a_number_moves_nothing_and_a_loss_that_jumps_is_named(
    config: Callable[..., Path], start: Callable[..., Ranks]
) -> None:
    train = {"checkpoint_every": 1, "keep_checkpoints": 9, "log_every": 1, "bad_steps": 1}
    paths = {s: config(f"nan{s}", zero_stage=s, precision="bf16" if s else "fp32", steps=4, **train) for s in (0, 2, 3)}
    spike = config("spike", steps=24)
    poisons = {path: poison(3) for path in paths.values()} | {spike: poison(22, factor=100.0)}
    codes, said = train_poisoned(start, poisons)
    assert codes == [0, 0], said
    for stage, path in paths.items():
        before, after, end = state(path, 2), state(path, 3), state(path, 4)
        moved = {name.split()[0] for name in before if not torch.equal(before[name], after[name])}
        assert moved == {"ema"}, stage  # the average goes on towards the weights, which stand still
        assert all(torch.isfinite(values).all() for values in end.values()), stage
        assert not torch.equal(after["master out_conv.weight"], end["master out_conv.weight"]), stage
        assert found(path).bad_steps == [3], stage
        (row,) = incidents(path)
        assert (row["step"], row["what"]) == (3, "not finite")
        assert (row["samples"][0]["index"], row["samples"][0]["loss"]) == (2 * BATCH + 1, "nan")
    (row,) = incidents(spike)
    assert (row["step"], row["what"], row["samples"][0]["index"]) == (22, "spike", 21 * BATCH + 1)
    assert row["loss"] > SPIKE * row["median"]


def test_over_the_budget_of_bad_steps_a_run_goes_back_once_as_if_nothing_had_been_learnt_since(
    config: Callable[..., Path], start: Callable[..., Ranks]
) -> None:
    # Steps 6 and 7 are over a budget of 1, which is seen at step 8: the run goes back to step 4. The other run learns nothing in
    # the steps 5 to 8 in the first place.
    train = {"steps": 12, "checkpoint_every": 4, "log_every": 4, "ema_sigma_rel": [0.1]}
    pairs, poisons = {}, {}
    for s in (2, 3):  # 3 last: DeepSpeed exchanges torch's linear function for it, in the whole process
        options = train | {"zero_stage": s, "precision": "bf16"}
        pairs[s] = back, still = config(f"back{s}", **options, bad_steps=1), config(f"still{s}", **options, bad_steps=4)
        poisons |= {back: poison(6, 7), still: poison(5, 6, 7, 8)}
    # What is saved on notice is not gone back to, and does not let the run go back at another step.
    noticed = config("noticed", **options | {"zero_stage": 2, "log_every": 1}, bad_steps=1)
    poisons = {noticed: poison(6, 7)} | poisons
    again, never = config("again", **train, bad_steps=1), config("never", **train, bad_steps=1)
    codes, said = train_poisoned(start, poisons | {again: poison(6, 7, 10, 11), never: poison(3, 4)}, {noticed: [4, 6]})
    assert codes == [1, 1], said
    for stage, (back, still) in pairs.items():
        assert_same_bits(state(back), state(still))
        assert (found(back).bad_steps, found(back).undone) == ([6, 7], 8), stage
        steps = [(row["step"], row["what"]) for row in incidents(back)]
        assert steps == [(6, "not finite"), (7, "not finite"), (8, "undone")], stage
    assert said.count("asked to end: saved at") == 2
    assert_same_bits(state(noticed), state(pairs[2][0]))
    first, second = (line for line in said.splitlines() if line.startswith("freeguide: error: "))
    assert "the gradients of 2 steps were not finite (the last of them 11), more than train.bad_steps=1, although" in first
    assert "more than train.bad_steps=1, and there is no checkpoint before them to go back to" in second


def test_a_run_whose_weights_have_blown_up_goes_on_as_its_sentence_says_and_not_otherwise(
    config: Callable[..., Path], start: Callable[..., Ranks]
) -> None:
    path = config("blown", lr=1.0, steps=8, log_every=2, checkpoint_every=2, bad_steps=3, precision="fp32")
    lower = path.with_name("lower.yaml")
    lower.write_text(path.read_text().replace("lr: 1.0\n", "lr: 0.001\n"))
    assert load_config(lower).train.lr == 1e-3
    codes, said = train_poisoned(start, {path: {}, lower: {}}, rates={path: 1e30})
    assert codes == [1, 1], said
    first, second = (line for line in said.splitlines() if line.startswith("freeguide: error: "))
    assert "resuming from step 4 of 8" in said
    assert first == second  # a lower rate alone does not help weights that have grown already
    assert "move the checkpoints from step 2 on out of checkpoints/ and lower train.lr" in first
    shutil.rmtree(Path(load_config(path).run) / "checkpoints")
    assert ended(start(lower)) == [0, 0], output(lower)
    assert (found(lower).step, found(lower).bad_steps) == (8, [])


def test_an_fp16_run_goes_on_with_its_loss_scale_and_ends_with_a_sentence_where_nothing_is_left_of_it(
    config: Callable[..., Path], start: Callable[..., Ranks]
) -> None:
    accelerator = _import_deepspeed().accelerator.get_accelerator()
    if not accelerator.is_fp16_supported():  # the question after which DeepSpeed refuses
        pytest.skip(f"DeepSpeed does no fp16 on this {accelerator.device_name()}: it lacks the instructions (on x86, AVX512-FP16)")
    # An infinite gradient is an overflow to DeepSpeed: the first uses up its patience (hysteresis), each other halves the scale.
    train = {"precision": "fp16", "steps": 5, "log_every": 2}
    pairs, poisons = {}, {}
    for stage in (2, 3):  # stage 1 has the optimizer of stage 2
        options = train | {"zero_stage": stage}
        pairs[stage] = straight, noticed = config(f"scaled{stage}", **options), config(f"scaled-noticed{stage}", **options)
        poisons |= dict.fromkeys(pairs[stage], poison(2, 3, 5, factor=1e30))
    never = config("never", **train | {"steps": 40, "zero_stage": 2})
    poisons |= {never: poison(*range(1, 41), factor=1e30)}
    codes, said = train_poisoned(start, poisons, {noticed: [2] for _, noticed in pairs.values()})
    assert codes == [1, 1], said
    for stage, (straight, noticed) in pairs.items():
        assert_same_bits(state(straight), state(noticed))
        assert found(straight).loss_scale == found(noticed).loss_scale, stage
        assert (found(straight).loss_scale["cur_scale"], found(straight).adam_steps) == (2.0**14, 2), stage
    (line,) = (line for line in said.splitlines() if line.startswith("freeguide: error: "))
    assert "the gradients of step 18 overflow in fp16" in line  # 16 halvings from 2^16
