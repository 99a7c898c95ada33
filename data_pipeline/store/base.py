"""Objects in `s3://bucket/prefix` or in a folder, with one behaviour.

An object is written whole or not at all, read whole or by range, and never changed in place by us. Here is what a store of either
kind does; `folder.py` does it on a disk, `s3.py` over the network, and `open.py` finds the one that a location means.
"""

import os
import random
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from freeguide.configs.errors import DataError, StoreError

AGAIN = "prepare or index the data again"
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # bytes of this machine
READERS = 16  # objects that `read_each` reads at a time

T = TypeVar("T")


class MissingObject(StoreError):
    """No object has that key."""


class ChangedObject(StoreError):
    """The object is no longer the one that the manifest or the first byte belonged to."""


class Denied(StoreError):
    """The rights do not allow it."""


class Cancelled(Exception):
    """The reader that asked for the bytes has been closed."""


@dataclass(frozen=True)
class ObjectInfo:
    key: str
    bytes: int
    etag: str


@dataclass(frozen=True)
class Access:
    """How S3 is asked, beside all that botocore's own configuration says."""

    request_payer: bool = False  # the reader pays, not the bucket's owner
    unsigned: bool = False  # without credentials, although there may be some


@dataclass(frozen=True)
class Retry:
    """When to try again, in seconds. Pauses are uniform in [0, min(cap_s, base_s 2^n)] before try n + 1."""

    attempts: int = 8  # tries without one new byte, the first included
    base_s: float = 0.2
    cap_s: float = 10.0
    connect_s: float = 4.0  # longest wait for a connection
    read_s: float = 10.0  # longest silence inside an answer
    first_s: float = 15.0  # an endpoint that has never answered gets this much in all
    slow_bytes_per_s: float = 4096.0  # a body slower than this, measured from read_s on, counts as stalled
    budget: float = 100.0  # retries that may be in debt; each complete read pays a tenth of one. Beyond it, pauses are cap_s

    def pause(self, tries: int, debt: float, cancel: threading.Event | None) -> None:
        """Waits before the next try. Many clients that retry at will keep an overloaded server down; the budget prevents that."""
        seconds = random.uniform(0, min(self.cap_s, self.base_s * 2**tries)) if debt <= self.budget else self.cap_s
        if cancel is None:
            time.sleep(seconds)
        elif cancel.wait(seconds):
            raise Cancelled


@dataclass
class Traffic:
    """What the reads of one store cost: shared by its children, counted per process, safe in threads."""

    bytes: int = 0
    gets: int = 0
    retries: Counter[str] = field(default_factory=Counter)  # by cause
    debt: float = 0.0  # retries not yet paid for by complete reads, see Retry.budget
    first_byte_s: deque[float] = field(default_factory=lambda: deque(maxlen=2048))
    total_s: deque[float] = field(default_factory=lambda: deque(maxlen=2048))
    lock: threading.Lock = field(default_factory=threading.Lock)

    def read(self, count: int, first_byte_s: float, total_s: float) -> None:
        with self.lock:
            self.bytes += count
            self.gets += 1
            self.debt = max(0.0, self.debt - 0.1)
            self.first_byte_s.append(first_byte_s)
            self.total_s.append(total_s)

    def retried(self, cause: str) -> None:
        with self.lock:
            self.retries[cause] += 1
            self.debt += 1

    def __reduce__(self) -> tuple[type["Traffic"], tuple[()]]:
        return Traffic, ()  # a store that travels to another process starts to count afresh


class Store(ABC):
    """A flat set of objects under one URI. Keys are relative, with `/` between their parts; no part may be `..`."""

    uri: str
    traffic: Traffic

    @property
    def home(self) -> str:
        """The URI under which what is written stands."""
        return self.uri

    @abstractmethod
    def check(self, write: bool = True) -> None:
        """Raises StoreError, within 15 s, if the store cannot be used: no such bucket, credentials, endpoint, rights.

        Without `write` it need not be there, nor be more than readable. What a bucket lets one write, the first write tells.
        """

    @abstractmethod
    def get(self, key: str, most: int = MEMORY) -> bytes:
        """The whole object. Raises MissingObject, and DataError, before it is read, if it has more than `most` bytes."""

    @abstractmethod
    def get_range(
        self,
        key: str,
        start: int,
        length: int,
        etag: str | None = None,
        *,
        cancel: threading.Event | None = None,
        on_retry: Callable[[str], None] | None = None,
    ) -> bytes:
        """Exactly `length` bytes from `start`. Raises MissingObject, ChangedObject if `etag` differs, StoreError past the end.

        Setting `cancel` ends it with Cancelled; `on_retry` hears the cause of every retry.
        """

    @abstractmethod
    def put(self, key: str, data: bytes) -> str:
        """Writes the object whole or not at all, replacing an older one, and returns its etag."""

    @abstractmethod
    def put_file(self, key: str, path: Path) -> str:
        """`put` of a local file of any size, which is never held in memory."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bytes:
        """Writes the object if there is none, and returns what is there now: of two that write, both get the first one's."""

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """Raises MissingObject."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object whose key begins with `prefix`, sorted by key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes the object; no error if there is none."""

    @abstractmethod
    def clean_up(self) -> int:
        """Removes what writers that were killed have left here, and nothing that a live one holds; returns its bytes.

        For whoever owns the place, once at a start. Never raises: what cannot be removed stays.
        """

    @abstractmethod
    def child(self, prefix: str) -> "Store":
        """The store of the keys under `prefix/`."""

    def forget(self, key: str, start: int, length: int, etag: str) -> None:
        """Drops what a cache holds of this range, since it is not what it should be."""
        return

    def exists(self, key: str) -> bool:
        try:
            self.stat(key)
        except MissingObject:
            return False
        return True


def read_each(store: Store, keys: Sequence[str], made: Callable[[str, bytes], T]) -> list[T]:
    """`made(key, object)` of each key, in their order. Several at a time, as reading thousands of small ones is mostly waiting."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda key: made(key, store.get(key)), keys))


def check_size(where: str, size: int, most: int) -> None:
    """Raises DataError for an object that is larger than any of its kind."""
    if size > most:
        limit = "than the memory here" if most == MEMORY else f"than the {most:,} that make sense there"
        raise DataError(f"{where} has {size:,} bytes, more {limit}; correct the location, or restore it from a copy")


def checked(key: str) -> str:
    """The key. Raises ValueError if it is none."""
    if (
        not isinstance(key, str)
        or not key
        or key.startswith("/")
        or "\\" in key
        or "\0" in key
        or any(part in ("", ".", "..") for part in key.split("/"))
    ):
        raise ValueError(f"{key!r} is no key: keys are relative paths without '.' or '..' parts")
    return key
