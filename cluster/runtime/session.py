"""The Ray cluster of one command: the one that RAY_ADDRESS names (as inside a submitted job), or a private one on this machine."""

import contextlib
import fcntl
import functools
import json
import logging
import math
import os
import secrets
import shutil
import socket
import stat
import sys
import tempfile
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import grpc
import ray
import ray.autoscaler.sdk
import torch
import yaml
from ray._private import ray_constants, services
from ray._private.authentication import authentication_token_setup
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.exceptions import AuthenticationError
from ray.experimental import internal_kv

from freeguide.cluster.runtime import ending
from freeguide.cluster.runtime.submit import HOME, copy_package, essence, token_sentence
from freeguide.configs.errors import ConfigError, UserError, counted
from freeguide.configs.load import to_yaml
from freeguide.configs.schema import ClusterConfig, Config

LOG = "ray.log"  # what Ray writes to the standard error of this process
_temporary: Path | None = None  # where `temporary` lets this process write
T = TypeVar("T")

_LOOK_SECONDS = 5.0  # between two looks at a cluster that is too small
_ALIVE = "/ray.rpc.NodeInfoGcsService/CheckAlive"  # a question that any head answers
_HANDSHAKE = 10.0  # seconds that a server of gRPC may take to say that it is one
_REPORTS = 20.0  # seconds after its start in which an autoscaler has reported


@dataclass(frozen=True)
class Resources:
    """What Ray sets aside for one worker or actor."""

    cpus: float
    gpus: float

    @property
    def threads(self) -> int:
        """Threads for torch: part of what makes results repeat to the bit."""
        return max(1, int(self.cpus))

    @property
    def bundle(self) -> dict[str, float]:
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})


@contextmanager
def session(config: Config, processes: int, together: bool = False) -> Iterator[Resources]:
    """Connect, yield the resources of each of `processes` workers or actors, and disconnect.

    Workers that compute `together` all need a GPU, or none; actors do with fewer. Raises ConfigError where RAY_ADDRESS does not
    answer or lets nobody in, and where the cluster has too few resources, unless it grows.
    """
    with temporary() as folder, _apart(folder):
        yield from _on_a_cluster(config, processes, together)


def _on_a_cluster(config: Config, processes: int, together: bool) -> Iterator[Resources]:
    address = os.environ.get("RAY_ADDRESS", "")
    runtime = _environment_of_workers(config)
    gpus = config.cluster.gpus_per_worker
    if address and address != "local":
        place = _connected(address, runtime, gpus)
    else:
        gpus = _gpus_here(gpus, processes, together)
        place = _private(runtime, math.ceil(processes * config.cluster.cpus_per_worker), gpus)
    with place:
        yield _resources(config.cluster, gpus, processes, together)


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
    _probe(address)
    with scratch() as folder:
        if "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
            runtime["py_modules"] = [str(copy_package(folder))]
        _start({"address": address}, runtime, gpus)
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _private(runtime: dict[str, Any], cpus: int, gpus: float) -> Iterator[None]:
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
    with scratch(_short_folder()) as folder, _environment({"RAY_AUTH_TOKEN": _token(), "TMPDIR": str(folder)}):
        # The command's own processes need a share too, and a laptop may have fewer cores than the config has workers.
        room = max(os.cpu_count() or 1, cpus) + 1
        options = {"address": "local", "num_cpus": room, "dashboard_port": dashboard}
        try:
            _start(options | {"_temp_dir": str(folder)}, runtime, gpus)
            yield
        except Exception:
            ray.shutdown()
            _keep_logs(folder)
            raise
        finally:
            ray.shutdown()


def _keep_logs(folder: Path) -> None:
    """Ray's logs of the last session that failed stay with the user's temporary folder, and with them what it said here."""
    kept = folder.parent / "ray-logs"
    shutil.rmtree(kept, ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / "session_latest").resolve().joinpath("logs").rename(kept)
        print(f"Ray's logs of this are in {kept}", file=sys.stderr, flush=True)
        if _temporary is not None:
            shutil.copy(_temporary / LOG, kept)
            os.truncate(_temporary / LOG, 0)  # so that one place is named


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


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


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


def _gpus_here(gpus: float, processes: int, together: bool) -> float:
    """GPUs for each process of a private cluster on this machine; `gpus` is the config's number, -1 for one where there are any."""
    count, least = torch.cuda.device_count(), processes if together else 1
    if gpus < 0:
        if 0 < count < least:
            print(f"this machine has {count} GPU for {least} workers, so none is used; set cluster.workers={count}", flush=True)
        return 1.0 if count >= least else 0.0
    if least * gpus > count:
        raise ConfigError(
            f"cluster.gpus_per_worker={gpus:g} for {least} processes needs {least * gpus:g} GPUs and this machine has {count}; "
            "set it to 0, or name a cluster as RAY_ADDRESS"
        )
    return gpus


