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
import threading
import zlib
from collections.abc import Callable
from pathlib import Path

from configs.errors import StoreError
from data_pipeline.store import ObjectInfo, Store

ENTRY = re.compile(r"[0-9a-f]{64}\.range")


class CachedStore(Store):
    """`store`, with its ranges kept in `folder`. Everything but `get_range` with an etag goes straight through."""

    def __init__(self, store: Store, folder: Path, limit_bytes: int) -> None:
        """Raises StoreError where the folder cannot be made or written."""
        self.store, self.folder, self.limit_bytes = store, folder, limit_bytes
        self.uri, self.traffic = store.uri, store.traffic
        self.hits = self.misses = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"The cache folder {folder} cannot be made ({error.strerror}); choose another.") from error

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
        with contextlib.suppress(OSError):  # a full or vanished disk costs the cache, not the training
            self._save(path, data)
        return data

    def forget(self, key: str, start: int, length: int, etag: str) -> None:
        with contextlib.suppress(OSError):
            self._path(key, start, length, etag).unlink()

    def _path(self, key: str, start: int, length: int, etag: str) -> Path:
        return self.folder / (hashlib.sha256(f"{self.uri}\0{key}\0{etag}\0{start}\0{length}".encode()).hexdigest() + ".range")

    def _load(self, path: Path, length: int) -> bytes | None:
        try:
            raw = path.read_bytes()
            os.utime(path)  # recently read: the last to go
        except OSError:
            return None
        data, crc = raw[:-4], raw[-4:]
        return data if len(data) == length and zlib.crc32(data).to_bytes(4, "big") == crc else None

    def _save(self, path: Path, data: bytes) -> None:
        if len(data) + 4 > self.limit_bytes:
            return
        temp = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        try:
            temp.write_bytes(data + zlib.crc32(data).to_bytes(4, "big"))
            self._evict(self.limit_bytes - len(data) - 4)
            os.replace(temp, path)
        finally:
            temp.unlink(missing_ok=True)

    def _evict(self, room: int) -> None:
        """Deletes the entries read longest ago until the rest takes at most `room` bytes."""
        entries = []
        for entry in os.scandir(self.folder):
            if ENTRY.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):  # evicted by another process
                    entries.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry.path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= room:
                return
            Path(path).unlink(missing_ok=True)
            total -= size

    def check(self) -> None:
        self.store.check()

    def get(self, key: str) -> bytes:
        return self.store.get(key)

    def put(self, key: str, data: bytes) -> str:
        return self.store.put(key, data)

    def put_file(self, key: str, path: Path) -> str:
        return self.store.put_file(key, path)

    def stat(self, key: str) -> ObjectInfo:
        return self.store.stat(key)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        return self.store.list(prefix)

    def delete(self, key: str) -> None:
        self.store.delete(key)

    def child(self, prefix: str) -> Store:
        return CachedStore(self.store.child(prefix), self.folder, self.limit_bytes)
