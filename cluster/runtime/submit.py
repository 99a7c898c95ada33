"""`--submit http://HEAD:8265`: the same command as a Ray job, its log followed, its exit code returned.

The packages and what was typed travel with the job, as files: nothing of it stands on its command line, and references such as
`${oc.env:NAME}` are resolved where the job runs. So the cluster needs the requirements only. S3 credentials do not travel: jobs use
those of the nodes. The endpoint and region do, as they are no secret.

Whatever the job server answers, other than what was asked for, ends in one sentence.
"""

import asyncio
import contextlib
import http.client
import json
import logging
import os
import re
import secrets
import shlex
import shutil
import signal
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import ClientError

import freeguide
from freeguide.cluster.runtime.checks import contradictions
from freeguide.configs.errors import ConfigError, UserError
from freeguide.configs.load import load_config
from freeguide.configs.locations import locate
from freeguide.data_pipeline.closure import NAME, ROOMS, ROOT

HOME = Path(freeguide.__file__).resolve().parents[1]  # the folder that `import freeguide` finds it in
OLDEST_RAY = (2, 60)  # as pyproject.toml says

_FORWARDED = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
_SILENCE = 300.0  # seconds without a line after which the connection may be dead, as after a laptop has slept
_TRIES, _PAUSE = 24, 5.0  # connections in a row that bring nothing, and the seconds between them
_ANSWER = 60.0  # seconds that the job server may take for an answer
_PATIENCE = 60.0  # seconds in which a cluster that has just started, or a proxy before it, may come to itself
# What Ray itself writes into the log of a job: of its job manager, of its C++, and what it passes on of its own actors.
_RAYS = re.compile(
    r"\d{4}-\d\d-\d\d [\d:,]+\t[A-Z]+ job_manager\.py:\d+ -- |Running entrypoint for job "
    r"|\[[\d-]+ [\d:,]+ [A-Z] \d+ \d+\] [\w/()]*[\w.]+\.cc:\d+: "
    r"|(?:\x1b\[\d+m)?\((?:raylet|PreemptionWatcher|PlacementGroupCleaner|TrainController|autoscaler)\b[^)]*\)"
)
_SOURCE_BYTES = 4 << 20  # no file of the packages is as large
T = TypeVar("T")


class _NotYet(UserError):
    """An answer that may be another one in a minute."""


def submit(address: str, command: str, config: Path, overrides: list[str]) -> int:
    """Run `freeguide COMMAND CONFIG overrides` on the cluster at `address` and return its exit code.

    Raises ConfigError for a location that the cluster does not see, before anything is sent, and UserError where the job server
    does not do as it is asked, or answers no more: the job goes on.
    """
    address = _address(address)
    _check_locations(config, overrides, command)
    _patiently(lambda: _check_server(address))
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):  # Ray's client would go there instead
        os.environ.pop(name, None)
    from ray.job_submission import JobStatus, JobSubmissionClient

    for name in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env.packaging"):
        logging.getLogger(f"ray.{name}").setLevel(logging.WARNING)  # they tell of every upload and connection
    client = _patiently(lambda: _asked(address, lambda: JobSubmissionClient(address)))
    job = f"freeguide-{command}-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory(prefix="freeguide-submit-") as folder:
        entrypoint = pack(Path(folder), command, config, overrides)
        runtime = {"working_dir": folder, "env_vars": _forwarded()}
        _patiently(lambda: _submitted(client, address, job, entrypoint, runtime))
    print(f"job {job} on {address}", flush=True)
    try:
        asyncio.run(_follow(client, address, job))
        info = _patiently(lambda: _asked(address, lambda: client.get_job_info(job)))
    except KeyboardInterrupt:
        print(f"\nthe job goes on; stop it with: ray job stop --address {address} {job}")
        return 130
    code = info.driver_exit_code
    if info.status == JobStatus.STOPPED:
        print(f"job {job} was stopped; the same command goes on", file=sys.stderr)
        return code if code and code > 0 else 128 + signal.SIGTERM
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if code is None:
        why = essence(info.message or "")
        raise UserError(f"job {job} did not start ({why}); Ray's dashboard says more: {address}")
    if code < 0:
        print(f"job {job} was killed by signal {-code}; the same command goes on", file=sys.stderr)
        return 128 - code
    return int(code)


# --- what travels ---


def pack(folder: Path, command: str, config: Path, overrides: list[str]) -> str:
    """Put the package, the config file and the overrides into `folder`; returns the command to run there. Raises ConfigError."""
    copy_package(folder)
    typed = folder / "job"
    typed.mkdir()
    shutil.copyfile(config, typed / config.name)
    words = ["python", "-m", "freeguide.cluster", command, f"job/{config.name}"]
    if overrides:
        if split := next((each for each in overrides if each.splitlines() != [each]), None):
            raise ConfigError(
                f"argument {split!r}: a value with line breaks does not travel with --submit; put it into the config file"
            )
        (typed / "overrides").write_text("".join(f"{each}\n" for each in overrides), encoding="utf-8")
        words.append("@job/overrides")
    return shlex.join(words)


