"""Objects in `s3://bucket/prefix` or in a folder, with one behaviour; the only user of boto3.

An object is written whole or not at all, read whole or by range, and never changed in place by us. boto3 retries what fails
before the headers of an answer, but not a body that is cut, reset, stalled or slow, and it does not notice an ignored `Range`.
So its own retries are switched off, and `_download` does the work: check the status, `Content-Range` and `ETag`, count the bytes,
and after any fault ask for the rest from the byte that was reached, after a pause with full jitter (Brooker 2015).
"""

import base64
import contextlib
import hashlib
import io
import os
import random
import re
import threading
import time
import urllib.parse
import urllib.request
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import boto3
import botocore.config
import botocore.exceptions as boto
import botocore.parsers
import urllib3.exceptions

from configs.errors import StoreError

PIECE = 2**18  # most bytes of one read of a body: smaller ones cost CPU for calls, larger ones for memory that is not filled
MULTIPART = 64 * 2**20  # bytes above which an upload goes in parts; S3 still publishes it at once
AGAIN = "prepare or index the data again"
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
TEMP = ".tmp-"  # names of unfinished files in a folder

T = TypeVar("T")


class MissingObject(StoreError):
    """No object has that key."""


class ChangedObject(StoreError):
    """The object is no longer the one that the manifest or the first byte belonged to."""


class Cancelled(Exception):
    """The reader that asked for the bytes has been closed."""


