"""The house of freeguide: imports run one way, and each heavy dependency lives in one room."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ["configs", "data_pipeline", "trainer", "cluster"]  # each may import the rooms before it
HOMES = {"ray": "cluster/", "deepspeed": "trainer/", "boto3": "data_pipeline/store/s3.py", "botocore": "data_pipeline/store/s3.py"}


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever the statement stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


def offences(path: Path, place: str) -> list[str]:
    """What is wrong with the imports of a file that stands at `place` in the repository."""
    room = place.split("/")[0]
    allowed = ROOMS[: ROOMS.index(room) + 1]
    found = []
    for module in imports(path):
        top = module.split(".")[0]
        if top in ROOMS and top not in allowed:
            found.append(f"{place} imports {module}: {room} may import {', '.join(allowed)} only")
        if top in HOMES and not place.startswith(HOMES[top]):
            found.append(f"{place} imports {module}, whose only home is {HOMES[top]}")
        if place.startswith("trainer/diffusion/") and top == "trainer" and not module.startswith("freeguide.trainer.diffusion"):
            found.append(f"{place} imports {module}: the mathematics stands alone")
        if place.startswith("cluster/metrics/") and top == "cluster" and not module.startswith("cluster.metrics"):
            found.append(f"{place} imports {module}: the metrics stand alone")
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way_and_heavy_dependencies_stay_at_home(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    assert [o for file in files for o in offences(file, file.relative_to(ROOT).as_posix())] == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("configs/load.py", "from trainer.loop import train"),
        ("data_pipeline/stream.py", "import freeguide.cluster.cli"),
        ("trainer/training/loop.py", "from cluster import train"),
        ("trainer/training/loop.py", "def f():\n    import ray.train"),
        ("data_pipeline/order.py", "import boto3"),
        ("cluster/jobs/train.py", "import deepspeed"),
        ("cluster/jobs/train.py", "from botocore.config import Config"),
        ("trainer/diffusion/schedule.py", "from trainer.engine import Engine"),
        ("cluster/evaluation/statistics/fid.py", "from cluster.session import session"),
    ],
)
def test_an_import_that_runs_the_wrong_way_is_found(tmp_path: Path, place: str, line: str) -> None:
    (tmp_path / "file.py").write_text(line + "\n")
    assert len(offences(tmp_path / "file.py", place)) == 1


def test_every_package_is_shipped() -> None:
    listed = (ROOT / "pyproject.toml").read_text().split("packages = [")[1].split("]")[0]
    packages = {
        file.parent.relative_to(ROOT).as_posix().replace("/", ".") for room in ROOMS for file in (ROOT / room).rglob("__init__.py")
    }
    assert {p.strip().strip('"') for p in listed.split(",")} == packages


def test_help_and_a_wrong_key_do_not_wait_for_torch_or_ray() -> None:
    code = (
        "import sys; from cluster.cli import main; main(['inspect', 'configs/digits.yaml', 'no.such=1']);"
        "print([m for m in ('torch', 'ray', 'boto3') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]", ended.stdout
    assert "unknown key no.such" in ended.stderr


def test_the_tests_do_not_depend_on_the_settings_of_a_user() -> None:
    """AWS settings of any kind, a proxy, and a cluster that does not answer; tried on one test that talks to a server."""
    theirs = {"AWS_PROFILE": "none", "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "AWS_USE_FIPS_ENDPOINT": "true"}
    theirs |= dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:9") | {"RAY_ADDRESS": "127.0.0.1:9"}
    one = "tests/data_pipeline/test_store.py::test_put_get_stat_list_delete"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | theirs
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", one]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout
