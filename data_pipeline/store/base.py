"""Objects in `s3://bucket/prefix` or in a folder, with one behaviour.

An object is written whole or not at all, read whole or by range, and never changed in place by us. Here is what a store of either
kind does, and how a folder does it; `s3.py` does it over the network.
"""

import contextlib
import os
import random
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from freeguide.configs.errors import DataError, StoreError
from freeguide.configs.locations import locate
from freeguide.data_pipeline.store.unfinished import TEMP, sweep, unfinished

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
        """Raises StoreError, within 15 s, where the store cannot be used: no such bucket, credentials, endpoint, rights.

        Without `write` it need not be there, nor be more than readable. What a bucket lets one write, the first write tells.
        """

    @abstractmethod
    def get(self, key: str, most: int = MEMORY) -> bytes:
        """The whole object. Raises MissingObject, and DataError, before it is read, where it has more than `most` bytes."""

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
        """Exactly `length` bytes from `start`. Raises MissingObject, ChangedObject where `etag` differs, StoreError past the end.

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
        """Writes the object where there is none, and returns what is there now: of two that write, both get the first one's."""

    @abstractmethod
    def stat(self, key: str) -> ObjectInfo:
        """Raises MissingObject."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object whose key begins with `prefix`, sorted by key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes the object; no error where there is none."""

    @abstractmethod
    def sweep(self) -> int:
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


def open_store(uri: str, retry: Retry | None = None, access: Access | None = None) -> Store:
    """The store at a location of `configs.locations`. Touches nothing yet; see `Store.check`. Raises StoreError."""
    place = locate(uri)
    if not place.bucket:
        return FolderStore(Path(place.path))
    from freeguide.data_pipeline.store.s3 import S3Store  # boto3 takes long to import, and a folder has no use for it

    return S3Store(place.bucket, place.path, retry or Retry(), access or Access())


def open_like(store: Store, uri: str) -> Store:
    """The store at `uri`, asked as patiently and in the same way as `store`, and counted with it."""
    found = open_store(uri, getattr(store, "retry", None), getattr(store, "access", None))
    found.traffic = store.traffic
    return found


def read_each(store: Store, keys: Sequence[str], made: Callable[[str, bytes], T]) -> list[T]:
    """`made(key, object)` of each key, in their order. Several at a time, as reading thousands of small ones is mostly waiting."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda key: made(key, store.get(key)), keys))


def create_bucket(uri: str) -> None:
    """Make the bucket of `s3://bucket`, for a server of one's own; no error where it exists."""
    from freeguide.data_pipeline.store.s3 import S3Store

    store = open_store(uri)
    assert isinstance(store, S3Store)
    store.create_bucket()


def check_size(where: str, size: int, most: int) -> None:
    """Raises DataError for an object that is larger than any of its kind."""
    if size > most:
        limit = "than the memory here" if most == MEMORY else f"than the {most:,} that make sense there"
        raise DataError(f"{where} has {size:,} bytes, more {limit}; correct the location, or restore it from a copy")


def checked(key: str) -> str:
    """The key. Raises ValueError where it is none."""
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


