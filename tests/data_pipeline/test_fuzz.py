"""Atheris on the tar walk and the decoders: no crash, no hang, no memory over the cap. The fuzzer itself is fuzz.py."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 40  # of fuzzing per target
LIMITS = ["-timeout=20", "-rss_limit_mb=1500", "-max_len=8192", "-seed=1", "-print_final_stats=1"]


def fuzz(target: str, folder: Path, *options: str) -> "subprocess.CompletedProcess[str]":
    # By a shell between the two: Linux counts the memory of whoever starts a process as that process's peak.
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-m", "tests.data_pipeline.fuzz", target]
    command += [str(folder / "corpus"), *LIMITS, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS + 120)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["tar", "image", "picture", "npy", "latents", "label"])
def test_hostile_bytes_are_refused_with_a_sentence(target: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="atheris has wheels for Linux on x86-64 only")
    ended = fuzz(target, tmp_path, f"-max_total_time={SECONDS}")
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    runs = int(re.findall(r"stat::number_of_executed_units: (\d+)", ended.stderr)[0])
    assert runs > 1000


@pytest.mark.slow
def test_the_fuzzer_finds_an_error_that_is_there(tmp_path: Path) -> None:
    """A target that raises where the walk meets a tar of ours: the exit code and the trace show it."""
    pytest.importorskip("atheris", reason="atheris has wheels for Linux on x86-64 only")
    (tmp_path / "broken.py").write_text(
        "import sys\nfrom tests.data_pipeline import fuzz\nfuzz.TARGETS['label'] = lambda data: 1 // (len(data) - 3)\nfuzz.main()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "broken.py", "label", "corpus", "-max_total_time=60"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=150)
    assert ended.returncode != 0
    assert "ZeroDivisionError" in ended.stdout + ended.stderr
