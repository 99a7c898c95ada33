"""Unfinished files, and how one knows that nobody will finish them.

A writer writes into a file with a name of its own beside the target, holds a lock (`flock`) on it meanwhile, and gives it the
target's name at the end. The kernel drops the lock when the writer ends, however it ends. So a file without a lock, of a writer
under this same kernel, is one that a killed writer left. What was written elsewhere, by way of a network file system that may not
pass locks on, counts as left when nothing has been added to it for a day, by the file system's own clock.
"""

import contextlib
import fcntl
import functools
import hashlib
import os
import random
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

TEMP = ".tmp-"  # names of unfinished files begin so
LEFT_S = 86400.0  # seconds without a new byte after which a writer on another machine counts as dead
# .tmp-<kernel>-<process>-<random>; without the kernel, and as <entry>.<process>-<thread>, earlier versions wrote them
_NAME = re.compile(r"\.tmp-(?:([0-9a-f]{8})-)?\d+-[0-9a-f]{16}|[0-9a-f]{64}\.\d+-\d+")


@contextlib.contextmanager
def unfinished(folder: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file in `folder`, to be renamed or linked to its name inside the block; gone after it if it was not. Raises OSError."""
    temp, file = _new(folder)
    try:
        yield temp, file
    finally:
        with contextlib.suppress(OSError):
            temp.unlink()  # before the lock goes
        file.close()


def delete_unfinished(path: Path) -> int:
    """Deletes the file if a killed writer left it; the bytes that are gone with it, 0 if it stays. Never raises."""
    named = _NAME.fullmatch(path.name)
    if named is None:
        return 0
    try:
        file = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return 0
    try:
        locked = held = False
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locked = True
        except BlockingIOError:
            held = True
        except OSError:
            pass  # no locks here
        facts = os.fstat(file)
        if (locked and named[1] == _kernel()) or (not held and _now(path.parent) - facts.st_mtime > LEFT_S):
            path.unlink()
            return facts.st_size
    except OSError:
        pass  # what cannot be deleted stays
    finally:
        os.close(file)
    return 0


def clean_up(root: Path) -> int:
    """`delete_unfinished` for all in `root` and below."""
    freed, seen = 0, set()
    for folder, below, names in os.walk(root, followlinks=True):
        with contextlib.suppress(OSError):
            place = os.stat(folder)
            if (place.st_dev, place.st_ino) in seen:  # a link back
                below.clear()
                continue
            seen.add((place.st_dev, place.st_ino))
            freed += sum(delete_unfinished(Path(folder, name)) for name in names)
    return freed


def writer() -> list[str]:
    """This process, as `ended` knows it again: kernel, process namespace, number, start."""
    return [_kernel(), *_process(os.getpid())]


def ended(writer: object) -> bool:
    """Whether that process has provably ended; False if it cannot be known from here."""
    if not (isinstance(writer, list) and len(writer) == 4 and writer[0] == _kernel()):
        return False
    number, here = str(writer[2]), _process(os.getpid())
    if not here[2] or writer[1] != here[0] or not (number.isdecimal() and 0 < int(number) < 2**31):
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # somebody else's, and alive
    now = _process(int(number))
    return now[2] != "" and now != writer[1:]  # the number may have been given away again


def _new(folder: Path) -> tuple[Path, BinaryIO]:
    while True:
        temp = folder / f"{TEMP}{_kernel()}-{os.getpid()}-{random.SystemRandom().getrandbits(64):016x}"
        file = open(temp, "xb")  # noqa: SIM115 (the caller closes it)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.stat(temp).st_ino == os.fstat(file.fileno()).st_ino:
                return temp, file
        except (BlockingIOError, FileNotFoundError):
            pass  # a clean-up came between the first two lines
        except OSError:
            return temp, file  # no locks here, and so no clean-up before a day
        file.close()


def _now(folder: Path) -> float:
    """The time of the file system, which may be another machine's."""
    with unfinished(folder) as (_, file):
        return os.fstat(file.fileno()).st_mtime


@functools.cache
def _kernel() -> str:
    """Eight digits that are the same for all that runs under one kernel, from start to shutdown."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        name = f"{uuid.getnode():x}"
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _process(number: int) -> list[str]:
    """Namespace, number and start of a process; without a start if there is none or it cannot be looked up."""
    space, began = "", ""
    with contextlib.suppress(OSError, IndexError):
        space = os.readlink("/proc/self/ns/pid")
        began = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19]
    return [space, str(number), began]
