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
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import boto3
import botocore
import botocore.config
import botocore.configprovider
import botocore.exceptions as boto
import botocore.parsers
import urllib3.exceptions

from freeguide.configs.errors import StoreError
from freeguide.configs.loopback import reach_loopback_directly
from freeguide.data_pipeline.store.base import (
    AGAIN,
    MEMORY,
    Access,
    Cancelled,
    ChangedObject,
    Denied,
    MissingObject,
    ObjectInfo,
    Retry,
    Store,
    Traffic,
    check_size,
    checked,
)
from freeguide.data_pipeline.store.unfinished import LEFT_S

PIECE = 2**18  # most bytes of one read of a body: smaller ones cost CPU for calls, larger ones for memory that is not filled
MULTIPART = 64 * 2**20  # bytes above which an upload goes in parts; S3 still publishes it at once
MOST_PARTS = 10_000  # of one upload; S3 takes no more
PARTS_AT_ONCE = 4  # each is in memory
UPLOADS = 3  # uploads in parts of one object, where somebody else removes what has arrived
# What a client depends on.
SURROUNDINGS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_CONFIG_FILE", "AWS_REGION")

T = TypeVar("T")

_clients: dict[tuple[object, ...], Any] = {}  # per process, since a client must not cross a fork, and per endpoint
_unsigned: set[tuple[object, ...]] = set()  # clients that have found no credentials
_contacted: set[tuple[object, ...]] = set()  # buckets that have answered the client of a place
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
_CONFLICT = {"ConditionalRequestConflict", "OperationAborted"}
_SKEWED = {"RequestTimeTooSkewed", "RequestInTheFuture"}
_FULL = {"QuotaExceeded", "InsufficientStorage", "InsufficientCapacity", "XMinioStorageFull", "XMinioAdminBucketQuotaExceeded"}
_ELSEWHERE = {"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "IllegalLocationConstraintException"}
_HOST_STYLE = {"SecondLevelDomainForbidden", "PathStyleDomainForbidden", "VirtualHostDomainRequired", "InvalidPathAccess"}
_SETUP = (boto.ProfileNotFound, boto.ConfigParseError, boto.ConfigNotFound, boto.InvalidConfigError, boto.UnknownCredentialError)


class _Fault(OSError):
    """An answer that botocore accepts and we do not; `cause` counts it."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


STRANGERS = {  # what is reached is no S3 server, or not the one that has the bucket
    "web page": "A web page answers in place of S3 at {}; check AWS_ENDPOINT_URL (a console's port?) and the network (a log-in?)",
    "no S3": "What answers at {} does not speak S3; check AWS_ENDPOINT_URL and the network",
    "redirected": "S3 sends elsewhere for {} without saying where; set AWS_DEFAULT_REGION or AWS_ENDPOINT_URL to its place",
}


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
        if code in _CONFLICT:
            return "conflict"
        if code in _FULL or status in (501, 507):
            return None
        if status >= 500 or code in ("RequestTimeout", "BadDigest", "XAmzContentSHA256Mismatch"):
            return "server error"
        return None
    if isinstance(error, boto.ConnectTimeoutError | boto.ReadTimeoutError | urllib3.exceptions.TimeoutError | TimeoutError):
        return "time-out"
    if isinstance(error, boto.EndpointConnectionError | ConnectionRefusedError):
        return "no connection"
    if isinstance(error, boto.SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(error):
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

    def __init__(self, bucket: str, prefix: str, retry: Retry, access: Access, traffic: Traffic | None = None) -> None:
        self.uri = f"s3://{bucket}/{prefix}".rstrip("/")
        self.bucket, self.prefix, self.retry, self.access = bucket, prefix, retry, access
        self.traffic = traffic or Traffic()

    def check(self, write: bool = True) -> None:
        try:
            self._retrying("", lambda: self._client().list_objects_v2(**self._bucket(), MaxKeys=1, Prefix=self._key("")))
        except Denied:  # who may read objects need not be allowed to list them
            manifest = self._object("manifest.json") | {"Range": "bytes=0-0"}
            with contextlib.suppress(*_FAULTS):
                self._client().get_object(**manifest)["Body"].close()
                return
            raise

    def get(self, key: str, most: int = MEMORY) -> bytes:
        return self._download(key, 0, None, None, None, None, most)

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
        if len(data) > MULTIPART:
            view = memoryview(data)
            return self._put_parts(key, len(data), lambda at, length: bytes(view[at : at + length]))
        # The digest lets the server refuse bytes that were damaged on their way.
        sent = self._object(key) | {"Body": data, "ContentMD5": _md5(data)}
        answer = self._retrying(key, lambda: self._client().put_object(**sent))
        return str(answer["ETag"]).strip('"')

    def put_file(self, key: str, path: Path) -> str:
        size = path.stat().st_size
        if size <= MULTIPART:
            return self.put(key, path.read_bytes())
        with open(path, "rb") as file:
            return self._put_parts(key, size, lambda at, length: os.pread(file.fileno(), length, at))

    def create(self, key: str, data: bytes) -> bytes:
        sent = self._object(key) | {"Body": data, "ContentMD5": _md5(data), "IfNoneMatch": "*"}
        try:
            self._retrying(key, lambda: self._client().put_object(**sent))
        except ChangedObject:
            pass  # there is one, perhaps from a try whose answer was lost
        except StoreError as error:
            if not isinstance(error.__cause__, boto.ClientError) or _code(error.__cause__)[1] != 501:
                raise
            if not self.exists(key):  # the server knows no conditions
                self.put(key, data)
        return self.get(key)

    def _put_parts(self, key: str, size: int, part: Callable[[int, int], bytes]) -> str:
        """One large object, of which `part(place, length)` gives the bytes. A fault costs one part; boto3's transfer begins again.

        As every upload in parts, one that is killed leaves what it had sent; `sweep` clears that away.
        """
        for _ in range(UPLOADS):
            if (etag := self._upload(key, size, part)) is not None:
                return etag
        raise StoreError(
            f"What was sent of {self.uri}/{key} was removed {UPLOADS} times before it was whole; see who aborts uploads."
        )

    def _upload(self, key: str, size: int, part: Callable[[int, int], bytes]) -> str | None:
        """The etag, or None where the server does not know the upload any more and the object is not there."""
        place = self._object(key)
        length = max(MULTIPART, -(-size // MOST_PARTS))
        upload = place | {"UploadId": self._retrying(key, lambda: self._client().create_multipart_upload(**place))["UploadId"]}

        def send(number: int) -> tuple[dict[str, Any], bytes]:
            data = part((number - 1) * length, length)
            sent = upload | {"PartNumber": number, "Body": data, "ContentMD5": _md5(data)}
            answer = self._retrying(key, functools.partial(self._upload_part, sent))
            return {"PartNumber": number, "ETag": answer["ETag"]}, hashlib.md5(data, usedforsecurity=False).digest()

        pool = ThreadPoolExecutor(PARTS_AT_ONCE)
        sums: list[bytes] = []
        try:
            parts, sums = map(list, zip(*pool.map(send, range(1, -(-size // length) + 1)), strict=True))
            whole = upload | {"MultipartUpload": {"Parts": parts}}
            self._retrying(key, lambda: self._client().complete_multipart_upload(**whole))
        except _Gone:
            # If the answer to the last request was lost, the object is there; S3 makes its etag from the parts' sums.
            expected = f"{hashlib.md5(b''.join(sums), usedforsecurity=False).hexdigest()}-{len(sums)}"
            try:
                return expected if sums and self.stat(key).etag == expected else None
            except MissingObject:
                return None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            with contextlib.suppress(*_FAULTS):
                self._client().abort_multipart_upload(**upload)
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return self.stat(key).etag  # Ceph's answer to the last request does not name it

    def _upload_part(self, request: dict[str, Any]) -> Any:
        return self._client().upload_part(**request)

    def stat(self, key: str) -> ObjectInfo:
        checked(key)
        try:
            answer = self._retrying(key, lambda: self._client().head_object(**self._object(key)))
        except StoreError as error:
            # The answer to a HEAD has no body, so it cannot say whether the key, the bucket or the rights are missing.
            if isinstance(error.__cause__, boto.ClientError | _Fault):
                with contextlib.suppress(Denied):
                    self.check()
            raise
        return ObjectInfo(key, answer["ContentLength"], answer["ETag"].strip('"'))

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        found: list[ObjectInfo] = []
        query: dict[str, Any] = self._bucket() | {"Prefix": self._key(prefix)}
        skip = len(self._key(""))
        while True:
            answer = self._retrying(prefix, lambda: self._client().list_objects_v2(**query))
            for item in answer.get("Contents", []):
                found.append(ObjectInfo(item["Key"][skip:], item["Size"], item["ETag"].strip('"')))
            if not answer.get("IsTruncated"):
                return sorted(found, key=lambda info: info.key)
            query["ContinuationToken"] = answer["NextContinuationToken"]

    def delete(self, key: str) -> None:
        place = self._object(key)
        self._retrying(key, lambda: self._client().delete_object(**place))

    def sweep(self) -> int:
        freed = 0
        if not self.prefix:  # a whole bucket may have others' uploads
            return freed
        with contextlib.suppress(*_FAULTS, KeyError, ValueError, TypeError):
            client = self._client()
            for page in client.get_paginator("list_multipart_uploads").paginate(**self._bucket(), Prefix=self._key("")):
                for upload in page.get("Uploads", []):
                    freed += self._abort_left(upload["Key"], upload["UploadId"], upload["Initiated"])
        return freed

    def _abort_left(self, name: str, upload: str, began: datetime) -> int:
        """Aborts an upload that has got nothing for a day, by the server's clock; the bytes that were there."""
        place = self._bucket() | {"Key": name, "UploadId": upload}
        size, last = 0, began
        for page in self._client().get_paginator("list_parts").paginate(**place):
            now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
            for part in page.get("Parts", []):
                size, last = size + part["Size"], max(last, part["LastModified"])
        if (now - last).total_seconds() <= LEFT_S:
            return 0
        self._client().abort_multipart_upload(**place)
        return size

    def child(self, prefix: str) -> "S3Store":
        return S3Store(self.bucket, self._key(checked(prefix.strip("/"))), self.retry, self.access, self.traffic)

    def create_bucket(self) -> None:
        self._retrying("", lambda: self._client().create_bucket(Bucket=self.bucket))

    def _key(self, key: str) -> str:
        return f"{self.prefix}/{key}" if self.prefix else key

    def _bucket(self) -> dict[str, Any]:
        """What every request says."""
        return {"Bucket": self.bucket} | ({"RequestPayer": "requester"} if self.access.request_payer else {})

    def _object(self, key: str) -> dict[str, Any]:
        return self._bucket() | {"Key": self._key(checked(key))}

    def _where(self) -> tuple[object, ...]:
        by_arn = self.bucket.startswith("arn:")
        return (os.getpid(), self.retry, self.access.unsigned, by_arn, *map(os.environ.get, SURROUNDINGS))

    def _client(self) -> Any:
        """This process's client; made on first use, so that neither a fork nor a pickle carries a connection."""
        where = self._where()
        with _lock:
            if where not in _clients:
                reach_loopback_directly()  # in a worker too, whose node has an environment of its own
                session = boto3.session.Session()
                nobody = not self.access.unsigned and session.get_credentials() is None
                if nobody:
                    print(f"no AWS credentials are found: {self.uri} is read without, as public data", file=sys.stderr, flush=True)
                    _unsigned.add(where)
                config = _configuration(session, self.retry, self.access.unsigned or nobody, by_arn=self.bucket.startswith("arn:"))
                try:
                    _clients[where] = session.client("s3", config=config)
                except ValueError as error:
                    raise StoreError(
                        f"The AWS configuration for {self.uri} cannot be used ({str(error).rstrip('.')}); correct it."
                    ) from error
                _clients[where].meta.events.register("before-parse.s3", _refuse_strangers)
            return _clients[where]

    def _drop_client(self) -> None:
        """The next request makes another session, which asks botocore's whole provider chain for credentials again."""
        with _lock:
            _clients.pop(self._where(), None)
            _unsigned.discard(self._where())

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
                _contacted.add((*self._where(), self.bucket))
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
        new = (*self._where(), self.bucket) not in _contacted
        late = time.monotonic() - began + self.retry.read_s > self.retry.first_s or (cause == "no connection" and tries >= 3)
        hopeless = cause is None or (new and (late or cause in STRANGERS)) or (cause == "expired credentials" and tries > 3)
        if cause is None or hopeless or tries >= self.retry.attempts:
            self._explain(error, key, at)
        if cause == "expired credentials":
            self._drop_client()
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
        most: int = MEMORY,
    ) -> bytes:
        """The bytes [start, start + length) of an object, or all of it, at `most`, over as many answers as it takes."""
        checked(key)
        body = _Body(start, length, etag, most)
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
                _contacted.add((*self._where(), self.bucket))
        first = body.first_byte if body.first_byte is not None else time.monotonic()
        self.traffic.read(body.reached, first - began, time.monotonic() - began)
        return b"".join(body.pieces)

    def _receive(self, key: str, body: "_Body", cancel: threading.Event | None) -> None:
        """One answer: as many of the missing bytes as it brings. Raises one of _FAULTS where it does not bring them all."""
        query = self._object(key)
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
        kind, text = StoreError, ""
        if isinstance(error, boto.ClientError):
            kind, text = self._refusal(error, where, at)
        if not text:
            text = _failure(error, self.uri, where if at is None else f"{where} at byte {at}")
        raise kind(f"{text}.") from error

    def _refusal(self, error: boto.ClientError, where: str, at: int | None) -> tuple[type[StoreError], str]:
        """The kind of error and the sentence, empty where there is none, of an answer of the server that is an error."""
        code, status = _code(error)
        place = where if at is None else f"{where} at byte {at}"
        if code == "NoSuchBucket":
            return StoreError, f"The bucket {self.bucket} does not exist; create it or correct the location {self.uri}"
        if code == "NoSuchUpload":
            return _Gone, f"The upload of {where} is gone; see who aborts uploads"
        if code in _SKEWED:
            return StoreError, f"The clock of this machine differs from that of S3, which refuses {where} ({code}); set the clock"
        if code in _FULL or status == 507:
            return (
                StoreError,
                f"The store is full or over its quota at {where} ({code or status}); delete something or raise the quota",
            )
        if code in _HOST_STYLE:
            how = "set addressing_style = virtual under s3 = in the AWS config file"
            return StoreError, f"The store of {self.uri} wants the bucket in the name of its host ({code}); {how}"
        if code in _ELSEWHERE or status in (301, 307):
            headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            region = error.response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region")
            there = f"in the region {region}" if region else "in another region or at another endpoint"
            return StoreError, f"The bucket {self.bucket} is {there}; set AWS_DEFAULT_REGION (or AWS_ENDPOINT_URL) to that"
        if code in ("NoSuchKey", "404") or status == 404:
            return MissingObject, f"{where} does not exist; check the location"
        if code == "PreconditionFailed" or status == 412:
            return ChangedObject, f"{place} has changed since its manifest was written; {AGAIN}"
        if status == 416:
            return StoreError, f"{where} ends before byte {at}; {AGAIN}"
        if code in _WRONG_KEYS:
            return Denied, f"The credentials for {self.uri} are wrong ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        if _cause(error) == "expired credentials":
            return StoreError, f"The credentials for {place} have expired; renew them and run the same command again"
        if status in (401, 403) and (self.access.unsigned or self._where() in _unsigned):
            self._drop_client()
            return Denied, (
                f"There are no credentials for {self.uri}, which is not public; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
                "or a profile" + (", and data.unsigned=false" if self.access.unsigned else "")
            )
        if status in (401, 403):
            pays = "" if self.access.request_payer else ", or set data.request_payer=true where those who read pay"
            which = "this" if where == self.uri else "this (S3 says the same of what is missing, to those who may not list)"
            ask = f"ask for the right to read, list and write{pays}"
            return Denied, f"The credentials do not allow {which} at {where} ({code or status}); {ask}"
        return StoreError, "" if _cause(error) else f"S3 refuses {place} ({code or status}); check the location and the server"


