"""When the training job starts its workers again, and with which sentence it ends. Drills with real ones: tests/faults."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import WorkerGroupError

from freeguide.cluster.evaluation.executor import Resources
from freeguide.cluster.jobs import train
from freeguide.configs.errors import ConfigError, StoreError, UserError
from freeguide.configs.load import load_config
from freeguide.configs.schema import Config

DEATH = WorkerGroupError("", {0: RuntimeError("lost a peer"), 1: WorkerHealthCheckFailedError("", failure=ActorDiedError())})


@pytest.fixture
def config() -> Config:
    return load_config(Path(__file__).parents[2] / "configs/digits.yaml")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[object]]:
    """stand_in(newest steps, *results) stands in for Ray: each `fit` raises or returns the next; returns those to come."""

    def make(newest: list[int], *happens: object) -> list[object]:
        left = list(happens)

        def fit() -> Any:
            happened = left.pop(0)
            if isinstance(happened, Exception):
                raise happened
            return SimpleNamespace(return_value=happened)

        answers = {"mistake": None, "leave": True, "take": []}
        note = SimpleNamespace(**{name: SimpleNamespace(remote=lambda a=answer: a) for name, answer in answers.items()})
        monkeypatch.setattr(train, "preflight", lambda config: newest[len(happens) - len(left)])
        monkeypatch.setattr(train, "session", lambda *_, **__: contextlib.nullcontext(Resources(1, 0)))
        monkeypatch.setattr(train.ray, "get", lambda value: value)
        monkeypatch.setattr(train.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: 56 * "0"))
        monkeypatch.setattr(train, "_Note", SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda: note)))
        monkeypatch.setattr(train, "_Trainer", lambda *_, **__: SimpleNamespace(fit=fit))
        return left

    return make


def test_workers_that_die_again_and_again_are_started_as_long_as_the_run_gets_on(
    config: Config, stand_in: Callable[..., list[object]], capsys: pytest.CaptureFixture[str]
) -> None:
    left = stand_in([0, 100, 200], DEATH, WorkerGroupError("", {0: StoreError("it does not answer")}), True)
    train.train(config)
    assert not left
    assert "trained to step 600" in capsys.readouterr().out


def test_workers_that_die_without_a_new_checkpoint_end_the_job_with_one_sentence(
    config: Config, stand_in: Callable[..., list[object]]
) -> None:
    left = stand_in([0, 100, 100], DEATH, DEATH, True)
    with pytest.raises(UserError) as error:
        train.train(config)
    assert left == [True]
    sentence = str(error.value)
    assert "more often than cluster.max_failures=3 since step 100, without a new checkpoint, the last of them rank 1" in sentence
    assert "(The actor died unexpectedly before finishing this task.)" in sentence
    assert "the same command goes on from there" in sentence
    assert "\n" not in sentence


def test_no_failure_is_repaired_where_none_may_be(config: Config, stand_in: Callable[..., list[object]]) -> None:
    config.cluster.max_failures = 0
    stand_in([0, 100], DEATH, True)
    with pytest.raises(UserError, match=r"cluster\.max_failures=0 since step 0"):
        train.train(config)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "[/src/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:35977: Connection reset by peer. This is typically "
            "caused by a remote worker hanging or bugs in the application. Check the logs of the remote worker. GLHF!",
            "Read error [127.0.0.1]:35977: Connection reset by peer",
        ),
        (
            "The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker",
            "The actor died unexpectedly before finishing this task.",
        ),
        ("", "RuntimeError"),
    ],
)
def test_why_a_rank_has_failed_is_told_in_a_line(said: str, told: str) -> None:
    assert train._reason(RuntimeError(said)) == told


def causes() -> Iterator[tuple[Exception, type[Exception], str]]:
    yield ConfigError("set it to 1"), ConfigError, "set it to 1"  # only without restarts: else the worker's note brings it
    yield StoreError("it does not answer"), StoreError, "it does not answer"
    yield AssertionError("a defect"), WorkerGroupError, "a defect"  # with its traceback


@pytest.mark.parametrize(("failure", "kind", "words"), causes())
def test_what_a_worker_raises_is_told_as_it_is(
    config: Config, stand_in: Callable[..., list[object]], failure: Exception, kind: type[Exception], words: str
) -> None:
    stand_in([0, 0], WorkerGroupError(str(failure), {0: failure}))
    with pytest.raises(kind, match=words) as error:
        train.train(config)
    assert type(error.value) is kind


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_in_relative_folders_trains_where_the_command_is_typed(freeguide, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """Ray Train takes workers to a folder of its own, and mixtures of older versions name their data sets as they were typed."""
    small = ["run=runs/a", "data.uri=data/mixed", "model.channels=16", "model.head_channels=16", "cluster.workers=1"]
    small += ["train.steps=2", "train.global_batch=16", "train.checkpoint_every=2", "sampling.steps=3"]

    def ok(command: str, *more: str) -> None:
        ended = freeguide(command, "configs/digits.yaml", *small, *more, RAY_ADDRESS="")
        assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]

    ok("prepare", "data.uri=data/one")
    ok("index", "data.mixture={data/one: 1}")
    manifest = tmp_path / "data/mixed/manifest.json"
    assert json.loads(manifest.read_text())["parts"][0]["uri"] == f"{tmp_path}/data/one"
    ok("train")
    formerly = json.loads(manifest.read_text())
    del formerly["seal"]
    formerly["parts"][0]["uri"] = "data/one"
    manifest.write_text(json.dumps(formerly))
    ok("train", "train.steps=4")
    assert f"run: {tmp_path}/runs/a\n" in (tmp_path / "runs/a/config.yaml").read_text()
    assert sorted(path.name for path in (tmp_path / "runs/a/checkpoints").iterdir()) == ["step-00000002", "step-00000004"]
