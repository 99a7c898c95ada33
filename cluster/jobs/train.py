"""The training job: Ray Train places the workers and restarts them after failures, `trainer.training.loop.train` runs in each.
With `cluster.engine=local` it runs in this process instead.

A restarted worker group goes on from the newest whole checkpoint by itself, and so does the same command given again; Ray's own
checkpoint mechanism is not used. With `cluster.min_workers` the group may be smaller for a while: the global batch stays.

    a worker dies                       the group is started again, `cluster.max_failures` times without a new checkpoint
    a worker gets SIGTERM               )
    Ray says that a node will go        ) all save at the same step and leave; the group is started again, which is no failure
    Ray resizes an elastic group        )
    the driver gets SIGTERM or Ctrl-C   all save at the same step and leave, and so does the driver, with exit code 143 or 130
    a user has to mend something        the first worker that meets it leaves a note with the driver, and all ends at once

An outage of the store is not such a thing: restarts wait it out. What workers print comes to the driver's terminal by the note,
too; everything else that they and Ray write stays in Ray's logs.
"""

import contextlib
import io
import logging
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, TextIO

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from freeguide.cluster.evaluation.executor import Resources
from freeguide.cluster.runtime import ending
from freeguide.cluster.runtime.folders import environment, temporary
from freeguide.cluster.runtime.here import as_worker, gpus_here
from freeguide.cluster.runtime.session import session
from freeguide.configs.errors import StoreError, UserError
from freeguide.configs.schema import Config
from freeguide.trainer.training import loop
from freeguide.trainer.training.failures import HUNG, Terminated
from freeguide.trainer.training.loop import preflight

_HEAR_SECONDS = 0.2  # between two questions of the driver for what the workers say
_LISTEN_SECONDS = 1.0  # between two questions of a worker whether it should leave: a machine is taken away with 30 s notice
_LEAVE_SECONDS = 120.0  # for saving, before a resize
_this_worker = Terminated()  # in a worker's process
_left = threading.Event()  # set once this worker's training has ended
# What gloo says where a neighbour has gone: the place in its source, what it is, and advice that is not for our users.
_GLOO = re.compile(r"\[\S+\.cc:\d+\] (.*?)\. This is typically caused by .*")


def train(config: Config) -> None:
    """Train `config` until `train.steps`, where `cluster.engine` says. Raises UserError, before Ray starts where it can.

    Raises KeyboardInterrupt after Ctrl-C and SystemExit with code 143 after SIGTERM, once the run is saved, or at once while no
    worker trains.
    """
    start = preflight(config)
    if start >= config.train.steps:
        print(f"{config.run} is trained: step {start} of {config.train.steps}, nothing to do")
        return
    began = time.monotonic()
    if config.cluster.engine == "local":
        _train_here(config)
    else:
        _train_on_ray(config, start)
    print(f"trained to step {config.train.steps} in {timedelta(seconds=round(time.monotonic() - began))}: {config.run}")


def _train_here(config: Config) -> None:
    """Train with one worker, which is this process. If it is to end, it saves first, once it has begun with the steps."""
    terminated = Terminated()

    def stop() -> bool:
        terminated.ask()
        return terminated.heard

    gpus = config.cluster.gpus_per_worker
    with environment({} if gpus else {"CUDA_VISIBLE_DEVICES": ""}), ending.gently(stop):
        resources = Resources(config.cluster.cpus_per_worker, gpus_here(gpus, 1, together=True))
        try:
            with as_worker(config, resources):
                loop.train(config, terminated)
        except SystemExit:
            if ending.asked():
                ending.leave()
            raise


def _train_on_ray(config: Config, start: int) -> None:
    # Workers stay in the folder of the command, as mixtures that older versions wrote may name their data sets from there.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    with session(config, config.cluster.min_workers or config.cluster.workers, together=True) as resources:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        note = _Note.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        with ending.gently(lambda: bool(ray.get(note.leave.remote()))), _heard(note):
            while True:
                try:
                    if _fit(config, resources, note):
                        break
                except TrainingFailedError as error:
                    start = _new_start(error, config, start)
                if ending.asked():
                    ending.leave()
                print("the workers had to leave; starting them again", flush=True)


