"""Objects of an S3 bucket; the only user of boto3.

boto3 retries what fails before the headers of an answer, but not a body that is cut, reset, stalled or slow, and it does not notice
an ignored `Range`. So its own retries are switched off, and `_download` does the work: check the status, `Content-Range` and
`ETag`, count the bytes, and after any fault ask for the rest from the byte that was reached, after a pause with full jitter
(Brooker 2015).
"""

import base64
import contextlib
import functools
import hashlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import boto3
import botocore.config
import botocore.exceptions as boto
import botocore.parsers
import urllib3.exceptions

from configs.errors import StoreError
from configs.loopback import reach_loopback_directly
from data_pipeline.store import AGAIN, Cancelled, ChangedObject, MissingObject, ObjectInfo, Retry, Store, Traffic, checked

PIECE = 2**18  # most bytes of one read of a body: smaller ones cost CPU for calls, larger ones for memory that is not filled
MULTIPART = 64 * 2**20  # bytes above which an upload goes in parts; S3 still publishes it at once
MOST_PARTS = 10_000  # of one upload; S3 takes no more
PARTS_AT_ONCE = 4  # each is in memory
ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")

T = TypeVar("T")

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
        name = self._key(checked(key))
        if len(data) > MULTIPART:
            view = memoryview(data)
            return self._put_parts(key, len(data), lambda at, length: bytes(view[at : at + length]))
        # The digest lets the server refuse bytes that were damaged on their way.
        sent = {"Bucket": self.bucket, "Key": name, "Body": data, "ContentMD5": _md5(data)}
        answer = self._retrying(key, lambda: self._client().put_object(**sent))
        return str(answer["ETag"]).strip('"')

    def put_file(self, key: str, path: Path) -> str:
        size = path.stat().st_size
        if size <= MULTIPART:
            return self.put(key, path.read_bytes())
        with open(path, "rb") as file:
            return self._put_parts(key, size, lambda at, length: os.pread(file.fileno(), length, at))

    def _put_parts(self, key: str, size: int, part: Callable[[int, int], bytes]) -> str:
        """One large object, of which `part(place, length)` gives the bytes. A fault costs one part; boto3's transfer begins again.

        As every upload in parts, one that is killed leaves what it had sent; a lifecycle rule of the bucket clears that away.
        """
        place = {"Bucket": self.bucket, "Key": self._key(checked(key))}
        length = max(MULTIPART, -(-size // MOST_PARTS))
        upload = place | {"UploadId": self._retrying(key, lambda: self._client().create_multipart_upload(**place))["UploadId"]}

        def send(number: int) -> dict[str, Any]:
            data = part((number - 1) * length, length)
            sent = upload | {"PartNumber": number, "Body": data, "ContentMD5": _md5(data)}
            answer = self._retrying(key, functools.partial(self._upload_part, sent))
            return {"PartNumber": number, "ETag": answer["ETag"]}

        pool = ThreadPoolExecutor(PARTS_AT_ONCE)
        try:
            parts = list(pool.map(send, range(1, -(-size // length) + 1)))
            whole = upload | {"MultipartUpload": {"Parts": parts}}
            self._retrying(key, lambda: self._client().complete_multipart_upload(**whole))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            with contextlib.suppress(*_FAULTS):
                self._client().abort_multipart_upload(**upload)
            raise
        pool.shutdown()
        return self.stat(key).etag  # Ceph's answer to the last request does not name it

    def _upload_part(self, request: dict[str, Any]) -> Any:
        return self._client().upload_part(**request)

    def stat(self, key: str) -> ObjectInfo:
        checked(key)
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
        name = self._key(checked(key))
        self._retrying(key, lambda: self._client().delete_object(Bucket=self.bucket, Key=name))

    def child(self, prefix: str) -> "S3Store":
        return S3Store(self.bucket, self._key(checked(prefix.strip("/"))), self.retry, self.traffic)

    def create_bucket(self) -> None:
        self._retrying("", lambda: self._client().create_bucket(Bucket=self.bucket))

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _where(self) -> tuple[object, ...]:
        return (os.getpid(), self.retry, *map(os.environ.get, ENDPOINTS))

    def _client(self) -> Any:
        """This process's client; made on first use, so that neither a fork nor a pickle carries a connection."""
        where = self._where()
        with _lock:
            if where not in _clients:
                reach_loopback_directly()  # in a worker too, whose node has an environment of its own
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
        checked(key)
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


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode("ascii")


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
