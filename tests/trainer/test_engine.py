"""What DeepSpeed and torch are told."""

import os
from typing import Any

import pytest
import torch

from freeguide.configs.errors import ConfigError
from freeguide.configs.schema import TrainConfig
from freeguide.trainer.networks.kernels import choose_kernels
from freeguide.trainer.training import engine
from freeguide.trainer.training.engine import _deepspeed_config


def zero(numel: int = 1000, **options: Any) -> dict[str, Any]:
    section: dict[str, Any] = _deepspeed_config(TrainConfig(**options), 4, 1, 2, numel)["zero_optimization"]
    return section


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_room_for_gradients_is_that_of_the_network_and_no_more_than_deepspeeds_own(stage: int) -> None:
    assert zero(zero_stage=stage)["reduce_bucket_size"] == 1000
    assert zero(10**10, zero_stage=stage)["reduce_bucket_size"] == 500_000_000


def test_what_the_user_tells_deepspeed_comes_first() -> None:
    chosen = zero(zero_stage=1, deepspeed={"zero_optimization": {"reduce_bucket_size": 7, "contiguous_gradients": True}})
    assert (chosen["reduce_bucket_size"], chosen["contiguous_gradients"]) == (7, True)


def test_gradients_are_staged_only_where_they_are_reduced_during_the_backward_pass() -> None:
    staged = [zero(zero_stage=stage)["contiguous_gradients"] for stage in (1, 2, 3)]
    assert staged == [False, True, True]
    assert zero(zero_stage=1, deepspeed={"zero_optimization": {"overlap_comm": True}})["contiguous_gradients"]


@pytest.mark.parametrize("section", [{"zero_optimization": {"stage": 3}}, {"gradient_clipping": 2.0}, {"bf16": {"enabled": True}}])
def test_what_freeguide_decides_is_refused_by_name(section: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"train\.deepspeed\.(zero_optimization\.stage|gradient_clipping|bf16) is set from"):
        zero(deepspeed=section)


def test_only_kernels_that_repeat_are_used_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", environment := dict[str, str]())
    monkeypatch.setattr(torch, "use_deterministic_algorithms", (asked := list[bool]()).append)
    choose_kernels(False)
    assert (asked, environment) == ([False], {})
    choose_kernels(True)
    assert (asked, environment) == ([False, True], {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"global_batch": 13}, "train.global_batch=13 is not divisible by WORLD_SIZE=2"),
        ({"micro_batch": 4}, "train.micro_batch=4 does not divide a worker's share of 6 images"),
        ({"micro_batch": 12}, "train.micro_batch=12 does not divide a worker's share of 6 images"),
        ({"micro_batch": 3, "precision": "bf16", "zero_stage": 1}, "would add gradients up in bf16"),
    ],
)
def test_shares_that_cannot_be_are_refused_for_the_processes_that_there_are(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], words: str
) -> None:
    """The config was checked for cluster.workers; torchrun, or an elastic group, brings another number."""
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(engine, "_import_deepspeed", lambda: pytest.fail("it went on to DeepSpeed"))
    with pytest.raises(ConfigError) as error:
        engine.Engine(torch.nn.Linear(2, 2), TrainConfig(**{"global_batch": 12, "precision": "fp32"} | options))
    assert words in str(error.value)


@pytest.mark.parametrize("name", ["SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"])
def test_tasks_that_know_nothing_of_each_other_are_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Eight times `python -m trainer` would be eight trainings of one run."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(os, "environ", {name: "8"})
    with pytest.raises(ConfigError, match=f"{name}=8 .* torchrun"):
        engine.join_process_group()
    for accepted in ({name: "8", "RANK": "3"}, {name: "1"}, {"SLURM_NTASKS": "8"}):  # a batch script has one process so far
        monkeypatch.setattr(os, "environ", accepted)
        engine.join_process_group()
