"""Engines: the same bytes from each, and none of Ray where it is not asked for."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from freeguide.cluster.evaluation.executor import Resources
from freeguide.cluster.jobs.evaluate import evaluate
from freeguide.cluster.jobs.generate import generate
from freeguide.cluster.jobs.prepare import prepare
from freeguide.cluster.runtime.checks import contradictions
from freeguide.cluster.runtime.engines import ENGINES, executor
from freeguide.configs.errors import ConfigError, DataError, UserError
from freeguide.configs.load import load_config
from freeguide.configs.schema import Config, EngineName
from tests.cluster.untrained import DIGITS, SMALL, write_run

ROOT = Path(__file__).parents[2]
ASKED = [
    *("data.shard_samples=100", "evaluate.w=[0,0.5]", "evaluate.images=40", "evaluate.evaluator_epochs=1"),
    *("generate.images=8", "generate.unit=4", "generate.w=0.5", "cluster.cpus_per_worker=1"),
]
TIMED = r"run/evaluate/\w+/(units|rows)/.*|run/events/.*|.*/(times\.json|cost\.md)"  # say how long something took


def config_at(folder: Path, *overrides: str) -> Config:
    return load_config(DIGITS, [f"data.uri={folder}/data", f"run={folder}/run", *SMALL, *ASKED, *overrides], "evaluate")


def files(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not re.fullmatch(TIMED, name)}


def test_an_engine_of_each_name_that_a_config_may_have() -> None:
    assert set(ENGINES) == set(get_args(EngineName))


@pytest.mark.usefixtures("words_only")
def test_both_engines_make_the_same_bytes(ray_head: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards, evaluator, reference, report and generated set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", ray_head[0])
    made = {}
    for engine in ENGINES:
        config = config_at(tmp_path / "place", f"cluster.engine={engine}")
        assert len(prepare(config).shards) > 16  # fewer would be written without an engine
        write_run(config_at(tmp_path / "place"))  # whatever the training ran on
        evaluate(config)
        generate(config)
        made[engine] = files(tmp_path / "place")
        made[engine].pop("run/sampled_on.txt", None)  # of a cluster, which may have other devices
        shutil.rmtree(tmp_path / "place")
    assert made["ray"].keys() == made["local"].keys()
    assert {name for name in made["ray"] if made["ray"][name] != made["local"][name]} == set()
    for part in ("data/shards/000017", "data/evaluators/", "report/report.json", "/generate/", "samples.npz"):
        assert any(part in name for name in made["local"]), part


def test_what_the_local_engine_runs_does_not_import_ray(tmp_path: Path) -> None:
    config = config_at(tmp_path, "cluster.engine=local")
    rest = [f"run={tmp_path}/run", *SMALL, *ASKED, "cluster.engine=local"]
    commands = [["prepare", str(DIGITS), f"data.uri={tmp_path}/other", *rest]]
    commands += [
        [command, str(DIGITS), f"data.uri={tmp_path}/data", *rest] for command in ("fit-evaluator", "evaluate", "generate")
    ]
    prepare(config)
    write_run(config)
    code = (
        "import json, sys; from freeguide.cluster.cli import main\n"
        "print([main(command) for command in json.loads(sys.argv[1])], [m for m in sys.modules if m.split('.')[0] == 'ray'])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, json.dumps(commands)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert ended.stdout.splitlines()[-1:] == ["[0, 0, 0, 0] []"], ended.stdout[-3000:] + ended.stderr[-3000:]


def test_a_worker_in_this_process_has_the_threads_and_variables_of_an_actor_and_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[-1])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: threads.append(count))
    monkeypatch.delenv("MY_LEVEL", raising=False)
    threads, seen = [7], list[object]()

    def make(resources: Resources):  # type: ignore[no-untyped-def]
        return lambda item: seen.append((item, threads[-1], os.environ["MY_LEVEL"], resources))

    config = config_at(tmp_path, "cluster.engine=local", "cluster.cpus_per_worker=3", "cluster.env={MY_LEVEL: high}")
    with executor(config, 4) as engine:
        for item in engine.run([1, 2], make, gpus=False):
            assert (len(seen), threads[-1], "MY_LEVEL" in os.environ) == (item, 7, False)
    assert seen == [(item, 3, "high", Resources(3.0, 0.0)) for item in (1, 2)]
    assert engine.at_once == 1


def test_what_a_worker_in_this_process_refuses_is_its_own_sentence(tmp_path: Path) -> None:
    def small(_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 80 GiB")

    def refused(_: object) -> None:
        raise DataError("item 1 is refused; leave it out")

    with executor(config_at(tmp_path, "cluster.engine=local"), 1) as engine:
        with pytest.raises(UserError, match=r"too small for a work unit \(CUDA out of memory\); lower sampling\.batch"):
            list(engine.run([1], lambda _: small))
        with pytest.raises(DataError, match="item 1 is refused"):
            list(engine.run([1], lambda _: refused))


def test_a_gpu_that_this_machine_does_not_have_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    config = config_at(tmp_path, "cluster.engine=local", "cluster.gpus_per_worker=1")
    with executor(config, 1) as engine, pytest.raises(ConfigError, match="needs 1 GPUs and this machine has 0; set it to 0"):
        list(engine.run([1], lambda _: print))


# --- training ---

TRAINED = [
    *("train.steps=2", "train.global_batch=16", "train.checkpoint_every=2", "train.sample_every=0", "sampling.steps=2"),
    *("cluster.workers=1", "cluster.gpus_per_worker=0", "model.channels=16", "model.head_channels=16"),
]


def test_a_training_in_this_process_saves_what_a_training_without_ray_saves(tmp_path: Path, freeguide) -> None:  # type: ignore[no-untyped-def]
    prepare(config_at(tmp_path, "cluster.engine=local"))
    for name in ("freeguide", "trainer"):
        words = [f"data.uri={tmp_path}/data", f"run={tmp_path}/{name}", *TRAINED, "cluster.engine=local"]
        if name == "freeguide":
            ended = freeguide("train", "configs/digits.yaml", *words)
        else:
            ended = subprocess.run(
                [sys.executable, "-m", "trainer", "configs/digits.yaml", *words],
                cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
            )  # fmt: skip
        assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    ours, theirs = (sorted((tmp_path / name / "checkpoints").rglob("*.safetensors")) for name in ("freeguide", "trainer"))
    assert [path.name for path in ours] == [path.name for path in theirs] != []
    assert all(one.read_bytes() == other.read_bytes() for one, other in zip(ours, theirs, strict=True))


def test_a_training_of_several_workers_is_not_for_the_local_engine() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.engine=local trains in one process and cluster\.workers=2; set cluster\.work"):
        load_config(DIGITS, ["cluster.engine=local"], "train", contradictions=contradictions)
