"""The Ray cluster of one command: the one that RAY_ADDRESS names (as inside a submitted job), or a private one on this machine."""

import contextlib
import functools
import logging
import math
import os
import secrets
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import yaml
from ray._private import ray_constants

from freeguide.cluster.evaluation.executor import Resources
from freeguide.cluster.runtime import ending
from freeguide.cluster.runtime.address import probe
from freeguide.cluster.runtime.folders import environment, scratch, temporary
from freeguide.cluster.runtime.here import gpus_here
from freeguide.cluster.runtime.room import room_for
from freeguide.cluster.runtime.submit import HOME, copy_package
from freeguide.configs.errors import ConfigError, UserError
from freeguide.configs.schema import Config
from freeguide.configs.stored import to_yaml

LOG = "ray.log"  # what Ray writes to the standard error of this process


@contextmanager
def session(config: Config, processes: int, together: bool = False) -> Iterator[Resources]:
    """Connect, yield the resources of each of `processes` workers or actors, and disconnect.

    Workers that compute `together` all need a GPU, or none; actors do with fewer. Raises ConfigError where RAY_ADDRESS does not
    answer or lets nobody in, and where the cluster has too few resources, unless it grows.
    """
    with temporary() as folder, _apart(folder):
        yield from _on_a_cluster(config, processes, together, folder / LOG)


def _on_a_cluster(config: Config, processes: int, together: bool, log: Path) -> Iterator[Resources]:
    address = os.environ.get("RAY_ADDRESS", "")
    runtime = _environment_of_workers(config)
    gpus = config.cluster.gpus_per_worker
    if address and address != "local":
        place = _connected(address, runtime, gpus)
    else:
        gpus = gpus_here(gpus, processes, together)
        place = _private(runtime, math.ceil(processes * config.cluster.cpus_per_worker), gpus, log)
    with place:
        yield room_for(config.cluster, gpus, processes, together)


def _environment_of_workers(config: Config) -> dict[str, Any]:
    """`cluster.env` as a runtime environment. Ray shows those in its dashboard and logs, so what a shown config hides is not there.

    Those values are set by each worker as it starts.
    """
    shown = yaml.safe_load(to_yaml(config))["cluster"]["env"]
    plain = {name: value for name, value in config.cluster.env.items() if shown.get(name) == value}
    hidden = {name: value for name, value in config.cluster.env.items() if name not in plain}

    def set_hidden() -> None:  # travels by value, and needs nothing of ours
        import os

        os.environ.update(hidden)

    return {"env_vars": plain} | ({"worker_process_setup_hook": set_hidden} if hidden else {})