def _fit(config: Config, resources: Resources, note: Any) -> bool:
    """Train with Ray Train; returns whether to the end. False: the workers were asked to leave, and have saved.

    Raises TrainingFailedError where workers have failed more often than `cluster.max_failures`.
    """

    def work(job: dict[str, Any]) -> bool:  # not in the mapping below, which Ray shows in its dashboard and keeps
        return _worker(config, job)

    trainer = _Trainer(
        work,  # type: ignore[arg-type]  # in Ray Train V2 it may return something
        train_loop_config={"threads": resources.threads, "note": note},
        torch_config=_Group(backend="nccl" if resources.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=_workers(config),
            use_gpu=resources.gpus > 0,
            resources_per_worker=resources.bundle,
        ),
        run_config=RunConfig(
            name=f"{config.name}-{time.time_ns()}",  # a finished run's name used again would return at once
            storage_path=tempfile.gettempdir(),  # of this command alone; Ray writes little there, and nobody reads it
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            callbacks=[_Failures(note)],  # type: ignore[list-item]  # a UserCallback is one
        ),
    )
    result: Any = trainer.fit()
    if (mistake := ray.get(note.mistake.remote())) is not None:
        raise mistake
    return bool(result.return_value)


class _Trainer(TorchTrainer):
    def _register_sigint_handler(self, controller: Any) -> None:
        """Ray's own handler would abort the training without a word, and end with code 1."""


def _workers(config: Config) -> Any:  # Ray Train V2 takes a pair for an elastic group
    fewest, most = config.cluster.min_workers, config.cluster.workers
    return (fewest, most) if fewest else most


# --- between the driver and the workers ---


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class _Note:
    """What workers tell the driver, lines for the terminal and a mistake that a user has to mend; what it tells them, to leave."""

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._mistake: UserError | None = None
        self._leave = False
        self._asked = -60.0  # when a worker last asked

    def say(self, line: str) -> None:
        self._lines.append(line)

    def take(self) -> list[str]:
        """The lines since the last `take`."""
        lines, self._lines = self._lines, []
        return lines

    def write(self, mistake: UserError) -> None:
        self._mistake = self._mistake or mistake

    def mistake(self) -> UserError | None:
        return self._mistake

    def should_leave(self) -> bool:
        self._asked = time.monotonic()
        return self._leave

    def leave(self) -> bool:
        """Let the workers leave; returns whether there are any."""
        self._leave = True
        return time.monotonic() - self._asked < 10 * _LISTEN_SECONDS


