"""A disk cache in front of a store, for nodes whose disks are larger and nearer than the object store.

It keeps ranges that were read with an etag, under a name made of location, key, etag and range. Where an etag says little (that of
a folder is the size), the reader's checksums find a stale entry, and `forget` drops it.
Entries appear by an atomic rename and carry their CRC-32: a torn or damaged one counts as absent. The folder never holds more
than `limit_bytes` of entries (plus the one being written); the least recently read go first, and only files that the cache wrote
are ever deleted. Several processes may share one folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

from freeguide.data_pipeline.store.base import MEMORY, ObjectInfo, Store
from freeguide.data_pipeline.store.unfinished import delete_unfinished, unfinished

ENTRY = re.compile(r"[0-9a-f]{64}\.range")

_warned: set[str] = set()  # folders that this process has spoken of


class CachedStore(Store):
    """`store`, with its ranges kept in `folder`. Everything but `get_range` with an etag goes straight through."""

    def __init__(self, store: Store, folder: Path, limit_bytes: int) -> None:
        self.store, self.folder, self.limit_bytes = store, folder, limit_bytes
        self.uri, self.traffic = store.uri, store.traffic
        self.hits = self.misses = 0
        self.useless = False  # nothing can be kept here
        with contextlib.suppress(OSError):  # said when something is to be kept
            folder.mkdir(parents=True, exist_ok=True)

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
        if etag is None:
            return self.store.get_range(key, start, length, cancel=cancel, on_retry=on_retry)
        path = self._path(key, start, length, etag)
        data = self._load(path, length)
        if data is not None:
            self.hits += 1
            return data
        self.misses += 1
        data = self.store.get_range(key, start, length, etag, cancel=cancel, on_retry=on_retry)
        if not self.useless:
            try:
                self._save(path, data)
            except OSError as error:  # a full or vanished disk costs the cache, not the training
                self.useless = True
                if str(self.folder) not in _warned:
                    _warned.add(str(self.folder))
                    why = f"{self.folder} cannot be written: {error.strerror}"
                    print(f"WARNING: reading goes on without the disk cache ({why})", file=sys.stderr, flush=True)
        return data

    def forget(self, key: str, start: int, length: int, etag: str) -> None:
        with contextlib.suppress(OSError):
            self._path(key, start, length, etag).unlink()

    def _path(self, key: str, start: int, length: int, etag: str) -> Path:
        return self.folder / (hashlib.sha256(f"{self.uri}\0{key}\0{etag}\0{start}\0{length}".encode()).hexdigest() + ".range")

    def _load(self, path: Path, length: int) -> bytes | None:
        try:
            raw = path.read_bytes()
        except OSError:
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # recently read: the last to go
        data, crc = raw[:-4], raw[-4:]
        return data if len(data) == length and zlib.crc32(data).to_bytes(4, "big") == crc else None

    def _save(self, path: Path, data: bytes) -> None:
        if len(data) + 4 > self.limit_bytes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with unfinished(self.folder) as (temp, file):
            self._evict(self.limit_bytes - len(data) - 4)
            file.write(data)
            file.write(zlib.crc32(data).to_bytes(4, "big"))
            file.flush()
            os.replace(temp, path)

    def _evict(self, room: int) -> None:
        """Deletes what killed writers left, and the entries read longest ago until the rest takes at most `room` bytes."""
        entries, total = [], 0
        for entry in os.scandir(self.folder):
            if ENTRY.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):  # evicted by another process
                    facts = entry.stat()
                    entries.append((facts.st_mtime_ns, facts.st_size, entry.path))
                    total += facts.st_size
            else:
                delete_unfinished(Path(entry.path))
        for _, size, path in sorted(entries):
            if total <= room:
                return
            Path(path).unlink(missing_ok=True)
            total -= size

    def check(self, write: bool = True) -> None:
        self.store.check(write)

    def get(self, key: str, most: int = MEMORY) -> bytes:
        return self.store.get(key, most)

    def put(self, key: str, data: bytes) -> str:
        return self.store.put(key, data)

    def put_file(self, key: str, path: Path) -> str:
        return self.store.put_file(key, path)

    def create(self, key: str, data: bytes) -> bytes:
        return self.store.create(key, data)

    def clean_up(self) -> int:
        freed = self.store.clean_up()
        with contextlib.suppress(OSError):
            freed += sum(delete_unfinished(Path(entry.path)) for entry in os.scandir(self.folder))
        return freed

    def stat(self, key: str) -> ObjectInfo:
        return self.store.stat(key)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        return self.store.list(prefix)

    def delete(self, key: str) -> None:
        self.store.delete(key)

    def child(self, prefix: str) -> Store:
        return CachedStore(self.store.child(prefix), self.folder, self.limit_bytes)