@contextmanager
def _connected(address: str, runtime: dict[str, Any], gpus: float) -> Iterator[None]:
    """The cluster at `address`; the code travels there, unless this is a submitted job, which it came with."""
    probe(address)
    with scratch() as folder:
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
            runtime["py_modules"] = [str(copy_package(folder))]
        _start({"address": address}, runtime, gpus)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _private(runtime: dict[str, Any], cpus: int, gpus: float, log: Path) -> Iterator[None]:
    """A cluster of this command alone on this machine: it listens on loopback, has its own token, and leaves nothing behind."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        dashboard = int(probe.getsockname()[1])
    path = os.pathsep.join(filter(None, [str(HOME), os.environ.get("PYTHONPATH", "")]))
    # Ray Train looks for the dashboard of the newest cluster on this machine, which may be another one, or dead.
    runtime["env_vars"] |= {"PYTHONPATH": path, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}"}
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away with notice
    # Ray's switch for laptops, where the node's address is 127.0.0.1, whatever the network says; then all servers listen there.
    ray_constants.ENABLE_RAY_CLUSTER = False
    runtime["env_vars"].setdefault("TMPDIR", tempfile.gettempdir())  # for workers; Ray's own servers leave files behind in theirs
    with scratch(_short_folder()) as folder, environment({"RAY_AUTH_TOKEN": _token(), "TMPDIR": str(folder)}):
        # The command's own processes need a share too, and a laptop may have fewer cores than the config has workers.
        room = max(os.cpu_count() or 1, cpus) + 1
        options = {"address": "local", "num_cpus": room, "dashboard_port": dashboard}
        try:
            _start(options | {"_temp_dir": str(folder)}, runtime, gpus)
            yield
        except Exception:
            ray.shutdown()
            _keep_logs(folder, log)
            raise
        finally:
            ray.shutdown()


def _keep_logs(folder: Path, log: Path) -> None:
    """Ray's logs of the last session that failed stay with the user's temporary folder, and with them `log`, what it said here."""
    kept = folder.parent / "ray-logs"
    shutil.rmtree(kept, ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / "session_latest").resolve().joinpath("logs").rename(kept)
        print(f"Ray's logs of this are in {kept}", file=sys.stderr, flush=True)
        shutil.copy(log, kept)
        os.truncate(log, 0)  # so that one place is named


def _start(options: dict[str, Any], runtime: dict[str, Any], gpus: float) -> None:
    if gpus == 0:
        runtime["env_vars"]["CUDA_VISIBLE_DEVICES"] = ""  # Ray hides no GPU from those who ask for none, and torch would take it
    try:
        with ending.kept():
            ray.init(**options, runtime_env=runtime, log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError as error:
        raise ConfigError(
            f"RAY_ADDRESS={options['address']}: the Ray cluster there did not let us in ({error}); check the address, and where it "
            "wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH"
        ) from error
    except Exception as error:  # of no type that tells more: a process that died, or took too long on a busy machine
        if options["address"] != "local":
            raise
        said = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise UserError(f"Ray did not start on this machine ({said}); see its logs, and give the command again") from error


@functools.cache
def _token() -> str:
    """What the private clusters of this process ask for. Without one, Ray leaves a token in the user's home, and from then on
    every `ray start --head` on this machine wants it."""
    return secrets.token_hex(32)


def _short_folder() -> str:
    """Where a private cluster's folder may be: Ray's sockets have long names below it, and the kernel takes 107 bytes in all."""
    longest = 107 - len(f"/freeguide-{os.getuid()}/run-12345678/session_2000-01-01_00-00-00_123456_1234567/sockets/plasma_store")
    folders = [os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "/tmp"]
    for folder in folders:
        if len(os.fsencode(folder)) <= longest and os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise UserError(
        f"Ray keeps sockets in a temporary folder, whose path may have {longest} bytes at most: {folders[0]} is too long and /tmp "
        "not for you to write to; set RAY_TMPDIR to a short one"
    )


@contextmanager
def _apart(folder: Path) -> Iterator[None]:
    """Until the end of the block, what Ray says goes to a log in `folder`, and `sys.stderr` is the terminal, as before.

    Ray's C++ writes to the descriptor, its loggers hold the `sys.stderr` of their beginning, and what its raylets complain of is
    printed by a thread. Logs of a failure are kept.
    """
    log, before = folder / LOG, sys.stderr
    try:
        redirected = before.fileno() == 2
    except (AttributeError, OSError, ValueError):  # it is closed, or no file
        redirected = False
    if redirected:
        before.flush()
        terminal = os.dup(2)
        with log.open("ab") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = open(terminal, "w", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
        complain = ray._private.worker.print_to_stdstream
        ray._private.worker.print_to_stdstream = lambda data, *_, **__: print(*data["lines"], sep="\n", file=before, flush=True)
    try:
        yield
    except Exception:
        if redirected and log.stat().st_size:
            shutil.copy(log, folder.parent)  # which outlasts this command
            print(f"what Ray said is in {folder.parent / LOG}", file=sys.stderr)
        raise
    finally:
        if redirected:
            ray._private.worker.print_to_stdstream = complain
            sys.stderr = before
            os.dup2(terminal, 2)
            os.close(terminal)
