"""The training job: Ray Train places the workers and restarts them after failures, `trainer.loop.train` runs in each.

A restarted worker group goes on from the newest whole checkpoint by itself, and so does the same command given again; Ray's own
checkpoint mechanism is not used. With `cluster.min_workers` the group may be smaller for a while: the global batch stays.

Ray restarts the group after any failure. What a user has to mend would fail again, so the first worker that meets it leaves a
note with the driver and the restarted group ends at once. An outage of the store is not such a thing: restarts wait it out.
"""

import logging
import os
import tempfile
import time
from datetime import timedelta
from typing import Any

import ray
import ray.train
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from cluster.session import session
from configs.errors import StoreError, UserError
from configs.load import from_yaml, to_yaml
from configs.schema import Config
from trainer.loop import preflight


def train(config: Config) -> None:
    """Train `config` on the cluster until `train.steps`. Raises UserError before Ray starts for whatever can be known before."""
    start = preflight(config)
    if start >= config.train.steps:
        print(f"{config.run} is trained: step {start} of {config.train.steps}, nothing to do")
        return
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    began = time.monotonic()
    with session(config, config.cluster.min_workers or config.cluster.workers) as resources:
        note = _Note.remote()  # type: ignore[attr-defined]
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"config": to_yaml(config), "threads": resources.threads, "note": note},
            torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=_workers(config),
                use_gpu=resources.gpus > 0,
                resources_per_worker={"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {}),
            ),
            run_config=RunConfig(
                name=f"{config.name}-{time.time_ns()}",  # a finished run's name used again would return at once
                storage_path=os.path.join(tempfile.gettempdir(), "freeguide-ray"),
                failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            ),
        )
        try:
            trainer.fit()
        except TrainingFailedError as error:
            raise _cause(error) from error
        if (mistake := ray.get(note.read.remote())) is not None:
            raise mistake
    print(f"trained to step {config.train.steps} in {timedelta(seconds=round(time.monotonic() - began))}: {config.run}")


def _workers(config: Config) -> Any:  # Ray Train V2 takes a pair for an elastic group
    fewest, most = config.cluster.min_workers, config.cluster.workers
    return (fewest, most) if fewest else most


@ray.remote(num_cpus=0, max_restarts=-1)
class _Note:
    """What a user has to mend, from a worker to the driver."""

    def __init__(self) -> None:
        self._mistake: UserError | None = None

    def write(self, mistake: UserError) -> None:
        self._mistake = self._mistake or mistake

    def read(self) -> UserError | None:
        return self._mistake


def _worker(job: dict[str, Any]) -> None:
    import torch

    from trainer.loop import train

    if ray.get(job["note"].read.remote()) is not None:
        return
    logging.getLogger("botocore").setLevel(logging.WARNING)  # Ray turns on INFO, and every client says where its keys come from
    torch.set_num_threads(job["threads"])
    os.environ["LOCAL_RANK"] = str(ray.train.get_context().get_local_rank())
    try:
        train(from_yaml(job["config"]))
    except StoreError:
        raise
    except UserError as mistake:
        ray.get(job["note"].write.remote(mistake))
        raise


def _cause(error: TrainingFailedError) -> Exception:
    """The user's error among those of the workers, or Ray's own."""
    failures = list(error.worker_failures.values()) if isinstance(error, WorkerGroupError) else []
    chain: list[BaseException | None] = [
        *failures,
        *(f.__cause__ for f in failures),
        *(getattr(f, "cause", None) for f in failures),
    ]
    return next((e for e in chain if isinstance(e, UserError)), error)
