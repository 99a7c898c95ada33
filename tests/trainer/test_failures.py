"""What a training does when something goes wrong: each piece alone. The drills are in tests/faults."""

import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from freeguide.cluster.runtime.checks import contradictions
from freeguide.configs.errors import ConfigError, StoreError, UserError
from freeguide.configs.load import load_config
from freeguide.configs.schema import Config, TrainConfig
from freeguide.data_pipeline.order import Order
from freeguide.data_pipeline.store.folder import FolderStore
from freeguide.trainer import __main__ as trainer_main
from freeguide.trainer.checkpoints import search
from freeguide.trainer.training import loop
from freeguide.trainer.training.engine import _check_device, join_process_group
from freeguide.trainer.training.failures import HUNG, TERMINATED, Agreement, Incidents, Terminated, limit_collectives
from freeguide.trainer.training.telemetry import Interval, Stopwatch

ROOT = Path(__file__).parents[2]
ORDER = Order(samples=100, chunk_samples=10, streams=1, window_chunks=10, seed=0)


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    join_process_group()
    yield
    dist.destroy_process_group()


def test_ranks_agree_on_the_maximum_one_step_later() -> None:
    agreement = Agreement(2)
    assert agreement.exchange(0, -3) == [0, 0]
    assert agreement.exchange(1, -5) == [0, -3]
    assert agreement.exchange(0, 0) == [1, -5]
    agreement.close()


