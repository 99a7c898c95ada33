"""Where commands keep what is gone when they end."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from freeguide.cluster.runtime.folders import private_folder, scratch
from freeguide.cluster.runtime.folders import temporary as scratch_of_command
from freeguide.configs.errors import UserError


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_user_has_a_temporary_folder_that_nobody_else_enters(temporary: Path) -> None:
    old = os.umask(0)
    try:
        folder = private_folder()
    finally:
        os.umask(old)
    assert (folder.parent, stat.S_IMODE(folder.stat().st_mode)) == (temporary, 0o700)
    folder.chmod(0o755)
    assert stat.S_IMODE(private_folder().stat().st_mode) == 0o700


@pytest.mark.parametrize("what", ["link", "file", "foreign"])
def test_a_temporary_folder_that_somebody_else_put_there_is_refused(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    stranger = os.getuid() + 4242
    monkeypatch.setattr(os, "getuid", lambda: stranger)
    place = temporary / f"freeguide-{stranger}"
    {"link": lambda: place.symlink_to(temporary), "file": place.touch, "foreign": place.mkdir}[what]()
    with pytest.raises(UserError, match=f"{place} is no folder of yours.*TMPDIR"):
        private_folder()


def test_a_temporary_folder_that_cannot_be_made_is_one_sentence(temporary: Path) -> None:
    with pytest.raises(UserError, match=r"no temporary folder can be made .*set TMPDIR"):
        private_folder(str(temporary / "missing"))


HOLD = (
    "import sys; from freeguide.cluster.runtime.folders import scratch\n"
    "with scratch(sys.argv[1]) as f: print(f, flush=True); sys.stdin.read()"
)


def test_what_a_command_leaves_is_gone_at_its_end_or_when_the_next_begins_if_it_was_killed(temporary: Path) -> None:
    with scratch() as mine:
        (mine / "below").mkdir()
        other = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(temporary)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        assert mine.is_dir()
        assert theirs.is_dir()
        with scratch() as third:
            assert mine.is_dir()
            assert theirs.is_dir()
        assert not third.exists()
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
        assert theirs.is_dir()
        with scratch():
            assert not theirs.exists()
            assert mine.is_dir()
    assert list(private_folder().iterdir()) == []


def test_all_that_a_command_and_its_libraries_write_to_temporary_folders_is_in_its_own(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    with scratch_of_command() as folder, scratch_of_command() as again:
        assert (folder, os.environ["TMPDIR"]) == (again, str(folder))
        left = Path(tempfile.mkdtemp())
        seen = subprocess.run([sys.executable, "-c", "import tempfile; print(tempfile.mkdtemp())"], capture_output=True, text=True)
        assert left.parent == Path(seen.stdout.strip()).parent == folder
        assert os.environ["RAY_TMPDIR"] == str(temporary)  # not deeper: its sockets have long names
    assert "TMPDIR" not in os.environ
    assert tempfile.gettempdir() == str(temporary)
    assert not left.exists()
    assert list(private_folder().iterdir()) == []
