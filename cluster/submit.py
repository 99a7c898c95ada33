"""`--submit http://HEAD:8265`: the same command as a Ray job, its log followed, its exit code returned.

The packages and the config travel with the job, so the cluster needs the requirements only. S3 credentials do not travel: jobs
use those of the nodes. The endpoint and region do, as they are no secret.
"""

import asyncio
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from pathlib import Path

from cluster.session import PACKAGES, ROOT
from configs.errors import ConfigError

_FORWARDED = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION")


def submit(address: str, command: str, config: Path, overrides: list[str]) -> int:
    """Run `freeguide COMMAND CONFIG overrides` on the cluster at `address` and return its exit code.

    Raises ConfigError if no Ray dashboard answers there.
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
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        print(f"\nthe job goes on; stop it with: ray job stop --address {address} {job}")
        return 130
    info = client.get_job_info(job)
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    return 0 if info.status == JobStatus.SUCCEEDED else 1


async def _follow(client: object, job: str) -> None:
    async for lines in client.tail_job_logs(job):  # type: ignore[attr-defined]
        print(lines, end="", flush=True)


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