@dataclass(frozen=True)
class ObjectInfo:
    key: str
    bytes: int
    etag: str


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

    @abstractmethod
    def check(self) -> None:
        """Raises StoreError, within 15 s, where the store cannot be used: no such bucket, credentials, endpoint, rights."""

    @abstractmethod
    def get(self, key: str) -> bytes:
        """The whole object. Raises MissingObject."""

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
    def stat(self, key: str) -> ObjectInfo:
        """Raises MissingObject."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """Every object whose key begins with `prefix`, sorted by key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Removes the object; no error where there is none."""

    @abstractmethod
    def child(self, prefix: str) -> "Store":
        """The store of the keys under `prefix/`."""

    def exists(self, key: str) -> bool:
        try:
            self.stat(key)
        except MissingObject:
            return False
        return True


def open_store(uri: str, retry: Retry | None = None) -> Store:
    """The store at `s3://bucket/prefix`, `file:///folder` or a plain folder path. Touches nothing yet; see `Store.check`."""
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme == "s3":
        return S3Store(parts.netloc, uri.split("://", 1)[1].partition("/")[2].strip("/"), retry or Retry())
    if parts.scheme == "file":
        return FolderStore(Path(urllib.request.url2pathname(parts.path)))
    if "://" in uri:
        raise StoreError(f"{uri} has the unknown scheme {parts.scheme}://; give s3://bucket/prefix or a folder.")
    if not uri:
        raise StoreError("A location is empty; give s3://bucket/prefix or a folder.")
    return FolderStore(Path(uri))


def _checked(key: str) -> str:
    if not key or key.startswith("/") or "\\" in key or "\0" in key or any(part in ("", ".", "..") for part in key.split("/")):
        raise ValueError(f"{key!r} is no key: keys are relative paths without '.' or '..' parts")
    return key


# --------------------------------------------------------------------------------------------------------------- folder


class FolderStore(Store):
    """A folder that behaves like a bucket. The etag of a file is its size: cheap, and the CRCs of the manifest find the rest."""

    def __init__(self, folder: Path, traffic: Traffic | None = None) -> None:
        self.folder = Path(os.path.abspath(folder.expanduser()))  # absolute: Ray's workers stand in other folders
        self.uri = str(self.folder)
        self.traffic = traffic or Traffic()

    def check(self) -> None:
        there = self.folder
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            raise StoreError(f"{there} is a file; give a folder.")
        if not os.access(there, os.W_OK | os.X_OK):
            raise StoreError(f"{there} may not be written; choose another folder or change its rights.")

    def get(self, key: str) -> bytes:
        with self._errors(key):
            return (self.folder / _checked(key)).read_bytes()

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
        with self._errors(key), open(self.folder / _checked(key), "rb") as file:
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
        path = self.folder / _checked(key)
        temp = path.with_name(f"{TEMP}{os.getpid()}-{random.getrandbits(64):016x}")
        with self._errors(key):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                with open(temp, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temp, path)
            except BaseException:
                temp.unlink(missing_ok=True)
                raise
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)  # the name itself must survive a power cut
            finally:
                os.close(folder)
        return str(len(data))

    def stat(self, key: str) -> ObjectInfo:
        with self._errors(key):
            path = self.folder / _checked(key)
            size = path.stat().st_size
            if not path.is_file():
                raise FileNotFoundError
        return ObjectInfo(key, size, str(size))

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        found = []
        for folder, _, names in os.walk(self.folder):
            for name in names:
                path = Path(folder, name)
                key = path.relative_to(self.folder).as_posix()
                if not name.startswith(TEMP) and key.startswith(prefix):
                    with contextlib.suppress(FileNotFoundError):  # deleted by someone else in the meantime
                        found.append(ObjectInfo(key, size := path.stat().st_size, str(size)))
        return sorted(found, key=lambda info: info.key)

    def delete(self, key: str) -> None:
        with self._errors(key):
            (self.folder / _checked(key)).unlink(missing_ok=True)

    def child(self, prefix: str) -> "FolderStore":
        return FolderStore(self.folder / _checked(prefix.strip("/")), self.traffic)

    @contextlib.contextmanager
    def _errors(self, key: str) -> Any:
        try:
            yield
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            raise MissingObject(f"{self.uri}/{key} does not exist; check the location.") from error
        except OSError as error:
            raise StoreError(f"{self.uri}/{key} cannot be used ({error.strerror}); check the disk and its rights.") from error


# ------------------------------------------------------------------------------------------------------------------- S3

_clients: dict[tuple[object, ...], Any] = {}  # per process, since a client must not cross a fork, and per endpoint
_contacted: set[tuple[int, str]] = set()  # buckets that have answered this process
_lock = threading.Lock()

_FAULTS = (
    boto.BotoCoreError,
    boto.ClientError,
    botocore.parsers.ResponseParserError,
    urllib3.exceptions.HTTPError,
    OSError,
)
_BUSY = {"SlowDown", "ServiceUnavailable", "Throttling", "ThrottlingException", "RequestLimitExceeded", "TooManyRequests"}
_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_WRONG_KEYS = {"InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken", "InvalidClientTokenId", "AuthFailure"}


class _Fault(OSError):
    """An answer that botocore accepts and we do not; `cause` counts it."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


def _cause(error: Exception) -> str | None:
    """The name under which a fault is counted, or None where trying again cannot help."""
    if isinstance(error, _Fault):
        return error.cause
    if isinstance(error, boto.ClientError):
        code, status = _code(error)
        if code in _EXPIRED:
            return "expired credentials"
        if code in _BUSY or status in (429, 503):
            return "busy"
        if status >= 500 or code in ("RequestTimeout", "BadDigest", "XAmzContentSHA256Mismatch"):
            return "server error"
        return None
    if isinstance(error, boto.ConnectTimeoutError | boto.ReadTimeoutError | urllib3.exceptions.TimeoutError | TimeoutError):
        return "time-out"
    if isinstance(error, boto.EndpointConnectionError | ConnectionRefusedError):
        return "no connection"
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.ParamValidationError):
        return None
    if isinstance(error, boto.HTTPClientError | botocore.parsers.ResponseParserError | urllib3.exceptions.HTTPError | OSError):
        return "connection broken"
    if isinstance(error, boto.CredentialRetrievalError | boto.MetadataRetrievalError):
        return "credentials not at hand"
    return None


