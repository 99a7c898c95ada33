"""What the step line says about speed, and how scalars reach the store."""

import threading
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from configs.schema import Config, TrainConfig
from data_pipeline.store import FolderStore, open_store
from trainer import telemetry
from trainer.telemetry import Telemetry

READING: dict[str, dict[str, int]] = {"retries": {}, "bad_samples": {}}  # of a reader without troubles


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """[the time that telemetry sees], on rank 0 of two ranks of which the other has nothing to add, on a device of 1 TFLOP/s."""
    now = [0.0]
    monkeypatch.setattr(telemetry.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(telemetry.time, "time", lambda: 1e9 + now[0])  # event files are read in the order of their seconds
    monkeypatch.setattr(telemetry, "peak_flops", lambda device: 1e12)
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
            watched._upload_thread.join()  # type: ignore[union-attr]
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
