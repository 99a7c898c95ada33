"""How a command ends when it is asked to.

    Ctrl-C          says so at once, stops in order, and ends with exit code 130
    Ctrl-C again    ends it at once
    SIGTERM         as Ctrl-C, with exit code 143

Stopping in order means KeyboardInterrupt or SystemExit in the main thread, so that every `finally` has its turn; or what a block
under `gently` does instead, such as to let workers save first.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # exit codes
GO_ON = "stopped; run the same command again to go on"
_STOPPING = "stopping; Ctrl-C again ends it at once"
_asked = 0  # the signal that came first, 0 = none
_instead: Callable[[], bool] | None = None  # what `gently` does


@contextmanager
def heard() -> Iterator[None]:
    """Hear SIGINT and SIGTERM as above. Only the main thread of a process can."""
    global _asked
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _hear) for number in (signal.SIGINT, signal.SIGTERM)}
    _asked = 0
    try:
        yield
    finally:
        if not _asked:  # else a second Ctrl-C may come until the process is gone
            for number, handler in before.items():
                signal.signal(number, handler)


@contextmanager
def gently(stop: Callable[[], bool]) -> Iterator[None]:
    """While this is entered, the first signal calls `stop`; if that returns False, there is nothing that will end by itself."""
    global _instead
    _instead = stop
    try:
        yield
    finally:
        _instead = None


@contextmanager
def kept() -> Iterator[None]:
    """Handlers of signals are what they were before the block: `ray.init` brings one of its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    if threading.current_thread() is threading.main_thread():
        for number, handler in before.items():
            signal.signal(number, handler)


def asked() -> bool:
    """Whether this command has been asked to end."""
    return _asked > 0


def leave() -> NoReturn:
    """End as the signal that has come wants it."""
    if _asked == signal.SIGTERM:
        raise SystemExit(TERMINATED)
    raise KeyboardInterrupt


def _hear(number: int, _: Any) -> None:
    global _asked
    if _asked:
        if number == signal.SIGINT:
            _say(GO_ON)
            os._exit(128 + _asked)  # what this leaves behind the next command deletes; Ray's processes end with this one
        return
    _asked = number
    _say(_STOPPING)
    if _instead is None or not _instead():
        leave()


def _say(words: str) -> None:
    """As `print` to standard error, which may itself have been interrupted."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # it is closed, or no file
        os.write(sys.stderr.fileno(), f"\n{words}\n".encode())