class FolderStore(Store):
    """A folder that behaves like a bucket. The etag of a file is its size: cheap, and the CRCs of the manifest find the rest."""

    def __init__(self, folder: Path, traffic: Traffic | None = None) -> None:
        self.folder = Path(os.path.abspath(folder))  # absolute: Ray's workers stand in other folders
        self.uri = str(self.folder)
        self.traffic = traffic or Traffic()

    def check(self, write: bool = True) -> None:
        there = self.folder
        with self._errors(""):
            while not there.exists():
                if there.is_symlink():
                    raise FileNotFoundError
                there = there.parent
        if not there.is_dir():
            raise StoreError(f"{there} is a file; give a folder.")
        if not os.access(there, os.R_OK | os.X_OK | (os.W_OK if write else 0)):
            raise Denied(f"{there} may not be {'written' if write else 'read'}; choose another folder or change its rights.")

    def get(self, key: str, most: int = MEMORY) -> bytes:
        with self._errors(key), open(self.folder / checked(key), "rb") as file:
            check_size(f"{self.uri}/{key}", os.fstat(file.fileno()).st_size, most)
            return file.read()

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
        began = time.monotonic()
        with self._errors(key), open(self.folder / checked(key), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if etag is not None and etag != str(size):
                raise ChangedObject(f"{self.uri}/{key} has changed since its manifest was written; {AGAIN}.")
            file.seek(start)
            data = file.read(length)
        if len(data) < length:
            raise StoreError(f"{self.uri}/{key} ends at byte {size}, before byte {start + length}; {AGAIN}.")
        elapsed = time.monotonic() - began
        self.traffic.read(length, elapsed, elapsed)
        return data

    def put(self, key: str, data: bytes) -> str:
        return self._publish(key, lambda file: file.write(data))

    def put_file(self, key: str, path: Path) -> str:
        with open(path, "rb") as source:
            return self._publish(key, lambda file: shutil.copyfileobj(source, file))

    def _publish(self, key: str, write: Callable[[BinaryIO], object], *, new: bool = False) -> str:
        """Writes the object; with `new`, only where there is none."""
        path = self.folder / checked(key)
        with self._errors(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            with unfinished(path.parent) as (temp, file):
                write(file)
                file.flush()
                os.fsync(file.fileno())
                size = file.tell()
                if new:
                    _name_new(temp, path)
                else:
                    os.replace(temp, path)
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the name itself must survive a power cut
            finally:
                os.close(folder)
        return str(size)

    def create(self, key: str, data: bytes) -> bytes:
        self._publish(key, lambda file: file.write(data), new=True)
        return self.get(key)

    def stat(self, key: str) -> ObjectInfo:
        with self._errors(key):
            path = self.folder / checked(key)
            size = path.stat().st_size
            if not path.is_file():
                raise FileNotFoundError
        return ObjectInfo(key, size, str(size))

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        return sorted(self._walk("", prefix, ()), key=lambda info: info.key)

    def _walk(self, place: str, prefix: str, above: tuple[tuple[int, int], ...]) -> Iterator[ObjectInfo]:
        """What stands in the folder `place` ("" or "a/b/"), links followed. `above` are the folders around it: a link may lead back
        to one of them. Whatever cannot be listed raises StoreError, as it may hold anything.
        """
        try:
            with self._errors(place.rstrip("/")):
                status = os.stat(self.folder / place)
                here = (status.st_dev, status.st_ino)
                with os.scandir(self.folder / place) as entries:
                    inside = list(entries)
        except MissingObject as error:
            if isinstance(error.__cause__, NotADirectoryError):
                raise StoreError(f"{self.folder / place} is a file; give a folder.") from error
            return  # there is none, or no more
        for entry in inside if here not in above else ():
            key = f"{place}{entry.name}"
            if entry.name.startswith(TEMP) or not (key.startswith(prefix) or prefix.startswith(f"{key}/")):
                continue
            try:
                with self._errors(key):
                    size = -1 if entry.is_dir() else os.stat(self.folder / key).st_size
            except MissingObject:  # deleted by someone else in the meantime
                continue
            if size < 0:
                yield from self._walk(f"{key}/", prefix, (*above, here))
            elif key.startswith(prefix):
                yield ObjectInfo(key, size, str(size))
            else:
                raise StoreError(f"{self.folder / key} is a file, and a folder of that name is looked for; move it away.")

    def delete(self, key: str) -> None:
        with self._errors(key):
            (self.folder / checked(key)).unlink(missing_ok=True)

    def sweep(self) -> int:
        return sweep(self.folder)

    def child(self, prefix: str) -> "FolderStore":
        return FolderStore(self.folder / checked(prefix.strip("/")), self.traffic)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Any:
        where = f"{self.uri}/{key}" if key else self.uri
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            path = self.folder / key
            if isinstance(error, IsADirectoryError):
                raise StoreError(f"{where} is a folder, and a file is looked for; correct the path") from error
            for place in (path, *path.parents):
                if place.is_symlink() and not place.exists():
                    raise StoreError(
                        f"{place} is a link to nothing ({os.readlink(place)}); mount that or mend the link."
                    ) from error
            raise MissingObject(f"{where} does not exist; check the location.") from error
        except OSError as error:
            kind = Denied if isinstance(error, PermissionError) else StoreError
            raise kind(f"{where} cannot be used ({error.strerror}); check the disk and its rights.") from error


def _name_new(temp: Path, path: Path) -> None:
    """Gives a finished file its name, unless there is one of that name."""
    try:
        os.link(temp, path)
    except FileExistsError:
        return
    except OSError:  # a file system without links: the name is taken first, and filled a moment later
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            os.replace(temp, path)