def test_ctrl_c_leaves_after_the_step_with_130_and_what_to_do_next(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def train(config: Any, terminated: Terminated) -> int:
        with terminated:
            os.kill(os.getpid(), signal.SIGINT)
            assert terminated.asked
        raise SystemExit(TERMINATED)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(trainer_main, "train", train)
    monkeypatch.setattr(sys, "argv", ["trainer", str(tiny("interrupted"))])
    try:
        assert trainer_main.main() == 130
    finally:
        signal.signal(signal.SIGINT, before)
    said = capfd.readouterr().err
    assert "stopping after this step; Ctrl-C again ends it at once" in said
    assert said.endswith("stopped; run the same command again to go on\n")


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [0, 2], ids=["alone", "torchrun"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_python_m_trainer_saves_and_leaves_as_it_is_asked_to(
    tiny: Callable[..., Path], tmp_path: Path, number: int, code: int, ranks: int
) -> None:
    """As a terminal does it: the signal goes to all processes of the group; SIGTERM to the one that was started."""
    path = tiny("asked", str(tmp_path / "run"), train={"steps": 10**6, "checkpoint_every": 10**6, "log_every": 1})
    alone = [sys.executable, "-m", "trainer", str(path)]
    command = (
        alone if not ranks else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *alone[1:]]
    )
    with open(tmp_path / "log", "w") as log:
        started = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while "step 3/" not in (tmp_path / "log").read_text():
            assert started.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (os.killpg if number == signal.SIGINT else os.kill)(started.pid, number)
        ended = started.wait(timeout=120)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
    said = (tmp_path / "log").read_text()
    assert "asked to end: saved at step" in said, said
    found = search.find(FolderStore(tmp_path / "run"))
    assert f"asked to end: saved at step {found.step};" in said
    if not ranks:
        assert ended == code
        assert "Traceback" not in said
        assert ("run the same command again to go on" in said) == (number == signal.SIGINT)


def test_sigterm_is_remembered_only_while_training() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Terminated() as terminated:
        assert not terminated.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert terminated.asked
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_wish_to_end_is_passed_on() -> None:
    heard: list[str] = []
    with Terminated(tell=lambda: heard.append("told")) as terminated:
        os.kill(os.getpid(), signal.SIGTERM)
        terminated.ask()
    assert heard == ["told", "told"]


def watched(seconds: float, body: str) -> "subprocess.CompletedProcess[str]":
    code = f"import time\nfrom freeguide.trainer.training.failures import Watchdog\nwith Watchdog({seconds}) as watchdog:\n"
    code += "".join(f"    {line}\n" for line in body.splitlines()) + "print('done')"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_hang_ends_with_one_line_that_says_where() -> None:
    ended = watched(0.5, "watchdog.progress('step 7')\ntime.sleep(50)")
    assert ended.returncode == HUNG
    (line,) = ended.stderr.splitlines()
    assert "no progress for 0.5 s after step 7, in <string>:5" in line


@pytest.mark.parametrize(
    ("seconds", "body"),
    [
        (4, "for i in range(30):\n    watchdog.progress(f'step {i}')\n    time.sleep(0.2)"),  # slow, but it moves
        (0.5, "time.sleep(1)"),  # the first step may compile for minutes
        (0, "watchdog.progress('step 1')\ntime.sleep(1)"),
    ],
)
def test_what_is_no_hang_goes_on(seconds: float, body: str) -> None:
    ended = watched(seconds, body)
    assert (ended.returncode, ended.stdout) == (0, "done\n"), ended.stderr


def test_every_process_group_gets_the_shorter_time_out() -> None:
    other = dist.new_group(backend="gloo", timeout=timedelta(minutes=9))
    limit_collectives(7)
    for group in (None, other):
        backend = (group or dist.group.WORLD)._get_backend(torch.device("cpu"))
        assert backend.options._timeout == timedelta(seconds=7)
    limit_collectives(1800)
    dist.destroy_process_group(other)


# --- incidents ---


def interval(first: int, losses: list[float], norm: float = 1.0) -> Interval:
    """Steps with two samples each, one of which has all of the loss."""
    own = [(torch.tensor([0.0, 2 * loss]), torch.tensor([2 * (first + i), 2 * (first + i) + 1])) for i, loss in enumerate(losses)]
    return Interval(first, losses, [norm if math.isfinite(loss) else math.inf for loss in losses], own)


def judged(incidents: Incidents, interval: Interval) -> int:
    incidents.review(interval)
    return incidents.over_budget()


def rows(store: FolderStore) -> list[dict[str, object]]:
    return [json.loads(line) for line in store.get("incidents.jsonl").decode().splitlines()]


def test_a_step_that_is_not_finite_is_recorded_with_its_samples(tmp_path: Path) -> None:
    incidents = Incidents(FolderStore(tmp_path), ORDER, [], TrainConfig(bad_steps=1))
    incidents.review(interval(0, [0.5, math.nan, 0.5]))
    (row,) = rows(FolderStore(tmp_path))
    assert (row["step"], row["what"], row["loss"], row["gradient_norm"]) == (2, "not finite", "nan", "inf")
    sample = int(ORDER.locate(np.array([3]))[1][0])
    assert row["samples"][0] == {"index": 3, "sample": sample, "loss": "nan"}  # type: ignore[index]
    assert incidents.bad_steps == [2]


def test_over_the_budget_a_run_learns_where_its_last_row_of_bad_steps_begins(tmp_path: Path) -> None:
    incidents = Incidents(FolderStore(tmp_path), ORDER, [2, 9], TrainConfig(bad_steps=4))
    assert judged(incidents, interval(10, [math.nan, 0.5, math.inf])) == 0  # steps 11 and 13
    assert judged(incidents, interval(13, [math.nan, math.nan])) == 13
    single = Incidents(FolderStore(tmp_path), ORDER, [2, 9, 15], TrainConfig(bad_steps=3))
    assert judged(single, interval(16, [math.nan, 0.5])) == 17


def test_going_back_is_recorded_begins_the_budget_anew_and_happens_once_also_after_a_restart(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    incidents = Incidents(store, ORDER, [2, 9], TrainConfig(bad_steps=2))
    assert judged(incidents, interval(11, [math.inf])) == 12
    incidents.undo(10, 12)
    assert [(row["step"], row["what"]) for row in rows(store)] == [(12, "not finite"), (12, "undone")]
    assert rows(store)[1]["back_to"] == 10
    assert judged(incidents, interval(12, [math.nan, math.nan])) == 0
    again = Incidents(store, ORDER, incidents.bad_steps, TrainConfig(bad_steps=2), undone=incidents.undone)
    sentence = (
        r"the gradients of 3 steps were not finite \(the last of them 20\), more than train\.bad_steps=2, "
        r"although the steps up to 12 had been undone; .* move the checkpoints from step 20 on out of checkpoints/ and "
        r"lower train\.lr"
    )
    with pytest.raises(UserError, match=sentence):
        judged(again, interval(19, [math.nan]))


def test_a_gpu_that_is_too_small_is_told_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def assemble(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80 GiB")

    monkeypatch.setattr(loop, "assemble", assemble)
    with pytest.raises(ConfigError, match=r"too small \(CUDA out of memory\); lower train.micro_batch .*train.recompute=true"):
        loop.train(Config())


def test_an_overflow_of_scaled_gradients_is_no_incident(tmp_path: Path) -> None:
    incidents = Incidents(FolderStore(tmp_path), ORDER, [], TrainConfig(bad_steps=0, precision="fp16"))
    assert judged(incidents, interval(0, [0.5], norm=math.inf)) == 0
    assert judged(incidents, interval(1, [math.nan])) == 2


def test_a_spike_is_recorded_and_a_repeated_step_once(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    incidents = Incidents(store, ORDER, [], TrainConfig())
    incidents.review(interval(0, [1.0] * 20 + [2.9, 3.1]))
    incidents.review(interval(22, [4.0]))
    again = Incidents(store, ORDER, [], TrainConfig())
    again.review(interval(0, [1.0] * 22 + [5.0]))
    assert [(row["step"], row["what"], row["loss"]) for row in rows(store)] == [(22, "spike", 3.1), (23, "spike", 5.0)]


def test_lines_of_the_diary_that_are_damaged_stay_and_end_no_run(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    strange = ['{"step": 2', "[" * 5000, "[1, 2]", "null", "\ufffd", '{"what": "a note of mine"}']
    store.put("incidents.jsonl", "\n".join(strange).encode().replace("\ufffd".encode(), b"\xff") + b"\n")
    incidents = Incidents(store, ORDER, [], TrainConfig())
    for _ in range(2):
        incidents.review(interval(0, [math.nan]))
    *before, last = store.get("incidents.jsonl").decode().splitlines()
    assert before == strange
    assert json.loads(last)["step"] == 1


def test_a_store_that_refuses_the_diary_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> str:
        raise StoreError("no more")

    incidents = Incidents(FolderStore(tmp_path), ORDER, [], TrainConfig())
    monkeypatch.setattr(FolderStore, "put", refuse)
    incidents.review(interval(0, [math.nan]))
    assert incidents.bad_steps == [1]


def test_a_stopwatch_adds_up_what_it_was_around(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 2.0, 10.0, 14.0])
    monkeypatch.setattr("freeguide.trainer.training.telemetry.time.perf_counter", lambda: next(seconds))
    watch = Stopwatch(torch.device("cpu"))
    for _ in range(2):
        with watch:
            pass
    assert watch.take() == 5
    assert watch.take() == 0


# --- options that cannot be ---


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.precision=fp16", "train.zero_stage=0"], "train.precision=fp16 with train.zero_stage=0"),
        (["train.micro_batch=4", "train.zero_stage=1", "train.precision=bf16"], "would add gradients up in bf16"),
        (["model.learn_sigma=true"], "model.learn_sigma=true cannot be trained"),
        (["cluster.workers=4", "cluster.min_workers=3"], "cannot be shared by 3 workers"),
        (["cluster.min_workers=2"], "cluster.min_workers=2"),
        (["train.ema_sigma_rel=[0.3]"], "above 0 and below 0.2886"),
        (["train.ema_half_lives=[8,8]"], "each value once"),
        (["sampling.ema=best"], "sampling.ema=best: one of"),
        (["sampling.ema=half_life_7"], "sampling.ema=half_life_7 is not kept by this training"),
        (["train.lr_schedule=linear"], "train.lr_schedule=linear"),
    ],
)
def test_options_of_training_that_cannot_be_are_one_sentence(tiny: Callable[..., Path], overrides: list[str], words: str) -> None:
    path = tiny("options", train={"global_batch": 16})
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides, contradictions=contradictions)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_fp16_on_a_cpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        _check_device(TrainConfig(precision="fp16"), torch.device("cpu"))
