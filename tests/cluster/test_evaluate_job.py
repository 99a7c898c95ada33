"""The evaluation on Ray: the same report, byte for byte, whatever happens to actors and driver."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.untrained import options, small, write_lab, write_run

ROOT = Path(__file__).parents[2]
RUNS = ("p0.1", "p0.5")


class Jobs:
    """The same sweep again and again, each time from untouched runs."""

    def __init__(self, folder: Path, address: str) -> None:
        self.folder, self.address = folder, address
        write_lab(folder)
        for seed, name in enumerate(RUNS):
            write_run(small(folder, folder / "runs" / name, f"diffusion.p_uncond={name[1:]}"), seed)

    def start(self, name: str, trouble: str, actors: int) -> "subprocess.Popen[str]":
        place = self.folder / name
        if not place.exists():
            shutil.copytree(self.folder / "runs", place / "runs")
        swept = f"evaluate.sweep={{run: [{', '.join(str(place / 'runs' / run) for run in RUNS)}]}}"
        overrides = [*options(self.folder, place / "report"), swept, f"cluster.actors={actors}"]
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("drive_evaluate.py")), trouble, *overrides],
            cwd=place,
            env=os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": self.address, "OMP_NUM_THREADS": str(actors)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, name: str, trouble: str = "none", actors: int = 2) -> tuple[str, dict[str, bytes]]:
        """What the job printed, and the report's files but those that hold times."""
        job = self.start(name, trouble, actors)
        printed, _ = job.communicate(timeout=280)
        assert job.returncode == 0, printed[-4000:]
        files = {path.name: path.read_bytes() for path in (self.folder / name / "runs" / "digits").iterdir()}
        return printed, {file: data for file, data in files.items() if file not in ("times.json", "cost.md")}


@pytest.mark.slow
def test_the_report_is_the_same_on_any_cluster_and_after_any_death(tmp_path: Path, ray_head: tuple[str, str]) -> None:
    jobs = Jobs(tmp_path, ray_head[0])
    printed, whole = jobs.finish("one", actors=1)
    assert "18 work units, 0 of them done" in printed
    assert {"report.json", "table.md", "index.html", "frontier.png", "samples_1.png", "samples_2.png"} < whole.keys()
    assert jobs.finish("two", actors=2)[1] == whole
    assert jobs.finish("three", actors=3)[1] == whole

    assert jobs.finish("killed-actor", "die")[1] == whole
    assert (tmp_path / "killed-actor" / "trouble").exists()

    job = jobs.start("killed-driver", "hang", 2)
    deadline = time.monotonic() + 200
    while not (tmp_path / "killed-driver" / "trouble").exists():
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
    job.send_signal(signal.SIGKILL)
    job.communicate()
    made = len(list((tmp_path / "killed-driver").glob("runs/*/evaluate/*/units/*/*.npz")))
    assert 0 < made < 18
    printed, report = jobs.finish("killed-driver")
    assert report == whole
    left = int(printed.split("work units, ")[1].split(" ")[0])
    assert made <= left < 18  # what other actors were publishing at that moment may have come too

    assert jobs.finish("killed-driver", actors=3)[1] == whole
