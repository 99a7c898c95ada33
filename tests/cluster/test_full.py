"""Disks that are full or read-only: one sentence and exit code 2, what stands stays good, and the same command ends well later."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from freeguide.cluster.cli import main
from freeguide.cluster.jobs.evaluate import evaluate
from freeguide.cluster.jobs.generate import generate
from freeguide.data_pipeline.scan import scan_all
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stored import load_manifest
from tests.cluster.untrained import DIGITS, LOCAL, options, small, write_run

ROOT = Path(__file__).parents[2]
BRIEF = ["sampling.steps=2", "sampling.interval=[]", "evaluate.w=[0.5]", "evaluate.images=20", "evaluate.unit=10"]
BRIEF += ["generate.images=40", "generate.unit=20", *LOCAL]


def mounted(folder: Path, *options: str) -> None:
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root may mount a disk that is too small, or read-only")


class Disk:
    """A disk of its own, of which as much is free as is said."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def free(self, kib: int) -> None:
        used = int(subprocess.run(["df", "--output=used", "-k", self.folder], capture_output=True, text=True).stdout.split()[-1])
        subprocess.run(["mount", "-o", f"remount,size={max(4, used + kib)}k", self.folder], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted(folder, "size=64m")
    yield Disk(folder)
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def here(in_process: list[Any], words_only: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def grows(disk: Disk, capsys: pytest.CaptureFixture[str]) -> Callable[..., int]:
    """grows(command) gives it ever more room; how often it ended with one sentence before it ended well."""

    def run(*command: str) -> int:
        for times in range(14):
            disk.free(8 * 2**times - 8)
            code = main(list(command))
            told = capsys.readouterr().err
            if code == 0:
                disk.free(8192)
                assert main(list(command)) == 0
                return times
            assert code == 2, told
            assert "Traceback" not in told
            (sentence,) = [line for line in told.splitlines() if not line.startswith("WARNING: ")]
            assert sentence.startswith("freeguide: error: "), told
            assert "No space left on device" in sentence or "GB free" in sentence, told
        raise AssertionError(told)

    return run


def test_prepare(disk: Disk, grows: Callable[..., int], tmp_path: Path, here: None) -> None:
    for number in range(30):
        folder = tmp_path / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((64, 64), 99).convert("RGB").save(folder / f"{number}.png")
    command = ["prepare", "image_folder", f"data.path={tmp_path}/images", "data.image_size=64", "data.shard_samples=8"]
    assert grows(*command, f"data.uri={disk.folder}/data") > 3
    assert main([*command, f"data.uri={tmp_path}/data"]) == 0
    whole, there = (open_store(f"{place}/data") for place in (tmp_path, disk.folder))
    assert {info.key: whole.get(info.key) for info in whole.list()} == {info.key: there.get(info.key) for info in there.list()}


def test_evaluate(lab: Path, disk: Disk, grows: Callable[..., int], tmp_path: Path, here: None) -> None:
    write_run(small(lab, disk.folder / "run", *BRIEF))
    assert grows("evaluate", str(DIGITS), *options(lab, disk.folder / "run"), *BRIEF) > 3
    reports = list(Path("runs/digits").iterdir())
    found = (Path("runs/digits/report.json")).read_bytes()
    write_run(config := small(lab, tmp_path / "run", *BRIEF))
    assert (evaluate(config) / "report.json").read_bytes() == found
    assert len(reports) > 4


def test_generate(lab: Path, disk: Disk, grows: Callable[..., int], tmp_path: Path, here: None) -> None:
    write_run(small(lab, disk.folder / "run", *BRIEF))
    assert grows("generate", str(DIGITS), *options(lab, disk.folder / "run"), *BRIEF) > 3
    write_run(config := small(lab, tmp_path / "run", *BRIEF))
    whole = open_store(generate(config))
    (place,) = (disk.folder / "run" / "generate").iterdir()
    there = open_store(str(place))
    for one, other in zip(*(scan_all(store, load_manifest(store)) for store in (there, whole)), strict=True):
        assert one.tobytes() == other.tobytes()
    assert there.get("samples.npz") == whole.get("samples.npz")


def test_export(lab: Path, disk: Disk, grows: Callable[..., int], here: None) -> None:
    write_run(small(lab, disk.folder / "run", *BRIEF))
    assert grows("export", str(DIGITS), *options(lab, disk.folder / "run"), *BRIEF) > 3


def test_score_and_the_working_folder(
    lab: Path, disk: Disk, tmp_path: Path, here: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(config := small(lab, tmp_path / "run", *BRIEF))
    generate(config)
    samples = next((tmp_path / "run" / "generate").glob("*/samples.npz"))
    measured = ["--extractor", f"{lab}/evaluator.safetensors", "--reference", f"{lab}/reference.npz"]
    (disk.folder / "row.json").write_text("what was there before")
    disk.free(0)
    capsys.readouterr()
    assert main(["score", str(samples), *measured, "--json", f"{disk.folder}/row.json"]) == 2
    (sentence,) = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("WARNING: ")]
    assert sentence.startswith(f"freeguide: error: {disk.folder}")
    assert (disk.folder / "row.json").read_text() == "what was there before"
    monkeypatch.chdir(disk.folder)  # the report goes to the run, and its copy costs a warning
    assert main(["evaluate", str(DIGITS), *options(lab, tmp_path / "run"), *BRIEF]) == 0
    assert "cannot be written (No space left on device); the report is in" in capsys.readouterr().err
    disk.free(4096)
    assert main(["score", str(samples), *measured, "--json", f"{disk.folder}/row.json"]) == 0
    assert main(["evaluate", str(DIGITS), *options(lab, tmp_path / "run"), *BRIEF]) == 0
    assert (disk.folder / "runs/digits/report.json").stat().st_size


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_full_temporary_folder_is_named_and_costs_no_result(
    lab: Path, disk: Disk, tmp_path: Path, here: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_run(small(lab, tmp_path / "run", *BRIEF))
    (disk.folder / "ballast").write_bytes(bytes(8192))
    disk.free(0)
    monkeypatch.setattr("tempfile.tempdir", str(disk.folder))  # chosen while it had room: a full one is passed over
    for command in ("evaluate", "generate"):
        code = main([command, str(DIGITS), *options(lab, tmp_path / "run"), *BRIEF])
        told = capsys.readouterr().err
        assert "Traceback" not in told
        assert code == (0 if command == "evaluate" else 2)  # what does not fit there is only for watching, or asked for
        assert str(disk.folder) in told or "TensorBoard does not get these rows" in told
    assert list((tmp_path / "run").glob("evaluate/*/report/report.json"))
    disk.free(8192)
    for command in ("evaluate", "generate"):
        assert main([command, str(DIGITS), *options(lab, tmp_path / "run"), *BRIEF]) == 0


@pytest.mark.slow
def test_a_home_and_a_cache_on_a_disk_that_is_mounted_read_only(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    mounted(home, "ro", "size=64k")
    try:
        program = [sys.executable, "-m", "cluster"]
        told = []
        for command in (
            ["prepare", "digits", f"data.uri={tmp_path}/data", f"data.disk_cache={home}/cache"],
            ["inspect", "digits", f"data.uri={tmp_path}/data", "--theory", str(tmp_path / "figure.png")],
            ["prepare", "digits", f"data.uri={home}/data"],
        ):
            done = subprocess.run(
                [*program, *command],
                cwd=tmp_path,
                env={"PATH": "/usr/bin:/bin", "HOME": str(home), "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": f"{home}/.cache"},
                capture_output=True,
                text=True,
                timeout=280,
            )
            told.append((done.returncode, done.stderr))
        assert told[:2] == [(0, ""), (0, "")]
        assert told[2][0] == 2
        assert f"{home} may not be written; choose another folder" in told[2][1]
        assert len(told[2][1].splitlines()) == 1
    finally:
        subprocess.run(["umount", "-l", home], check=True)