def _code(error: boto.ClientError) -> tuple[str, int]:
    return error.response.get("Error", {}).get("Code", ""), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


class S3Store(Store):
    """Objects of an S3 bucket under a prefix. Endpoint and credentials are botocore's own business (AWS_ENDPOINT_URL, ...)."""

    def __init__(self, bucket: str, prefix: str, retry: Retry, traffic: Traffic | None = None) -> None:
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        if not re.fullmatch(r"[a-zA-Z0-9][a-zA-Z0-9._-]{2,254}", bucket):
            raise StoreError(f"{self.uri} names no bucket; give s3://bucket/prefix.")
        if prefix:
            _checked(prefix)
        self.bucket, self.prefix, self.retry = bucket, prefix, retry
        self.traffic = traffic or Traffic()

    def check(self) -> None:
        self._retrying("", lambda: self._client().list_objects_v2(Bucket=self.bucket, MaxKeys=1, Prefix=self._key("")))

    def get(self, key: str) -> bytes:
        return self._download(key, 0, None, None, None, None)

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
        if start < 0 or length < 0:
            raise ValueError(f"a range needs start >= 0 and length >= 0, got {start} and {length}")
        return self._download(key, start, length, etag, cancel, on_retry) if length else b""

    def put(self, key: str, data: bytes) -> str:
        name = self._key(_checked(key))
        if len(data) > MULTIPART:
            self._retrying(key, lambda: self._client().upload_fileobj(io.BytesIO(data), self.bucket, name))
            return self.stat(key).etag
        # The digest lets the server refuse bytes that were damaged on their way.
        digest = base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode("ascii")
        answer = self._retrying(key, lambda: self._client().put_object(Bucket=self.bucket, Key=name, Body=data, ContentMD5=digest))
        return str(answer["ETag"]).strip('"')

    def stat(self, key: str) -> ObjectInfo:
        _checked(key)
        if (os.getpid(), self.bucket) not in _contacted:
            self.check()  # a HEAD has no body, so it cannot say whether the key, the bucket or the rights are missing
        answer = self._retrying(key, lambda: self._client().head_object(Bucket=self.bucket, Key=self._key(key)))
        return ObjectInfo(key, answer["ContentLength"], answer["ETag"].strip('"'))

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        found: list[ObjectInfo] = []
        query: dict[str, Any] = {"Bucket": self.bucket, "Prefix": self._key(prefix)}
        skip = len(self._key(""))
        while True:
            answer = self._retrying(prefix, lambda: self._client().list_objects_v2(**query))
            for item in answer.get("Contents", []):
                found.append(ObjectInfo(item["Key"][skip:], item["Size"], item["ETag"].strip('"')))
            if not answer.get("IsTruncated"):
                return sorted(found, key=lambda info: info.key)
            query["ContinuationToken"] = answer["NextContinuationToken"]

    def delete(self, key: str) -> None:
        name = self._key(_checked(key))
        self._retrying(key, lambda: self._client().delete_object(Bucket=self.bucket, Key=name))

    def child(self, prefix: str) -> "S3Store":
        return S3Store(self.bucket, self._key(_checked(prefix.strip("/"))), self.retry, self.traffic)

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _where(self) -> tuple[object, ...]:
        return (os.getpid(), self.retry, *map(os.environ.get, ENDPOINTS))

    def _client(self) -> Any:
        """This process's client; made on first use, so that neither a fork nor a pickle carries a connection."""
        where = self._where()
        with _lock:
            if where not in _clients:
                session = boto3.session.Session()
                style = "path" if _endpoint_is_set(session) else "auto"
                config = botocore.config.Config(
                    connect_timeout=self.retry.connect_s,
                    read_timeout=self.retry.read_s,
                    retries={"total_max_attempts": 1},
                    max_pool_connections=64,
                    s3={"addressing_style": style},
                    request_checksum_calculation="when_required",  # older servers do not know the newer headers
                    response_checksum_validation="when_required",
                )
                _clients[where] = session.client("s3", config=config)
            return _clients[where]

    def _retrying(self, key: str, request: Callable[[], T]) -> T:
        """One small request, tried again after faults that may pass. Raises StoreError with the sentence for the rest."""
        began, tries = time.monotonic(), 0
        while True:
            try:
                answer = request()
            except _FAULTS as error:
                tries += 1
                self._consider(error, key, None, tries, began)
                self.retry.pause(tries, self.traffic.debt, None)
            else:
                _contacted.add((os.getpid(), self.bucket))
                return answer

    def _consider(
        self,
        error: Exception,
        key: str,
        at: int | None,
        tries: int,
        began: float,
        on_retry: Callable[[str], None] | None = None,
    ) -> None:
        """Returns where another try makes sense, else raises the StoreError that explains `error`."""
        cause = _cause(error)
        new = (os.getpid(), self.bucket) not in _contacted
        late = time.monotonic() - began + self.retry.read_s > self.retry.first_s or (cause == "no connection" and tries >= 3)
        if cause is None or tries >= self.retry.attempts or (new and late) or (cause == "expired credentials" and tries > 3):
            self._explain(error, key, at)
        if cause == "expired credentials":
            with _lock:
                _clients.pop(self._where(), None)  # a new session asks botocore's whole provider chain again
        self.traffic.retried(cause)
        if on_retry is not None:
            on_retry(cause)

    def _download(
        self,
        key: str,
        start: int,
        length: int | None,
        etag: str | None,
        cancel: threading.Event | None,
        on_retry: Callable[[str], None] | None,
    ) -> bytes:
        """The bytes [start, start + length) of an object, or all of it, over as many answers as it takes."""
        _checked(key)
        body = _Body(start, length, etag)
        began, tries = time.monotonic(), 0
        while not body.complete:
            reached = body.reached
            try:
                self._receive(key, body, cancel)
            except _FAULTS as error:
                tries = 1 if body.reached > reached else tries + 1
                self._consider(error, key, start + body.reached, tries, began, on_retry)
                self.retry.pause(tries, self.traffic.debt, cancel)
            else:
                _contacted.add((os.getpid(), self.bucket))
        first = body.first_byte if body.first_byte is not None else time.monotonic()
        self.traffic.read(body.reached, first - began, time.monotonic() - began)
        return b"".join(body.pieces)

    def _receive(self, key: str, body: "_Body", cancel: threading.Event | None) -> None:
        """One answer: as many of the missing bytes as it brings. Raises one of _FAULTS where it does not bring them all."""
        query: dict[str, Any] = {"Bucket": self.bucket, "Key": self._key(key)}
        if body.length is not None:
            query["Range"] = f"bytes={body.start + body.reached}-{body.start + body.length - 1}"
        if body.etag is not None:
            query["IfMatch"] = f'"{body.etag}"'
        answer = self._client().get_object(**query)
        stream = answer["Body"]
        with contextlib.closing(stream):
            body.accept(answer, f"{self.uri}/{key}")
            # read1 returns what has arrived: a body that drips cannot hold us for hours inside one large read.
            read = getattr(stream._raw_stream, "read1", stream.read)
            began, got = time.monotonic(), 0
            while not body.complete:
                if cancel is not None and cancel.is_set():
                    raise Cancelled
                piece = read(min(PIECE, body.missing))
                if not piece:
                    raise _Fault("truncated")
                body.append(piece)
                got += len(piece)
                elapsed = time.monotonic() - began
                if elapsed > self.retry.read_s and got < elapsed * self.retry.slow_bytes_per_s:
                    raise _Fault("slow")

    def _explain(self, error: Exception, key: str, at: int | None) -> NoReturn:
        """Raises the StoreError whose sentence says what went wrong at byte `at` of `key`, and what to do."""
        where = f"{self.uri}/{key}".rstrip("/")
        place = where if at is None else f"{where} at byte {at}"
        code, status = _code(error) if isinstance(error, boto.ClientError) else ("", 0)
        cause = _cause(error)
        kind: type[StoreError] = StoreError
        if code == "NoSuchBucket":
            text = f"The bucket {self.bucket} does not exist; create it or correct the location {self.uri}"
        elif code in ("NoSuchKey", "404") or status == 404:
            kind, text = MissingObject, f"{where} does not exist; check the location"
        elif code == "PreconditionFailed" or status == 412:
            kind, text = ChangedObject, f"{place} has changed since its manifest was written; {AGAIN}"
        elif status == 416:
            text = f"{where} ends before byte {at}; {AGAIN}"
        elif code in _WRONG_KEYS:
            text = f"The credentials for {self.uri} are wrong ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        elif cause == "expired credentials":
            text = f"The credentials for {place} have expired; renew them and run the same command again"
        elif status in (401, 403):
            text = f"The credentials do not allow this at {where} ({code or status}); ask for the right to read, list and write"
        elif isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
            text = f"There are no credentials for {self.uri}; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile"
        elif cause in ("no connection", "time-out"):
            text = f"The S3 endpoint of {place} does not answer ({cause}); check AWS_ENDPOINT_URL and the network"
        elif cause is not None:
            text = f"{place} could not be transferred ({cause}, after several tries); check the S3 server and the network"
        else:
            text = f"S3 refuses {place} ({code or status or type(error).__name__}); check the location and the server"
        raise kind(f"{text}.") from error