# --- a cluster that is too small ---


def _resources(options: ClusterConfig, gpus: float, processes: int, together: bool) -> Resources:
    """What each of `processes` gets, once those that have to run at the same time have a place: all `together`, or one.

    A cluster that is too small is waited for where it grows by itself, or for `cluster.wait_minutes`. Raises ConfigError.
    """
    began, least, asked = time.monotonic(), processes if together else 1, None
    while True:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        each = Resources(options.cpus_per_worker, _gpus(gpus, nodes))
        room = sum(_places(each, node) for node in nodes)
        if room >= least:
            break
        grows = _grows()
        bound = 60 * options.wait_minutes if options.wait_minutes or grows is False else math.inf
        if grows is None:  # its autoscaler, if it has one, has not reported yet
            bound = max(60 * options.wait_minutes, _REPORTS)
        lack, mend = _lack(each, least, room, nodes)
        if time.monotonic() - began >= bound:
            raise ConfigError(f"{lack}; {mend}")
        if asked is None and grows is not None:
            until = "" if bound == math.inf else f", for {options.wait_minutes:g} minutes at most"
            print(f"{lack}; waiting for it to grow{until}", flush=True)
        if grows is not None and asked != each:
            _ask_autoscaler([each.bundle] * least)
            asked = each
        time.sleep(_LOOK_SECONDS)
    if asked is not None:
        _ask_autoscaler([])  # what it waits for from here on, Ray knows
    if room < processes:
        print(f"the cluster has room for {room} of {processes} processes: what does not fit starts when it grows", flush=True)
    return each


def _gpus(gpus: float, nodes: list[dict[str, float]]) -> float:
    return gpus if gpus >= 0 else float(any(node.get("GPU", 0) for node in nodes))


def _places(each: Resources, node: dict[str, float]) -> int:
    """How many processes fit on a node that has nothing else to do."""
    return min(int(node.get(kind, 0) / amount + 1e-6) for kind, amount in each.bundle.items())


def _lack(each: Resources, least: int, room: int, nodes: list[dict[str, float]]) -> tuple[str, str]:
    """What is missing, and what to do about it."""
    kinds = each.bundle
    has = Counter(" and ".join(f"{node.get(kind, 0):g} {kind}" for kind in kinds) for node in nodes)
    there = ", ".join(f"{count} of {what}" for what, count in has.most_common(4))
    wanted = " and ".join(f"{amount:g} {kind}" for kind, amount in kinds.items())
    processes = counted(least, "process", "processes")
    return (
        f"the cluster is too small for {processes} of {wanted}, it has room for {room} (nodes: {there})",
        "lower cluster.workers, cluster.cpus_per_worker or cluster.gpus_per_worker, or set cluster.wait_minutes if it will grow",
    )


def _grows() -> bool | None:
    """Whether an autoscaler adds nodes; None where nobody has said yet. One without a configuration calls each type node_ID."""
    if os.environ.get("RAY_ADDRESS", "").startswith("ray://"):
        return None
    report = internal_kv._internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS)
    status = get_cluster_status(ray.get_runtime_context().gcs_address)
    kinds = {node.ray_node_type_name for node in (*status.active_nodes, *status.idle_nodes)}
    if report:
        kinds |= {*json.loads(report).get("autoscaler_report", {}).get("node_type_mapping", {}).values()}
    if any(not kind.startswith("node_") for kind in kinds):
        return True
    return False if report else None


def _ask_autoscaler(bundles: list[dict[str, float]]) -> None:
    ray.autoscaler.sdk.request_resources(bundles=bundles)


# --- its address ---


def _probe(address: str) -> None:
    """Raise ConfigError where no server of Ray answers at `address`: Ray itself would try for minutes, with a line for each try."""
    client, here = address.startswith("ray://"), f"RAY_ADDRESS={address}"
    give = "start one, or unset RAY_ADDRESS to use this machine"
    if address == "auto":
        address = services.find_bootstrap_address(None) or next(iter(services.find_gcs_addresses()), "")
        if not address:
            raise ConfigError(f"{here}: no Ray cluster runs on this machine; {give}")
    try:
        parts = urllib.parse.urlsplit(address if client else f"//{address}")
        host, port = parts.hostname, parts.port or (10001 if client else 0)
    except ValueError as error:
        raise ConfigError(
            f"{here}: no address of a Ray cluster ({error}); give HEAD:6379, or unset it to use this machine"
        ) from error
    if not host or not port or parts.path.strip("/"):
        raise ConfigError(f"{here}: no address of a Ray cluster; give HEAD:6379, or unset it to use this machine")
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        raise ConfigError(f"{here}: no Ray cluster answers there ({error}); {give}") from error
    if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
        return
    with grpc.insecure_channel(f"[{host}]:{port}" if ":" in host else f"{host}:{port}") as channel:
        try:
            grpc.channel_ready_future(channel).result(_HANDSHAKE)
        except grpc.FutureTimeoutError as error:
            raise ConfigError(f"{here}: another server than Ray's answers there; give the head's port, mostly 6379") from error
        if not client and "RAY_JOB_CONFIG_JSON_ENV_VAR" not in os.environ:
            _check_token(channel, address)