def copy_package(folder: Path) -> Path:
    """Copy the sources of freeguide into `folder`, as a wheel lays them, and nothing else that lies about there; returns the copy.

    Links are not followed, and only regular files taken. Raises ConfigError for a file that is too large to be a source.
    """
    copy = folder / NAME
    copy.mkdir()
    shutil.copyfile(freeguide.__file__, copy / "__init__.py")
    for room in ROOMS:
        for where, below, names in os.walk(ROOT / room):
            place = Path(where)
            below[:] = sorted(name for name in below if (place / name / "__init__.py").is_file())
            (copy / place.relative_to(ROOT)).mkdir()
            for path in (place / name for name in sorted(names) if name.endswith((".py", ".yaml"))):
                if path.is_symlink() or not path.is_file():
                    continue
                if path.stat().st_size > _SOURCE_BYTES:
                    raise ConfigError(
                        f"{path} is too large to travel with a job ({path.stat().st_size:,} bytes); move it out of there"
                    )
                shutil.copyfile(path, copy / path.relative_to(ROOT), follow_symlinks=False)
    return copy


def _forwarded() -> dict[str, str]:
    found = {name: os.environ[name] for name in _FORWARDED if os.environ.get(name)}
    for name, value in found.items():
        if "@" in urllib.parse.urlsplit(value).netloc:
            raise ConfigError(f"{name} holds credentials, which do not travel with a job; set it in the environment of the nodes")
    return found


# --- what the cluster sees ---

# Locations that other commands do not touch: a folder of this machine may stand there.
_ONLY = {
    "run": ("train", "generate", "evaluate", "export"),
    "data.path": ("prepare",),
    "data.mixture": ("index",),
    "data.disk_cache": (),  # a folder of each node
    "evaluate": ("evaluate", "fit-evaluator"),
}


def _check_locations(path: Path, overrides: list[str], command: str) -> None:
    shared = load_config(path, overrides, command, contradictions=contradictions).cluster.shared_folders
    if wrong := next((each for each in shared if not each.startswith("/")), None):
        raise ConfigError(f"cluster.shared_folders={wrong}: give the whole path that the folder has on all nodes, /nfs for example")

    def seen(key: str, uri: str) -> str:
        place = locate(uri)
        concerns = next((_ONLY[name] for name in _ONLY if f"{key}.".startswith(f"{name}.")), (command,))
        if place.bucket or command not in concerns:
            return place.uri
        if not uri.lower().startswith(("/", "file:/")):
            raise ConfigError(
                f"{key}={uri}: with --submit, a path from here means another place on the cluster; give s3://bucket/prefix"
            )
        if not any(f"{place.path}/".startswith(f"{locate(each).path.rstrip('/')}/") for each in shared):
            raise ConfigError(
                f"{key}={uri}: with --submit, a folder of this machine is not what the cluster's nodes see; give "
                "s3://bucket/prefix, or name it in cluster.shared_folders if all nodes share it under this path"
            )
        return place.uri

    load_config(path, overrides, command, seen, contradictions)


# --- what the job server says ---


def _address(typed: str) -> str:
    """The dashboard's address as it is used and printed. Raises ConfigError."""
    give = "give the address of the head's dashboard, for example http://HEAD:8265"
    try:
        parts = urllib.parse.urlsplit(typed)
        parts.port  # noqa: B018  # raises for what is no port
    except ValueError as error:
        raise ConfigError(f"--submit {typed}: {error}; {give}") from error
    if "@" in parts.netloc:
        raise ConfigError(f"--submit {parts.scheme}://...@{parts.hostname}: credentials do not belong into the address; {give}")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--submit {typed}: no address of a dashboard; {give}")
    return typed.rstrip("/")


