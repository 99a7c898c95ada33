"""Which store a location means; and the store of a data set: its tars, and what belongs to them, which may stand elsewhere.

Tars are often in a bucket or on a disk that one may only read. Then `data.manifest` names a place of one's own for all else: the
manifest, what evaluators know of the data, what is in the making. Everybody opens the data with `open_data` and never sees the
difference: tars come from `data.uri`, and everything else is written to and read from there first.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from freeguide.configs.errors import DataError
from freeguide.configs.locations import locate
from freeguide.configs.schema import DataConfig
from freeguide.data_pipeline.store.base import MEMORY, Access, Denied, MissingObject, ObjectInfo, Retry, Store
from freeguide.data_pipeline.store.folder import FolderStore


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


def read_object(uri: str, remedy: str, access: Access | None = None, most: int = MEMORY) -> bytes:
    """The bytes at a path or URI, at `most`. Raises DataError, with the remedy, if nothing is there, and for larger objects."""
    folder, _, name = uri.rpartition("/")
    try:
        return open_store(folder or ("/" if uri.startswith("/") else "."), access=access).get(name, most)
    except MissingObject:
        raise DataError(f"{uri} does not exist; {remedy}") from None


def create_bucket(uri: str) -> None:
    """Make the bucket of `s3://bucket`, for a server of one's own; no error if it exists."""
    from freeguide.data_pipeline.store.s3 import S3Store

    store = open_store(uri)
    assert isinstance(store, S3Store)
    store.create_bucket()


def open_data(data: DataConfig, retry: Retry | None = None) -> Store:
    """The store of the data set that the options name. Touches nothing yet. Raises StoreError for locations that are none."""
    tars = open_store(data.uri, retry, access_to(data, data.uri))
    return DataStore(tars, open_store(data.manifest, retry) if data.manifest else None)


def access_to(data: DataConfig, uri: str) -> Access:
    """How S3 is asked for what stands at `uri`: in a bucket of the data as for the data, elsewhere as for anything of one's own."""
    places = [place for place in (data.uri, data.path) if place.startswith("s3:")]
    if locate(uri).bucket not in {locate(place).bucket for place in places}:
        return Access()
    return Access(request_payer=data.request_payer, unsigned=data.unsigned)


class DataStore(Store):
    """`tars`, with what belongs to them in `beside`, or among them if that is None."""

    def __init__(self, tars: Store, beside: Store | None) -> None:
        self.tars, self.beside = tars, beside
        self.uri, self.traffic = tars.uri, tars.traffic
        self.retry, self.access = getattr(tars, "retry", None), getattr(tars, "access", None)

    @property
    def home(self) -> str:
        return (self.beside or self.tars).uri

    def check(self, write: bool = True) -> None:
        with self._writing():
            self.tars.check(write=write and self.beside is None)
            if self.beside is not None:
                self.beside.check(write)

    def get(self, key: str, most: int = MEMORY) -> bytes:
        return self._holder(key).get(key, most)

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
        return self._holder(key).get_range(key, start, length, etag, cancel=cancel, on_retry=on_retry)

    def put(self, key: str, data: bytes) -> str:
        with self._writing():
            return self._target(key).put(key, data)

    def put_file(self, key: str, path: Path) -> str:
        with self._writing():
            return self._target(key).put_file(key, path)

    def create(self, key: str, data: bytes) -> bytes:
        with self._writing():
            return self._target(key).create(key, data)

    def stat(self, key: str) -> ObjectInfo:
        return self._holder(key).stat(key)

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        found = {info.key: info for info in self.tars.list(prefix)}
        if self.beside is not None:
            found |= {info.key: info for info in self.beside.list(prefix) if not _is_tar(info.key)}
        return [found[key] for key in sorted(found)]

    def delete(self, key: str) -> None:
        with self._writing():
            self._target(key).delete(key)

    def clean_up(self) -> int:
        return self.tars.clean_up() + (self.beside.clean_up() if self.beside is not None else 0)

    def child(self, prefix: str) -> Store:
        """Of what belongs to the data, not of its tars."""
        return DataStore((self.beside or self.tars).child(prefix), None)

    def _holder(self, key: str) -> Store:
        return self.tars if self.beside is None or _is_tar(key) or not self.beside.exists(key) else self.beside

    def _target(self, key: str) -> Store:
        return self.tars if self.beside is None or _is_tar(key) else self.beside

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except Denied as error:
            if self.beside is not None:
                raise
            hint = "or set data.manifest to a place of your own for the manifest and whatever belongs to the data"
            raise Denied(f"{error}; {hint}") from error.__cause__


def _is_tar(key: str) -> bool:
    return key.endswith(".tar")
