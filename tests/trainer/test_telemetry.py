"""What the step line says about speed, and how scalars reach the store."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from freeguide.configs.schema import Config, TrainConfig
from freeguide.data_pipeline.store.folder import FolderStore
from freeguide.data_pipeline.store.open import open_store
from freeguide.trainer.training import telemetry
from freeguide.trainer.training.telemetry import Telemetry

READING: dict[str, dict[str, int]] = {"retries": {}, "bad_samples": {}}  # of a reader without troubles


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """[the time that telemetry sees], on rank 0 of two ranks of which the other has nothing to add, on a device of 1 TFLOP/s."""
    now = [0.0]
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(telemetry.time, "time", lambda: 1e9 + now[0])  # event files are read in the order of their seconds
    monkeypatch.setattr(telemetry, "peak_flops", lambda device, precision: 1e12)
    monkeypatch.setattr(telemetry.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(telemetry.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(telemetry.dist, "all_reduce", lambda values: None)
    return now


def step_line(clock: list[float], folder: Path, capsys: pytest.CaptureFixture[str], train: TrainConfig) -> str:
    """The line after four steps of half a second each, of a network whose forward takes 2e9 operations per image."""
    watched = Telemetry(Config(train=train), open_store(str(folder)), torch.device("cpu"), 0, 2 * 10**9)
    share = torch.ones(train.global_batch // 2)
    for _ in range(4):
        clock[0] += 0.5
        watched.record(share, share, share.long(), torch.tensor(1.0), 1e-3, waited=0.125)
    watched.flush(4, READING)
    watched.close()
    return capsys.readouterr().out


@pytest.mark.parametrize("recompute", [False, True])
def test_mfu_is_three_forwards_over_the_peak_of_all_devices_and_a_recomputed_forward_is_none(
    recompute: bool, clock: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = step_line(clock, tmp_path, capsys, TrainConfig(steps=8, global_batch=64, recompute=recompute))
    # 64 images in 0.5 s; 3 * 2e9 operations each; two devices of 1e12: 128 * 6e9 / 2e12.
    assert "128 images/s  mfu 38.4 %" in line


def test_data_wait_is_the_mean_of_the_ranks_and_the_rest_of_the_run_is_extrapolated(
    clock: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = step_line(clock, tmp_path, capsys, TrainConfig(steps=64, global_batch=64))
    assert "data wait 12.5 %" in line  # 4 * 0.125 s of 2 s on this rank, nothing on the other
    assert "eta 0:00:30" in line  # 60 steps of half a second


def test_every_rank_is_in_the_histograms_and_the_slowest_has_its_number(
    clock: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step_line(clock, tmp_path, capsys, TrainConfig(steps=8, global_batch=64))
    log = EventAccumulator(str(tmp_path / "events"))
    log.Reload()
    (wait,) = log.Histograms("ranks/data_wait_percent")
    found = wait.histogram_value
    assert (wait.step, found.num, found.min, found.max) == (4, 2, 0.0, 25.0)
    assert [event.value for event in log.Scalars("speed/slowest_rank")] == [0]


class SlowStore(FolderStore):
    """Answers no `put` before `open` is set."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.open = threading.Event()

    def put(self, key: str, data: bytes) -> str:
        self.open.wait()
        return super().put(key, data)


def test_scalars_are_sent_beside_the_steps_and_in_files_that_do_not_grow(
    clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "_FILE_BYTES", 1)
    store = SlowStore(tmp_path)
    watched = Telemetry(Config(train=TrainConfig(steps=99, global_batch=4)), store, torch.device("cpu"), 0, 1)
    for step in range(1, 9):
        clock[0] += 31.0
        watched.record(torch.full((2,), float(step)), torch.zeros(2), torch.arange(2), torch.tensor(1.0), 1e-3, waited=0.0)
        watched.flush(step, READING)  # does not wait for the store
        if step >= 4:
            store.open.set()
            watched._events._thread.join()  # type: ignore[union-attr]
    watched.close()
    files = sorted((tmp_path / "events").iterdir())
    assert len(files) > 3
    assert [(event.step, event.value) for event in seen(tmp_path).Scalars("train/loss")] == [(k, k / 2) for k in range(1, 9)]


def steps_of(watched: Telemetry, first: int, last: int) -> None:
    for step in range(first, last + 1):
        watched.record(torch.full((2,), float(step)), torch.zeros(2), torch.arange(2), torch.tensor(1.0), 1e-3, waited=0.0)
    watched.flush(last, READING)


def seen(folder: Path) -> EventAccumulator:
    """What TensorBoard shows of a run."""
    log = EventAccumulator(str(folder / "events"), size_guidance={"scalars": 0, "images": 0})
    log.Reload()
    return log


@pytest.mark.parametrize("start", [0, 4])
def test_what_a_killed_run_has_logged_past_its_last_checkpoint_is_hidden_and_the_rest_stays(
    start: int, clock: list[float], tmp_path: Path
) -> None:
    config, store = Config(train=TrainConfig(steps=99, global_batch=4)), FolderStore(tmp_path)
    killed = Telemetry(config, store, torch.device("cpu"), 0, 1)
    if start:
        steps_of(killed, 1, start)
        killed.saved(start, 0.5)
        killed.images(start, "samples", torch.zeros(1, 8, 8))
    steps_of(killed, start + 1, start + 3)
    killed.close()
    clock[0] += 1
    resumed = Telemetry(config, store, torch.device("cpu"), start, 1)
    steps_of(resumed, start + 1, start + 2)
    resumed.close()
    log = seen(tmp_path)
    assert [event.step for event in log.Scalars("train/loss")] == list(range(1, start + 3))
    if start:
        assert [event.step for event in log.Scalars("checkpoint/stall_ms")] == [start]
        assert [event.step for event in log.Images("samples")] == [start]


