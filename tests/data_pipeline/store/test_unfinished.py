"""Tests of unfinished.py: what killed writers left goes, and nothing that a live one holds."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from freeguide.data_pipeline.store import unfinished as files
from freeguide.data_pipeline.store.folder import FolderStore
from freeguide.data_pipeline.store.unfinished import LEFT_S, TEMP, clean_up, ended, unfinished, writer
from tests.data_pipeline.conftest import killed_while_writing


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob(f"{TEMP}*"))


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    store.put("a/kept", b"kept")
    killed_while_writing(f"open_store({str(tmp_path)!r}).put('a/b/key', bytes(1000))", kills=3)
    assert len(left(tmp_path)) == 3
    assert [info.key for info in store.list()] == ["a/kept"]
    assert store.clean_up() == 3000
    assert left(tmp_path) == []
    assert store.get("a/kept") == b"kept"
    assert store.clean_up() == 0


def test_what_a_live_writer_holds_stays(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from freeguide.data_pipeline.store.unfinished import unfinished\n"
        f"with unfinished(Path({str(tmp_path)!r})) as (_, file):\n print('here', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"here\n"
        with unfinished(tmp_path):  # of another process, and of this one
            assert len(left(tmp_path)) == 2
            assert clean_up(tmp_path) == 0
            assert len(left(tmp_path)) == 2
        assert len(left(tmp_path)) == 1
        other.kill()
        other.wait()
    clean_up(tmp_path)
    assert left(tmp_path) == []


FOREIGN = [f"{TEMP}00000000-12-0123456789abcdef", f"{TEMP}12-0123456789abcdef"]


@pytest.mark.parametrize("name", FOREIGN)
def test_of_other_machines_only_what_has_not_grown_for_a_day(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"half")
    now = path.stat().st_mtime
    os.utime(path, (now - LEFT_S + 600, now - LEFT_S + 600))
    assert clean_up(tmp_path) == 0
    os.utime(path, (now - LEFT_S - 600, now - LEFT_S - 600))
    assert clean_up(tmp_path) == 4
    assert left(tmp_path) == []


@pytest.mark.parametrize("name", FOREIGN)
def test_the_clock_of_this_machine_decides_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).write_bytes(b"half")
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert clean_up(tmp_path) == 0


def test_nothing_else_is_touched(tmp_path: Path) -> None:
    for name in ("precious", f"{TEMP}precious", f"{TEMP}12-0123", "x.tmp", f".{TEMP}12-0123456789abcdef"):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (1, 1))
    (tmp_path / "target").write_bytes(b"1")
    (tmp_path / FOREIGN[0]).symlink_to("target")
    before = sorted(path.name for path in tmp_path.iterdir())
    assert clean_up(tmp_path) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert clean_up(tmp_path / "missing") == 0


def test_folders_behind_links_are_swept_and_links_back_end(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to("../disk")
    (tmp_path / "disk" / "back").symlink_to("../run")
    (tmp_path / "disk" / FOREIGN[0]).write_bytes(b"half")
    os.utime(tmp_path / "disk" / FOREIGN[0], (1, 1))
    assert clean_up(tmp_path / "run") == 4


def test_writers_and_clean_ups_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    store, stop = FolderStore(tmp_path), threading.Event()

    def cleaned() -> None:
        while not stop.is_set():
            store.clean_up()

    threads = [threading.Thread(target=cleaned) for _ in range(2)]
    for thread in threads:
        thread.start()
    for number in range(100):
        store.put(f"k{number}", b"1")
    stop.set()
    for thread in threads:
        thread.join()
    assert len(store.list()) == 100
    assert left(tmp_path) == []


def test_a_process_is_known_to_have_ended_only_where_that_is_sure() -> None:
    code = "import json; from freeguide.data_pipeline.store.unfinished import writer; print(json.dumps(writer()))"
    import json

    gone = json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
    assert ended(gone)
    assert not ended(writer())
    assert ended([*writer()[:3], "1"])  # the number is in use again
    for other in (["00000000", *gone[1:]], [gone[0], "pid:[1]", *gone[2:]], [*gone[:2], "9" * 30, "1"], None, "x", []):
        assert not ended(other)


def test_a_file_system_without_locks_is_written_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    store = FolderStore(tmp_path)
    store.put("k", b"1")
    assert store.get("k") == b"1"
    with unfinished(tmp_path):
        assert clean_up(tmp_path) == 0
        assert len(left(tmp_path)) == 1
