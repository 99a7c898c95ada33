import contextlib
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.untrained import through, write_lab

ROOT = Path(__file__).parents[2]
Freeguide = Callable[..., "subprocess.CompletedProcess[str]"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data, an evaluator and a reference, as `write_lab` makes them, for the tests of one file."""
    folder = tmp_path_factory.mktemp("lab")
    write_lab(folder)
    return folder


@pytest.fixture(scope="session")
def s3() -> Iterator[str]:
    """moto's S3 server with the bucket `lab`; its endpoint. Sets AWS_* for this process and its children."""
    from moto.server import ThreadedMotoServer

    from freeguide.data_pipeline.store.open import create_bucket

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    patch.setenv("AWS_ACCESS_KEY_ID", "lab")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "lab-secret")
    patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    create_bucket("s3://lab")
    yield f"http://{host}:{port}"
    patch.undo()
    server.stop()


@pytest.fixture
def strict_s3(s3: str) -> Iterator[None]:
    """The server with its credentials checked for one test: moto does not do so by itself."""

    def authenticate(after: str) -> None:
        url, plain = f"{s3}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, after.encode(), plain, method="POST")).close()

    authenticate("0")
    yield
    authenticate("inf")


@contextlib.contextmanager
def started_head(folder: Path, environment: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """A cluster started with `ray start --head` in that environment: (address for RAY_ADDRESS, address of its dashboard)."""
    port, dashboard, client = free_port(), free_port(), free_port()
    ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
    ports.append("--dashboard-agent-listen-port=0")  # else the agent of another head here has it, and this one takes no jobs
    # A job asks its head's temporary folder for the newest cluster, which in the common one may be somebody else's. The name is
    # short, as those of sockets end at 107 characters.
    private = tempfile.mkdtemp(prefix="freeguide-head-")
    ports.append(f"--temp-dir={private}")
    small = ["--num-cpus=4", "--object-store-memory=200000000", "--node-ip-address=127.0.0.1", "--disable-usage-stats"]
    programs = Path(sys.executable).parent
    node = {  # `python` is the node's, with the requirements; the code has to come with the job
        "PYTHONPATH": "",
        "PATH": f"{programs}{os.pathsep}{environment['PATH']}",
    }
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(
            [sys.executable, str(programs / "ray"), "start", "--head", "--block", *ports, *small],
            cwd=folder, env={**environment, **node}, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    url = f"http://127.0.0.1:{dashboard}"
    deadline = time.monotonic() + 90
    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/api/version", timeout=5).close()
                break
            except urllib.error.HTTPError:
                break  # it answers, and asks for the token
            except OSError:
                alive = head.poll() is None and time.monotonic() < deadline
                assert alive, (folder / "head.log").read_text()
                time.sleep(0.5)
        yield f"127.0.0.1:{port}", url
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        try:
            head.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
            head.wait()
        shutil.rmtree(private, ignore_errors=True)


@pytest.fixture(scope="session")
def ray_head(s3: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A cluster of the tests' own, which asks for their token: (address for RAY_ADDRESS, address of its dashboard)."""
    with started_head(tmp_path_factory.mktemp("ray"), os.environ) as addresses:
        yield addresses


@pytest.fixture
def freeguide(tmp_path: Path) -> Freeguide:
    """freeguide("train", "configs/digits.yaml", ...) runs the command line in an empty folder."""

    def run(
        command: str, config: str, *arguments: str, cwd: Path = tmp_path, **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-m", "cluster", command, config if "://" in config else str(ROOT / config), *arguments],
            cwd=cwd, env=os.environ | here | environment, capture_output=True, text=True, timeout=280,
        )  # fmt: skip

    return run


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the local engine has run, in order, but for rows."""
    from freeguide.cluster.evaluation.fold import Fold
    from freeguide.cluster.runtime.engines import ENGINES

    seen: list[Any] = []

    def noted(done: Iterator[Any]) -> Iterator[Any]:
        for item in done:
            if not isinstance(item, Fold):
                seen.append(item)
            yield item

    monkeypatch.setitem(ENGINES, "local", through(noted))
    return seen


@pytest.fixture
def words_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports without their figures, which take seconds."""
    from freeguide.cluster.evaluation.report import figures

    monkeypatch.setattr(figures, "curves", lambda *_: b"")
    monkeypatch.setattr(figures, "frontier", lambda *_: b"")