def _check_server(address: str) -> None:
    """Whether a job server of Ray answers that can run this code; Ray's own client says it in tracebacks, and waits without end."""
    here = f"--submit {address}"
    give = "give the head's, for example http://HEAD:8265"
    try:
        with urllib.request.urlopen(f"{address}/api/version", timeout=10) as answer:
            text = answer.read(1 << 16)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):  # before ray is imported, which reads this: a cluster that wants a token gets the user's
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            return
        if error.code >= 500:
            raise _NotYet(f"{here}: the server there answers with {error.code} {error.reason}; {give}") from error
        raise ConfigError(f"{here}: no Ray dashboard answers there ({error.code} {error.reason}); {give}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(f"{here}: no Ray dashboard answers there ({reason}); {give}") from error
    try:
        version = str(json.loads(text)["ray_version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{here}: another server than a Ray dashboard answers there; {give}") from error
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_RAY:
        raise ConfigError(
            f"{here}: the cluster runs Ray {version}, and freeguide needs {OLDEST_RAY[0]}.{OLDEST_RAY[1]} or newer; update it"
        )


def _submitted(client: Any, address: str, job: str, entrypoint: str, runtime: dict[str, Any]) -> None:
    try:
        _asked(address, lambda: client.submit_job(submission_id=job, entrypoint=entrypoint, runtime_env=dict(runtime)))
    except UserError as error:
        if job not in str(error) or "already exists" not in str(error):  # an earlier try arrived, and its answer was lost
            raise


def _asked(address: str, call: Callable[[], T]) -> T:
    """What Ray's client answers. Raises UserError for whatever else comes back, _NotYet where it may be tried again."""
    from ray.exceptions import AuthenticationError

    answer: Future[T] = Future()

    def ask() -> None:  # in a thread, as the client has no limit for its waits
        try:
            answer.set_result(call())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True).start()
    here = f"the job server at {address}"
    try:
        return answer.result(_ANSWER)
    except AuthenticationError as error:
        raise UserError(token_sentence(address, str(error))) from None
    except NoAnswer:
        raise _NotYet(f"{here} does not answer within {_ANSWER:g} seconds; see whether the head is well") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{here} does not answer as Ray's does ({essence(str(error))}); check the address and its Ray") from error
    except OSError as error:
        raise _NotYet(f"{here} does not answer ({essence(str(error))}); see whether the head is well") from error
    except RuntimeError as error:
        found = re.search(r"status code (\d+): (.*)", str(error), re.DOTALL)
        if found is None:
            raise UserError(f"{here} refuses: {essence(str(error))}") from error
        code, why = int(found[1]), essence(found[2].removesuffix("."))
        if "No available agent" in why:
            raise _NotYet(
                f"{here} has no agent that starts jobs: the cluster is not up yet, or another Ray on the head's machine has its "
                "agent's port (then start the head with --dashboard-agent-listen-port=0)"
            ) from error
        if code in (429, 502, 503, 504):
            raise _NotYet(f"{here} answers with {code} ({why}); see whether the head is well") from error
        raise UserError(f"{here} refuses with {code}: {why}") from error


def _patiently(call: Callable[[], T]) -> T:
    """`call()`, again for `_PATIENCE` seconds where the answer is not final."""
    deadline, told = time.monotonic() + _PATIENCE, False
    while True:
        try:
            return call()
        except _NotYet as error:
            if time.monotonic() >= deadline:
                raise
            if not told:
                print(f"{error}; trying again for {_PATIENCE:g} seconds", file=sys.stderr, flush=True)
            told = True
        time.sleep(_PAUSE)


def token_sentence(address: str, said: str) -> str:
    there, mode = f"the cluster at {address}", os.environ.get("RAY_AUTH_MODE", "")
    if mode.lower() != "token":
        return f"{there} wants a token, and RAY_AUTH_MODE={mode} sends none; unset it"
    give = "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file, with what `ray get-auth-token` prints on its head"
    if "Authentication failed" not in said:
        return f"{there} wants a token, and there is none here; {give}"
    ours = next((name for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH") if os.environ.get(name)), "~/.ray/auth_token")
    return f"{there} does not take the token of {ours}; {give}"


def essence(text: str) -> str:
    """What a message, a traceback or a page says, in one line."""
    text = text.strip()
    if text.startswith("<"):
        return "an HTML page"
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no reason is given"]
    line = lines[-1] if lines[0].startswith("Traceback") else lines[0]
    return " ".join(line.split())[:300].rstrip(" .")


async def _follow(client: Any, address: str, job: str) -> None:
    """Print the log of a job to its end, but for Ray's own lines, which stay in it.

    Every connection brings it from its beginning: what has been shown is passed over.
    """
    with _Lines() as lines:
        await _followed(client, address, job, lines)


class _Lines(contextlib.AbstractContextManager["_Lines"]):
    """Prints whole lines as they come, those that are not Ray's, and at its end what has no end."""

    def __init__(self) -> None:
        self._begun = ""

    def write(self, text: str) -> None:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            if not _RAYS.match(line):
                print(line, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._begun and not _RAYS.match(self._begun):
            print(self._begun, flush=True)


async def _followed(client: Any, address: str, job: str, told: _Lines) -> None:
    shown = tries = 0
    while tries < _TRIES:
        tries += 1
        at, whole = 0, False
        log = client.tail_job_logs(job)
        try:
            with contextlib.suppress(asyncio.TimeoutError):
                while (lines := await asyncio.wait_for(anext(log, None), _SILENCE)) is not None:
                    told.write(lines[max(shown - at, 0) :])
                    at += len(lines)
                    shown, tries = max(shown, at), 0
                whole = True
            if client.get_job_status(job).is_terminal() and whole:
                return
            tries = 0  # it answers
        except (
            RuntimeError,
            OSError,
            ValueError,
            KeyError,
            ClientError,
        ) as error:  # a proxy, a sleep, a head that is being restarted
            if "status code 404" in str(error) and "does not exist" in str(error):
                raise UserError(
                    f"the cluster at {address} does not know job {job} any more, as its head was started again; the same command "
                    "goes on"
                ) from error
        await asyncio.sleep(_PAUSE)
    raise UserError(
        f"the connection to {address} is lost, and job {job} goes on without it: follow it with "
        f"`ray job logs --address {address} --follow {job}`, and do not submit it again"
    )
