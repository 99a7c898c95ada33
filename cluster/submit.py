"""`--submit http://HEAD:8265`: the same command as a Ray job, its log followed, its exit code returned.

The packages and the config travel with the job, so the cluster needs the requirements only. S3 credentials do not travel: jobs
use those of the nodes. The endpoint and region do, as they are no secret.
"""

import asyncio
import contextlib
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from aiohttp import ClientError

from cluster.session import PACKAGES, ROOT
from configs.errors import ConfigError, UserError

_FORWARDED = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")
_SILENCE = 300.0  # seconds without a line after which the connection may be dead, as after a laptop has slept
_TRIES, _PAUSE = 24, 5.0  # connections in a row that bring nothing, and the seconds between them


def submit(address: str, command: str, config: Path, overrides: list[str]) -> int:
    """Run `freeguide COMMAND CONFIG overrides` on the cluster at `address` and return its exit code.

    Raises ConfigError if no Ray dashboard answers there, and UserError where it answers no more: the job goes on.
    """
    _probe(address)
    from ray.job_submission import JobStatus, JobSubmissionClient

    client = JobSubmissionClient(address)
    with tempfile.TemporaryDirectory(prefix="freeguide-submit-") as folder:
        for package in PACKAGES:
            shutil.copytree(ROOT / package, Path(folder) / package, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(config, Path(folder) / config.name)
        job = client.submit_job(
            entrypoint=_quoted(["python", "-m", "cluster", command, config.name, *overrides]),
            runtime_env={"working_dir": folder, "env_vars": {name: os.environ[name] for name in _FORWARDED if name in os.environ}},
        )
    print(f"job {job} on {address}", flush=True)
    try:
        asyncio.run(_follow(client, address, job))
    except KeyboardInterrupt:
        print(f"\nthe job goes on; stop it with: ray job stop --address {address} {job}")
        return 130
    info = client.get_job_info(job)
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    return 0 if info.status == JobStatus.SUCCEEDED else 1


async def _follow(client: Any, address: str, job: str) -> None:
    """Print the log of a job to its end. Every connection brings it from its beginning: what has been shown is passed over."""
    shown = tries = 0
    while tries < _TRIES:
        tries += 1
        at, whole = 0, False
        log = client.tail_job_logs(job)
        try:
            with contextlib.suppress(asyncio.TimeoutError):
                while (lines := await asyncio.wait_for(anext(log, None), _SILENCE)) is not None:
                    print(lines[max(shown - at, 0) :], end="", flush=True)
                    at += len(lines)
                    shown, tries = max(shown, at), 0
                whole = True
            if client.get_job_status(job).is_terminal() and whole:
                return
            tries = 0  # it answers
        except (RuntimeError, OSError, ClientError):  # a proxy, a sleep, a head that is being restarted
            pass
        await asyncio.sleep(_PAUSE)
    raise UserError(
        f"the connection to {address} is lost, and job {job} goes on without it: follow it with "
        f"`ray job logs --address {address} --follow {job}`, and do not submit it again"
    )


def _probe(address: str) -> None:
    try:
        urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=10).close()
    except urllib.error.HTTPError:
        return  # somebody answers; what it asks for (a token, say) Ray's client knows better
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise ConfigError(
            f"--submit {address}: no Ray dashboard answers there ({reason}); give the head's, for example http://HEAD:8265"
        ) from error


def _quoted(words: list[str]) -> str:
    import shlex

    return shlex.join(words)
