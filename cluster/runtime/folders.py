"""Temporary folders: each command has its own, which is gone when the command ends, or when the next begins if it was killed."""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from freeguide.configs.errors import UserError

_temporary: Path | None = None  # where `temporary` lets this process write


def private_folder(parent: str = "") -> Path:
    """This user's own temporary folder, made with mode 0700 in `parent` (default: TMPDIR, /tmp). Raises UserError."""
    folder = Path(parent or tempfile.gettempdir()) / f"freeguide-{os.getuid()}"
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
            raise UserError(f"{folder} is no folder of yours, and temporary files go there; set TMPDIR to another folder")
        if stat.S_IMODE(found.st_mode) != 0o700:
            folder.chmod(0o700)
    except OSError as error:
        raise UserError(f"no temporary folder can be made ({error}); set TMPDIR to a folder that you may write to") from error
    return folder


@contextmanager
def scratch(parent: str = "") -> Iterator[Path]:
    """A temporary folder of this command alone, gone at its end; so are then those of commands that were killed.

    A folder is alive as long as a process holds its lock, which the kernel takes away with the process. Raises UserError.
    """
    home = private_folder(parent)
    try:
        with _locked(home):  # so that nobody deletes a folder between its making and its lock
            for folder in home.glob("run-*"):
                with contextlib.suppress(OSError), _locked(folder, wait=False):
                    shutil.rmtree(folder, ignore_errors=True)
            folder = Path(tempfile.mkdtemp(prefix="run-", dir=home))
            lock = contextlib.ExitStack()
            lock.enter_context(_locked(folder))
    except OSError as error:
        raise UserError(f"no temporary folder can be made in {home} ({error}); set TMPDIR to a folder with room") from error
    with lock:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def temporary() -> Iterator[Path]:
    """What this process and those that it starts write to temporary folders, all libraries included, goes to its `scratch`.

    But not what torch has compiled, which stays with the user for the next command, and not Ray's sockets, whose paths have to be
    short. Raises UserError.
    """
    global _temporary
    if _temporary is not None:
        yield _temporary
        return
    before, compiled = tempfile.tempdir, private_folder() / "compiled"
    ours = {"RAY_TMPDIR": tempfile.gettempdir(), "TORCHINDUCTOR_CACHE_DIR": str(compiled)}
    with scratch() as folder, environment({"TMPDIR": str(folder)} | {n: os.environ.get(n, ours[n]) for n in ours}):
        _temporary, tempfile.tempdir = folder, str(folder)
        try:
            yield folder
        finally:
            _temporary, tempfile.tempdir = None, before


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(handle)


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """`variables` in the environment of this process, until the end of the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