@dataclass
class _Body:
    """The part of an object that is wanted, and how much of it has come. `length` is None until the first answer tells it."""

    start: int
    length: int | None
    etag: str | None
    pieces: list[bytes] = field(default_factory=list)
    first_byte: float | None = None  # on the monotonic clock
    reached: int = 0

    @property
    def complete(self) -> bool:
        return self.length is not None and self.reached == self.length

    @property
    def missing(self) -> int:
        assert self.length is not None
        return self.length - self.reached

    def accept(self, answer: dict[str, Any], where: str) -> None:
        """Checks the headers of an answer against what was asked for. Raises _Fault, StoreError where the object is too short."""
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        etag = str(answer.get("ETag", "")).strip('"') or None
        if self.length is None:
            if status != 200 or answer["ResponseMetadata"]["HTTPHeaders"].get("content-length") is None:
                raise _Fault("no length")
            self.length, self.etag = int(answer["ContentLength"]), etag
            return
        if status != 206:
            raise _Fault("range ignored")
        wanted = f"bytes {self.start + self.reached}-{self.start + self.length - 1}"
        got, _, total = str(answer.get("ContentRange", "")).partition("/")
        if total.isdecimal() and int(total) < self.start + self.length:
            raise StoreError(f"{where} ends at byte {total}, before byte {self.start + self.length}; {AGAIN}.")
        if got != wanted:
            raise _Fault("wrong range")
        if self.etag is None:
            self.etag = etag  # the rest, should it take more answers, must come from the same object

    def append(self, piece: bytes) -> None:
        if self.first_byte is None:
            self.first_byte = time.monotonic()
        self.pieces.append(piece)
        self.reached += len(piece)


def _endpoint_is_set(session: Any) -> bool:
    """Whether an endpoint other than AWS is configured: loopback and house servers have no host name per bucket."""
    if any(map(os.environ.get, ENDPOINTS)):
        return True
    profile = session._session.get_scoped_config()
    return bool(profile.get("endpoint_url"))


def create_bucket(uri: str) -> None:
    """Make the bucket of `s3://bucket`, for a server of one's own; no error where it exists."""
    store = open_store(uri)
    assert isinstance(store, S3Store)
    store._retrying("", lambda: store._client().create_bucket(Bucket=store.bucket))
