"""The wheel is all that a user needs: built, installed away from the checkout, and its demo run in a bare environment."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from freeguide.cluster.runtime.submit import copy_package
from freeguide.data_pipeline.closure import NAME, ROOMS
from tests.cluster.test_demo import TINY

ROOT = Path(__file__).parents[2]


def _ran(*words: str | Path, cwd: Path, env: dict[str, str] | None = None, seconds: int = 900) -> str:
    ended = subprocess.run([*map(str, words)], cwd=cwd, env=env, capture_output=True, text=True, timeout=seconds)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_wheel_runs_its_demo_in_a_clean_environment(tmp_path: Path) -> None:
    elsewhere, built = tmp_path / "elsewhere", tmp_path / "built"
    elsewhere.mkdir()
    pins = ["-c", ROOT / "constraints.txt"]
    _ran(sys.executable, "-m", "venv", tmp_path / "venv", cwd=elsewhere)
    python = tmp_path / "venv" / "bin" / "python"
    fetched = subprocess.run(
        [python, "-m", "pip", "download", "--quiet", "--no-deps", "-d", elsewhere / "fetched", *pins, "shtab"],
        cwd=elsewhere, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if fetched.returncode:
        pytest.skip(f"needs a package index, which does not answer: {fetched.stderr.strip()[-200:]}")
    source = _source(tmp_path / "source")
    _ran(python, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", built, source, cwd=elsewhere)
    (wheel,) = built.glob("freeguide-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = {name for name in archive.namelist() if ".dist-info/" not in name}
    travels = copy_package(tmp_path)
    assert inside == {path.relative_to(tmp_path).as_posix() for path in travels.rglob("*") if path.is_file()}

    environment = os.environ | {"DS_BUILD_OPS": "0"}
    _ran(python, "-m", "pip", "install", "--quiet", *pins, wheel, cwd=elsewhere, env=environment, seconds=1200)
    for name in ("home", "tmp", "empty"):
        (tmp_path / name).mkdir()
    bare = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    freeguide = tmp_path / "venv" / "bin" / "freeguide"

    def say(*words: str) -> str:
        return _ran(freeguide, *words, cwd=tmp_path / "empty", env=bare)

    assert say("--version").startswith("freeguide 0.")
    assert "name: digits" in say("inspect", "digits")
    assert list((tmp_path / "empty").iterdir()) == []
    assert "report: runs/digits/index.html" in say("demo", *TINY)
    assert "<html" in (tmp_path / "empty" / "runs" / "digits" / "index.html").read_text()[:200]


def _source(folder: Path) -> Path:
    """A copy of what a wheel is built of, as building writes beside it."""
    folder.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for room in (NAME, *ROOMS):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    return folder
