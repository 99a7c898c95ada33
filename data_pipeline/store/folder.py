"""Objects in a folder, which behaves like a bucket: a file gets its name when it is whole, and no reader sees half of one."""

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from freeguide.configs.errors import StoreError
from freeguide.data_pipeline.store.base import (
    AGAIN,
    MEMORY,
    ChangedObject,
    Denied,
    MissingObject,
    ObjectInfo,
    Store,
    Traffic,
    check_size,
    checked,
)
from freeguide.data_pipeline.store.unfinished import TEMP, clean_up, unfinished


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
            raise StoreError(f"{there} is a file; give a folder")
        if not os.access(there, os.R_OK | os.X_OK | (os.W_OK if write else 0)):
            raise Denied(f"{there} may not be {'written' if write else 'read'}; choose another folder or change its rights")

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
                raise ChangedObject(f"{self.uri}/{key} has changed since its manifest was written; {AGAIN}")
            file.seek(start)
            data = file.read(length)
        if len(data) < length:
            raise StoreError(f"{self.uri}/{key} ends at byte {size}, before byte {start + length}; {AGAIN}")
        elapsed = time.monotonic() - began
        self.traffic.read(length, elapsed, elapsed)
        return data

    def put(self, key: str, data: bytes) -> str:
        return self._publish(key, lambda file: file.write(data))

    def put_file(self, key: str, path: Path) -> str:
        with open(path, "rb") as source:
            return self._publish(key, lambda file: shutil.copyfileobj(source, file))

    def _publish(self, key: str, write: Callable[[BinaryIO], object], *, new: bool = False) -> str:
        """Writes the object; with `new`, only if there is none."""
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
                raise StoreError(f"{self.folder / place} is a file; give a folder") from error
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
                raise StoreError(f"{self.folder / key} is a file, and a folder of that name is looked for; move it away")

    def delete(self, key: str) -> None:
        with self._errors(key):
            (self.folder / checked(key)).unlink(missing_ok=True)

    def clean_up(self) -> int:
        return clean_up(self.folder)

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
                    raise StoreError(f"{place} is a link to nothing ({os.readlink(place)}); mount that or mend the link") from error
            raise MissingObject(f"{where} does not exist; check the location") from error
        except OSError as error:
            kind = Denied if isinstance(error, PermissionError) else StoreError
            raise kind(f"{where} cannot be used ({error.strerror}); check the disk and its rights") from error


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