class _Gone(StoreError):
    """The server does not know that upload: it was completed, or aborted."""


def _failure(error: Exception, uri: str, place: str) -> str:
    """The sentence for what went wrong before or on the way, without an error as answer."""
    cause, reason = _cause(error), " ".join(str(error).split()).rstrip(".")
    if isinstance(error, boto.ProfileNotFound):
        return f"There is no AWS profile {error.kwargs.get('profile')!r} for {uri}; check AWS_PROFILE and the AWS config file"
    if isinstance(error, _SETUP):
        return f"The AWS configuration for {uri} cannot be used ({reason}); correct it"
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return f"There are no usable credentials for {uri} ({reason}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile"
    if isinstance(error, boto.SSLError) and cause is None:
        return (
            f"The certificate of the S3 endpoint of {place} is not trusted; set AWS_CA_BUNDLE, or ca_bundle in the AWS config file"
        )
    if isinstance(error, boto.ProxyConnectionError):
        return f"The proxy to the S3 endpoint of {place} does not answer; check HTTPS_PROXY, HTTP_PROXY and NO_PROXY"
    if cause in STRANGERS:
        return STRANGERS[cause].format(place)
    if isinstance(error, botocore.parsers.ResponseParserError):
        return STRANGERS["no S3"].format(place)
    if cause in ("no connection", "time-out"):
        return f"The S3 endpoint of {place} does not answer ({cause}); check AWS_ENDPOINT_URL and the network"
    if cause is not None:
        return f"{place} could not be transferred ({cause}, after several tries); check the S3 server and the network"
    return f"S3 cannot be asked for {place} ({reason or type(error).__name__}); check the location and the AWS configuration"