def _check_token(channel: grpc.Channel, address: str) -> None:
    """Raise UserError if the head wants another token than ours: Ray would try for half a minute, and then say less.

    A head that wants one gets the user's: without RAY_AUTH_MODE, Ray would send none.
    """

    def lets_in(**token: str) -> bool:
        try:
            channel.unary_unary(_ALIVE)(b"", timeout=_HANDSHAKE, metadata=[*token.items()])
        except grpc.RpcError as error:
            return bool(error.code() != grpc.StatusCode.UNAUTHENTICATED)  # whatever else it is, Ray says it better
        return True

    if lets_in():
        return
    if "RAY_AUTH_MODE" not in os.environ:
        authentication_token_setup._enable_token_auth()
    try:
        token = authentication_token_setup.AuthenticationTokenLoader.instance().get_raw_token(ignore_auth_mode=True)
    except AuthenticationError as error:
        raise UserError(f"the token for the cluster at {address} cannot be read ({essence(str(error))}); mend it") from error
    if os.environ["RAY_AUTH_MODE"].lower() != "token" or not token or not lets_in(authorization=f"Bearer {token}"):
        raise UserError(token_sentence(address, "Authentication failed" if token else ""))


def private_folder(parent: str = "") -> Path:
    """This user's own temporary folder, made with mode 0700 in `parent` (default: TMPDIR, /tmp). Raises UserError."""
    folder = Path(parent or tempfile.gettempdir()) / f"freeguide-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise UserError(f"{folder} is no folder of yours, and temporary files go there; set TMPDIR to another folder")
        if stat.S_IMODE(found.st_mode) != 0o700:
            folder.chmod(0o700)
    except OSError as error:
        raise UserError(f"no temporary folder can be made ({error}); set TMPDIR to a folder that you may write to") from error
    return folder


@contextmanager
def scratch(parent: str = "") -> Iterator[Path]:
    """A temporary folder of this command alone, gone at its end; so are then those of commands that were killed.

    A folder is alive as long as a process holds its lock, which the kernel takes away with the process. Raises UserError.
    """
    home = private_folder(parent)
    try:
        with _locked(home):  # so that nobody sweeps a folder between its making and its lock
            for folder in home.glob("run-*"):
                with contextlib.suppress(OSError), _locked(folder, wait=False):
                    shutil.rmtree(folder, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix="run-", dir=home))
            lock = contextlib.ExitStack()
            lock.enter_context(_locked(folder))
    except OSError as error:
        raise UserError(f"no temporary folder can be made in {home} ({error}); set TMPDIR to a folder with room") from error
    with lock:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def temporary() -> Iterator[Path]:
    """What this process and those that it starts write to temporary folders, all libraries included, goes to its `scratch`.

    But not what torch has compiled, which stays with the user for the next command, and not Ray's sockets, whose paths have to be
    short. Raises UserError.
    """
    global _temporary
    if _temporary is not None:
        yield _temporary
        return
    before, compiled = tempfile.tempdir, private_folder() / "compiled"
    ours = {"RAY_TMPDIR": tempfile.gettempdir(), "TORCHINDUCTOR_CACHE_DIR": str(compiled)}
    with scratch() as folder, _environment({"TMPDIR": str(folder)} | {n: os.environ.get(n, ours[n]) for n in ours}):
        _temporary, tempfile.tempdir = folder, str(folder)
        try:
            yield folder
        finally:
            _temporary, tempfile.tempdir = None, before


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)


def progress(results: Iterable[T], total: int, what: str, at_once: int = 1) -> Iterator[T]:
    """Pass results on; print how many there are and when the last is due, in place on a terminal, else every 5 seconds.

    `at_once` results are in the making at a time. The time until the first of them is the start, of which the rest needs no other.
    """
    first, printed, terminal = time.monotonic(), -math.inf, sys.stdout.isatty()
    for count, result in enumerate(results, start=1):
        yield result
        now = time.monotonic()
        if count == 1:
            first = now
        if terminal or count == total or now - printed >= 5:
            rounds, left = (count - 1) // at_once, total - count
            eta = f"  eta {timedelta(seconds=math.ceil((now - first) / rounds / at_once * left))}" if rounds else ""
            print(f"{what} {count}/{total}{eta}", end="\r" if terminal and count < total else "\n", flush=True)
            printed = now
