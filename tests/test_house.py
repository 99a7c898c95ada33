"""The house of freeguide: imports run one way, and each heavy dependency lives in one room."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
ROOMS = ["configs", "data_pipeline", "trainer", "cluster"]  # each may import the rooms before it
PARTS = {  # so do the parts of a room
    "trainer": [
        "trainer.diffusion",
        "trainer.networks",
        "trainer.checkpoints",
        "trainer.weights",
        "trainer.rounding",
        "trainer.sampler",
        "trainer.training",
        "trainer.__main__",
    ],
    "cluster": ["cluster.evaluation", "cluster.runtime", "cluster.jobs", "cluster.cli", "cluster.__main__"],
}
HOMES = {
    "boto3": ["data_pipeline/store/"],
    "botocore": ["data_pipeline/store/"],
    "deepspeed": ["trainer/training/engine.py"],
    "ray": ["cluster/runtime/", "cluster/jobs/train.py"],
    "matplotlib": ["cluster/evaluation/report/"],
    "tensorboard": ["trainer/training/telemetry.py"],
}


def module_of(place: str) -> str:
    return place.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path: Path, place: str) -> Iterator[str]:
    """Every module that a file imports, wherever the statement stands; ours without `freeguide.`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.removeprefix("freeguide.") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place}: relative import"
            module = f"{node.module}.".removeprefix("freeguide.").removesuffix(".")
            for alias in node.names:
                whole = f"{module}.{alias.name}".strip(".")
                there = ROOT / whole.replace(".", "/")
                yield whole if there.with_suffix(".py").is_file() or there.is_dir() else module


def bare(path: Path) -> list[str]:
    """Imports of a room by a name that another distribution may have."""
    found = [node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    found += [alias.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import) for alias in node.names]
    return [name for name in found if name.split(".")[0] in ROOMS]


def rank(module: str, parts: list[str]) -> int | None:
    return next((at for at, part in enumerate(parts) if f"{module}.".startswith(f"{part}.")), None)


def offences(path: Path, place: str) -> list[str]:
    """What is wrong with the imports of a file that stands at `place` in the repository."""
    here, room = module_of(place), place.split("/")[0]
    found = [f"{place} imports {name}: write freeguide.{name}" for name in bare(path)]
    for module in set(imports(path, place)):
        top = module.split(".")[0]
        if top in ROOMS[ROOMS.index(room) + 1 :]:
            found.append(f"{place} imports {module}: {room} may import {', '.join(ROOMS[: ROOMS.index(room) + 1])} only")
        if top == room and room in PARTS:
            ours, theirs = rank(here, PARTS[room]), rank(module, PARTS[room])
            if ours is not None and theirs is not None and theirs > ours:
                found.append(f"{place} imports {module}: {PARTS[room][ours]} stands before {PARTS[room][theirs]}")
        if top in HOMES and not any(place.startswith(home) for home in HOMES[top]):
            found.append(f"{place} imports {module}, whose only home is {' and '.join(HOMES[top])}")
    return found


def files() -> dict[str, Path]:
    return {path.relative_to(ROOT).as_posix(): path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py"))}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way_and_heavy_dependencies_stay_at_home(room: str) -> None:
    mine = {place: path for place, path in files().items() if place.startswith(f"{room}/")}
    assert mine
    assert [offence for place, path in mine.items() for offence in offences(path, place)] == []


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("configs/load.py", "from freeguide.trainer.training.loop import train"),
        ("configs/load.py", "from freeguide import trainer"),
        ("configs/load.py", "from configs.errors import UserError"),
        ("data_pipeline/stream.py", "import freeguide.cluster.cli"),
        ("trainer/training/loop.py", "from freeguide.cluster.jobs import train"),
        ("trainer/training/loop.py", "def f():\n    import ray.train"),
        ("trainer/sampler.py", "from freeguide.trainer.training.loop import train"),
        ("trainer/checkpoints/search.py", "from freeguide.trainer.weights import weights_of"),
        ("trainer/diffusion/schedule.py", "from freeguide.trainer.networks import build"),
        ("data_pipeline/order.py", "import boto3"),
        ("cluster/jobs/train.py", "import deepspeed"),
        ("cluster/jobs/train.py", "from botocore.config import Config"),
        ("cluster/jobs/evaluate.py", "import ray"),
        ("cluster/evaluation/statistics/fid.py", "from freeguide.cluster.runtime.session import session"),
        ("cluster/runtime/session.py", "from freeguide.cluster.jobs import train"),
    ],
)
def test_an_import_that_runs_the_wrong_way_is_found(tmp_path: Path, place: str, line: str) -> None:
    (tmp_path / "file.py").write_text(line + "\n")
    assert len(offences(tmp_path / "file.py", place)) == 1


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Every module that reaches itself, with the way there."""
    found = []
    for start in graph:
        todo, seen = [[start]], {start}
        while todo:
            way = todo.pop()
            for module in sorted(graph[way[-1]] & graph.keys()):
                if module == start:
                    found.append([*way, start])
                elif module not in seen:
                    seen.add(module)
                    todo.append([*way, module])
    return found


def test_no_module_imports_itself_on_any_way() -> None:
    graph = {module_of(place): set(imports(path, place)) - {module_of(place)} for place, path in files().items()}
    assert circles(graph) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c", "b"], ["c", "b", "c"]]


def test_every_package_is_shipped() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {f"freeguide.{module_of(place)}" for place in files() if place.endswith("/__init__.py")}
    assert set(settings["packages"]) == packages | {"freeguide"}
    assert settings["package-dir"] == {"freeguide": "freeguide"} | {f"freeguide.{room}": room for room in ROOMS}
    folders = {Path(place).parent for place in files()}
    assert folders == {Path(place).parent for place in files() if place.endswith("__init__.py")}


def test_help_and_a_wrong_key_do_not_wait_for_torch_or_ray() -> None:
    code = (
        "import sys; from freeguide.cluster.cli import main; main(['inspect', 'configs/digits.yaml', 'no.such=1']);"
        "print([m for m in ('torch', 'ray', 'boto3') if m in sys.modules])"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == "[]", ended.stdout
    assert "unknown key no.such" in ended.stderr


def test_the_tests_do_not_depend_on_the_settings_of_a_user() -> None:
    """AWS settings of any kind, a proxy, and a cluster that does not answer; tried on one test that talks to a server."""
    theirs = {"AWS_PROFILE": "none", "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9", "AWS_USE_FIPS_ENDPOINT": "true"}
    theirs |= dict.fromkeys(("http_proxy", "HTTP_PROXY", "all_proxy"), "http://127.0.0.1:9") | {"RAY_ADDRESS": "127.0.0.1:9"}
    one = "tests/data_pipeline/store/test_store.py::test_put_get_stat_list_delete"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")} | theirs
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", one]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert ended.returncode == 0, ended.stdout
