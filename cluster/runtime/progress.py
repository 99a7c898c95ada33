"""How far a command has come, as its user reads it."""

import math
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

T = TypeVar("T")


def progress(results: Iterable[T], total: int, what: str, at_once: int = 1) -> Iterator[T]:
    """Pass results on; print how many there are and when the last is due, in place on a terminal, else every 5 seconds.

    `at_once` results are in the making at a time. The time until the first of them is the start, of which the rest needs no other.
    """
    first, printed, terminal = time.monotonic(), -math.inf, sys.stdout.isatty()
    for count, result in enumerate(results, start=1):
        yield result
        now = time.monotonic()
        if count == 1:
            first = now
        if terminal or count == total or now - printed >= 5:
            rounds, left = (count - 1) // at_once, total - count
            eta = f"  eta {timedelta(seconds=math.ceil((now - first) / rounds / at_once * left))}" if rounds else ""
            print(f"{what} {count}/{total}{eta}", end="\r" if terminal and count < total else "\n", flush=True)
            printed = now
