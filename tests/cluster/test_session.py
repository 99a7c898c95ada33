"""The cluster of a command: what Ray says, and what a private one leaves behind."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import ray
from ray.train.torch import TorchTrainer

from freeguide.cluster.runtime.session import _short_folder, session
from freeguide.configs.errors import UserError
from freeguide.configs.schema import Config


def test_what_ray_says_goes_to_a_log_that_is_named_when_something_fails(tmp_path: Path) -> None:
    code = """
import os, sys, ray
from pathlib import Path
from freeguide.cluster.runtime.session import _apart
old = sys.stderr
folder = Path(sys.argv[1])
with _apart(folder):
    os.write(2, b"core_worker.cc: noise\\n")
    ray._private.worker.print_to_stdstream({"lines": ["Task failed"], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    print("a logger", file=old)
    print("ours", file=sys.stderr)
    if len(sys.argv) > 2:
        raise RuntimeError("a defect")
"""
    folder = tmp_path / "run"
    folder.mkdir()
    ended = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=100)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("", "ours\n", 0)
    assert (folder / "ray.log").read_text().splitlines() == ["core_worker.cc: noise", "Task failed", "a logger"]
    assert not (tmp_path / "ray.log").exists()
    ended = subprocess.run([sys.executable, "-c", code, str(folder), "fail"], capture_output=True, text=True, timeout=100)
    assert f"what Ray said is in {tmp_path}/ray.log\n" in ended.stderr
    assert "RuntimeError: a defect" in ended.stderr  # with its traceback
    assert "noise" in (tmp_path / "ray.log").read_text()


def test_names_of_ray_that_are_not_public_are_there() -> None:
    assert callable(ray._private.worker.print_to_stdstream)
    assert callable(TorchTrainer._register_sigint_handler)  # type: ignore[attr-defined]


ALONE = """
import os, psutil, ray, tempfile
from pathlib import Path
from freeguide.cluster.runtime.session import session
from freeguide.configs.load import load_config

SECRET = ["cluster.env={MY_TOKEN: hunter2, MY_LEVEL: on, MY_LOGIN: '${oc.env:LOGIN}'}"]
with session(load_config("configs/digits.yaml", ["cluster.gpus_per_worker=0", *SECRET]), 2) as resources:
    ray.get([ray.remote(lambda: None).remote() for _ in range(2)])
    me = psutil.Process()
    sockets = [c for p in (me, *me.children(recursive=True)) for c in p.net_connections("inet") if c.status == "LISTEN"]
    print(*{c.laddr.ip for c in sockets})
    print(len(sockets) > 5, resources)
    print(os.environ.get("TMPDIR") != tempfile.gettempdir(), ray.get(ray.remote(lambda: os.environ["TMPDIR"]).remote()))
    print(ray.get(ray.remote(lambda: [os.environ[f"MY_{name}"] for name in ("TOKEN", "LEVEL", "LOGIN")]).remote()))
    own = ray.remote(lambda: os.environ["MY_TOKEN"] + os.environ["MY_OWN"]).options(runtime_env={"env_vars": {"MY_OWN": "4"}})
    print(ray.get(own.remote()))
    written = [p for p in Path(ray._private.worker._global_node.get_session_dir_path()).rglob("*") if p.is_file()]
    print(ray.get_runtime_context().runtime_env["env_vars"]["MY_LEVEL"], len(written) > 5)
    print(*[p for p in written if b"hunter" in p.read_bytes()], "hunter" in str(ray.get_runtime_context().runtime_env))
"""


def test_a_private_cluster_listens_on_loopback_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """With the environment of a user, who has set nothing."""
    home, temporary = tmp_path / "home", Path(tempfile.mkdtemp(dir="/tmp"))
    home.mkdir()
    clean = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": ".", "LOGIN": "hunter3"}
    ended = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=Path(__file__).parents[2], env=clean, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    addresses, enough, folders, *of_workers = ended.stdout.splitlines()[-7:]
    assert {*addresses.split()} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert enough == "True Resources(cpus=1.0, gpus=0.0)"
    assert re.fullmatch(rf"True {temporary}/freeguide-\d+/run-\w+", folders)
    assert list(home.rglob("*")) == []
    left = [place for place in temporary.rglob("*") if place.is_file()]
    shutil.rmtree(temporary)
    assert left == []
    # Secrets reach the workers, and neither Ray's logs nor what it shows of the job.
    assert of_workers == ["['hunter2', 'on', 'hunter3']", "hunter24", "on True", "False"]


def test_a_private_cluster_takes_a_temporary_folder_that_is_short_enough_for_sockets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 20)))
    assert _short_folder() == "/tmp"
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    assert _short_folder() == "/dev/shm"
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + 40 * "x")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"may have 1[0-9] bytes at most: /tmp/xxx.* is too long"):
        _short_folder()


def test_a_ray_that_does_not_start_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def late(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because some of the raylet failed to startup")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(ray, "init", late)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sentence = r"Ray did not start on this machine \(The current node timed out during startup\); see its logs"
    with pytest.raises(UserError, match=sentence), session(Config(), 1):
        pass