@contextlib.contextmanager
def _heard(note: Any) -> Iterator[None]:
    """Print what the workers say, until the end of the block."""
    over = threading.Event()

    def listen() -> None:
        with contextlib.suppress(RayError):  # the end of the cluster
            while not over.wait(_HEAR_SECONDS):
                _print(note)

    thread = threading.Thread(target=listen, name="freeguide-hear", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(RayError):
            _print(note)


def _print(note: Any) -> None:
    for line in ray.get(note.take.remote()):
        print(line, flush=True)


class _Failures(UserCallback):
    """Says which workers have failed, and why, each time it happens. Ray calls it in a process of its own."""

    def __init__(self, note: Any) -> None:
        self._note = note

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        for rank, failure in sorted(worker_exceptions.items()):
            self._note.say.remote(f"rank {rank} failed: {_reason(failure)}")


def _reason(failure: Exception) -> str:
    """Why a worker failed, in a line."""
    failure = getattr(failure, "health_check_failure", failure)
    text = str(failure).strip()
    if f"exit code {HUNG}" in text:
        return "it made no progress for train.watchdog_seconds, and was ended"
    first = (text.splitlines() or [type(failure).__name__])[0]
    return _GLOO.sub(r"\1", first)


class _Group(TorchConfig):
    """torch's process group, in workers that hear SIGTERM and leave in order when the group is resized."""

    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _Backend


class _Backend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        super().on_start(worker_group, backend_config)
        worker_group.execute(_hear)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        status = worker_group.get_latest_poll_status()
        if status is not None and not status.errors and not status.finished:  # a resize: nothing has failed, nothing is lost
            worker_group.execute(_leave)
        super().on_shutdown(worker_group, backend_config)


def _hear() -> None:
    _this_worker.listen()  # Ray calls this in the main thread of the worker's process; the training runs in another


def _leave() -> None:
    _this_worker.ask()
    _left.wait(_LEAVE_SECONDS)


# --- in a worker ---


def _worker(config: Config, job: dict[str, Any]) -> bool:
    """Train; returns whether to the end, or False where the workers were asked to leave and have saved."""
    note = job["note"]
    if ray.get(note.mistake.remote()) is not None:
        return False
    with temporary():  # what is left on a node by a worker that is killed, the next one deletes
        return _trained(config, job, note)


def _trained(config: Config, job: dict[str, Any], note: Any) -> bool:
    import torch

    from freeguide.trainer.training.loop import train

    logging.getLogger("botocore").setLevel(logging.WARNING)  # Ray turns on INFO, and every client says where its keys come from
    sys.stdout = said = _Said(note, ray.train.get_context().get_world_rank(), sys.stdout)
    logging.getLogger("freeguide").addHandler(logging.StreamHandler(said))
    torch.set_num_threads(job["threads"])
    os.environ["LOCAL_RANK"] = str(ray.train.get_context().get_local_rank())
    threading.Thread(target=_listen, args=(note,), name="freeguide-listen", daemon=True).start()
    try:
        train(config, _this_worker)
    except SystemExit:
        return False
    except StoreError:
        raise
    except UserError as mistake:
        ray.get(note.write.remote(mistake))
        raise
    finally:
        _left.set()
    return True


class _Said(io.TextIOBase):
    """Standard output of a worker: whole lines go to the driver's terminal, and all goes where it went before, to Ray's logs."""

    def __init__(self, note: Any, rank: int, before: TextIO) -> None:
        self._note, self._before, self._begun = note, before, ""
        self._prefix = f"rank {rank}: " if rank else ""
        self._writing = threading.Lock()

    def write(self, text: str) -> int:
        with self._writing:
            self._before.write(text)
            *lines, self._begun = (self._begun + text).split("\n")
            for line in lines:
                with contextlib.suppress(RayError):  # the driver is gone
                    self._note.say.remote(self._prefix + line)
        return len(text)

    def flush(self) -> None:
        self._before.flush()


def _listen(note: Any) -> None:
    """Ask the training to leave when Ray takes a worker's node away, which all workers hear together, or when the driver has to."""
    leads = ray.train.get_context().get_world_rank() == 0
    with contextlib.suppress(RayError):  # the end of the group
        while ray.train.get_preemption_info() is None and not (leads and _should_leave(note)):
            time.sleep(_LISTEN_SECONDS)
        _this_worker.ask()


def _should_leave(note: Any) -> bool:
    try:
        return bool(ray.get(note.should_leave.remote()))
    except RayError:  # the driver is gone, or out of reach for a while; the other workers wait for this one's next round
        return False


def _new_start(error: TrainingFailedError, config: Config, start: int) -> int:
    """The newest checkpoint's step, where it is after `start`: failures before it count no more. Else what happened is raised.

    That is the user's error, a sentence where a process died, or Ray's error for an exception in every worker: a defect.
    """
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    every = [e for f in failures.values() for e in (f, f.__cause__, getattr(f, "cause", None)) if isinstance(e, UserError)]
    mistake = next((e for e in every if not isinstance(e, StoreError)), None)
    most = config.cluster.max_failures
    if mistake is None and most and (newest := preflight(config)) > start:
        return newest
    if every:
        raise mistake or every[0] from error
    for rank, failure in failures.items():
        if type(failure).__module__.startswith("ray."):
            raise UserError(
                f"workers failed more often than cluster.max_failures={most} since step {start}, without a new checkpoint, the "
                f"last of them rank {rank} ({_reason(failure)}); Ray's logs say more, and the same command goes on from there"
            ) from error
    raise error