def test_the_scalars_up_to_a_checkpoint_can_be_sent_from_its_thread(clock: list[float], tmp_path: Path) -> None:
    watched = Telemetry(Config(train=TrainConfig(steps=99, global_batch=4)), FolderStore(tmp_path), torch.device("cpu"), 0, 1)
    steps_of(watched, 1, 3)
    watched.saved(3, 0.5)
    steps_of(watched, 4, 5)  # the training goes on meanwhile
    thread = threading.Thread(target=watched.upload)
    thread.start()
    thread.join()
    assert [event.step for event in seen(tmp_path).Scalars("train/loss")][:3] == [1, 2, 3]
    assert [event.step for event in seen(tmp_path).Scalars("checkpoint/stall_ms")] == [3]
    watched.close()
    watched.upload()  # a checkpoint may still be on its way where a training ends with an error


# --- clocks, and places that are only for watching ---


def later(store: FolderStore, start: int, first: int, last: int) -> Telemetry:
    watched = Telemetry(Config(train=TrainConfig(steps=99, global_batch=4)), store, torch.device("cpu"), start, 1)
    steps_of(watched, first, last)
    return watched


@pytest.mark.parametrize("jump", [-3e7, 3e7, 0.0])
def test_curves_follow_the_steps_whatever_the_clock_says(
    jump: float, clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run on a machine whose clock is a year behind, or ahead, and a file that an older version named by the seconds."""
    store = FolderStore(tmp_path)
    with SummaryWriter(str(tmp_path / "events"), purge_step=1) as old:
        for step in (1, 2):
            old.add_scalar("train/loss", step / 2, step)
    later(store, 2, 3, 6).close()
    monkeypatch.setattr(telemetry.time, "time", lambda: 1e9 + clock[0] + jump)
    later(store, 4, 5, 5).close()
    assert [(event.step, event.value) for event in seen(tmp_path).Scalars("train/loss")] == [(k, k / 2) for k in range(1, 6)]


def test_a_file_is_ended_by_its_size_and_not_by_what_is_newest_on_the_disk(
    clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "_FILE_BYTES", 1)
    watched = later(FolderStore(tmp_path), 0, 1, 1)
    for step in (2, 3, 4):
        clock[0] += 31
        steps_of(watched, step, step)
        assert watched._events is not None
        watched._events._thread.join()  # type: ignore[union-attr]
        for path in watched._events._folder.path.rglob("*.*"):  # type: ignore[union-attr]
            os.utime(path, (2e9 - step, 2e9 - step))
    watched.close()
    assert len(list((tmp_path / "events").iterdir())) == 4
    assert [event.step for event in seen(tmp_path).Scalars("train/loss")] == [1, 2, 3, 4]


def test_a_temporary_folder_that_cannot_be_used_costs_tensorboard_and_not_the_training(
    clock: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    watched = later(FolderStore(tmp_path / "run"), 0, 1, 4)
    watched.saved(4, 0.1)
    watched.images(4, "samples", torch.zeros(1, 8, 8))
    watched.upload()
    watched.close()
    assert "step 4/99" in capsys.readouterr().out
    assert caplog.text.count("the training goes on without TensorBoard") == 1


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_temporary_folder_that_is_full_costs_tensorboard_and_not_the_training(
    clock: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        monkeypatch.setattr(tempfile, "tempdir", str(small))
        watched = later(FolderStore(tmp_path / "run"), 0, 1, 2)
        for step in range(3, 20):
            watched.images(step, "samples", torch.rand(3, 64, 64))
            watched.saved(step, 0.1)
            steps_of(watched, step, step)
            watched.upload()
        watched.close()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
    shown = capsys.readouterr()
    assert "step 19/99" in shown.out
    assert "Traceback" not in shown.err
    assert caplog.text.count("the training goes on without TensorBoard") == 1
    assert [event.step for event in seen(tmp_path / "run").Scalars("train/loss")][:2] == [1, 2]


def test_an_output_that_is_full_or_closed_costs_the_line_and_not_the_training(
    clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        watched = later(FolderStore(tmp_path), 0, 1, 2)
        steps_of(watched, 3, 3)
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    watched.close()
    assert [event.step for event in seen(tmp_path).Scalars("train/loss")] == [1, 2, 3]


def test_the_first_eta_does_not_count_the_start_up(clock: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watched = Telemetry(Config(train=TrainConfig(steps=100, global_batch=4)), FolderStore(tmp_path), torch.device("cpu"), 0, 1)
    clock[0] += 1000  # compiling
    for _ in range(10):
        clock[0] += 2
        watched.record(torch.ones(2), torch.zeros(2), torch.arange(2), torch.tensor(1.0), 1e-3, waited=0.0)
    watched.flush(10, READING)
    watched.close()
    assert "eta 0:03:00" in capsys.readouterr().out


def test_local_folders_of_killed_trainings_go_with_the_next_one_and_those_of_live_ones_stay(
    clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "import os, freeguide.trainer.training.telemetry as t; print(t._LocalFolder().path); os.kill(os.getpid(), 9)"
    root = Path(__file__).parents[2]
    killed = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert killed.returncode == -9
    (left,) = tmp_path.glob("freeguide-events-*")
    (left / "events").write_bytes(bytes(10))
    alive = later(FolderStore(tmp_path / "run"), 0, 1, 1)
    (one,) = tmp_path.glob("freeguide-events-*")
    assert one != left
    other = later(FolderStore(tmp_path / "other"), 0, 1, 1)
    assert one.exists()
    alive.close()
    other.close()
    assert not list(tmp_path.glob("freeguide-events-*"))
    assert [event.step for event in seen(tmp_path / "run").Scalars("train/loss")] == [1]