def _refuse_strangers(response_dict: dict[str, Any], operation_model: Any, **_: Any) -> None:
    """Raises _Fault for what consoles, proxies and log-in pages answer, which botocore takes for objects or for missing ones."""
    headers, body, status = response_dict["headers"], response_dict["body"], response_dict["status_code"]
    html = "text/html" in str(headers.get("Content-Type", "")).lower()
    if status > 500:
        return
    if not isinstance(body, bytes):  # the body of an object, not yet read
        if html and not headers.get("ETag"):
            raise _Fault("web page")
        return
    begin = body[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if status == 500 and not begin.startswith((b"{", b"[")):  # botocore says 500 for a 200 whose body is not XML
        return
    if html and begin.startswith((b"<!doctype html", b"<html")):
        raise _Fault("web page")
    if begin and not begin.startswith(b"<"):
        raise _Fault("no S3")
    if operation_model.name == "HeadObject" and status < 300 and not headers.get("ETag"):
        raise _Fault("web page" if html else "no S3")
    # botocore asks for the bucket's region in this way, and once more for each such answer, without end.
    if operation_model.name == "HeadBucket" and status in (301, 302, 307) and not headers.get("x-amz-bucket-region"):
        raise _Fault("redirected")


def _configuration(session: Any, retry: Retry, unsigned: bool, by_arn: bool) -> botocore.config.Config:
    """What we need to have our way in; all else, and whatever the user's own configuration says, stays as it is."""
    core = session._session
    profile = core.get_scoped_config()
    endpoint = botocore.configprovider.ConfiguredEndpointProvider(core.full_config, profile, "s3").provide()
    options: dict[str, Any] = {}
    s3 = profile.get("s3")
    styled = isinstance(s3, dict) and ("addressing_style" in s3 or "use_accelerate_endpoint" in s3)
    if endpoint and not styled and not by_arn:
        options["s3"] = {"addressing_style": "path"}  # loopback and house servers have no host name per bucket
    for name in ("request_checksum_calculation", "response_checksum_validation"):
        if name not in profile and f"AWS_{name.upper()}" not in os.environ:
            options[name] = "when_required"  # older servers do not know the newer headers
    if unsigned:
        options["signature_version"] = botocore.UNSIGNED
    return botocore.config.Config(
        connect_timeout=retry.connect_s,
        read_timeout=retry.read_s,
        retries={"total_max_attempts": 1},
        max_pool_connections=64,
        **options,
    )


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode("ascii")


@dataclass
class _Body:
    """The part of an object that is wanted, and how much of it has come. `length` is None until the first answer tells it."""

    start: int
    length: int | None
    etag: str | None
    most: int = MEMORY
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
            check_size(where, int(answer["ContentLength"]), self.most)
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
