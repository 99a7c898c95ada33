"""Who gets a GPU, on a cluster of the command's own; and where commands keep what is gone when they end."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from cluster.session import _gpus_here, private_folder, scratch
from configs.errors import ConfigError, UserError


@pytest.mark.parametrize(
    ("there", "asked", "processes", "together", "given"),
    [
        (0, -1.0, 2, True, 0.0),
        (1, -1.0, 2, True, 0.0),  # the second worker would be waited for for ever
        (2, -1.0, 2, True, 1.0),
        (1, -1.0, 4, False, 1.0),  # one actor works alone
        (8, 0.0, 2, True, 0.0),
        (1, 0.5, 2, True, 0.5),
    ],
)
def test_workers_share_out_gpus_or_have_none(
    monkeypatch: pytest.MonkeyPatch, there: int, asked: float, processes: int, together: bool, given: float
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    assert _gpus_here(asked, processes, together) == given


def test_gpus_that_are_left_out_are_mentioned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    _gpus_here(-1.0, 2, together=True)
    assert capsys.readouterr().out == "this machine has 1 GPU for 2 workers, so none is used; set cluster.workers=1\n"


def test_more_gpus_than_there_are_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="for 2 processes needs 2 GPUs and this machine has 1; set it to 0, or name a cluster"):
        _gpus_here(1.0, 2, together=True)


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


HOLD = "import sys; from cluster.session import scratch\nwith scratch(sys.argv[1]) as f: print(f, flush=True); sys.stdin.read()"


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
