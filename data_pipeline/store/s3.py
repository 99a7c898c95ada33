"""Objects of an S3 bucket. `s3_client.py` makes the clients, `s3_answers.py` says what an answer means.

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
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, TypeVar

import botocore.exceptions as boto

from freeguide.configs.errors import StoreError
from freeguide.data_pipeline.store.base import (
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
    checked,
)
from freeguide.data_pipeline.store.s3_answers import (
    FAULTS,
    OTHER_SERVERS,
    Asked,
    Body,
    Fault,
    Gone,
    cause,
    code_of,
    explained,
    refuse_strangers,
)
from freeguide.data_pipeline.store.s3_client import Terms, client, drop_client, is_anonymous, reader_of
from freeguide.data_pipeline.store.unfinished import LEFT_S

PIECE = 2**18  # most bytes of one read of a body: smaller ones cost CPU for calls, larger ones for memory that is not filled
MULTIPART = 64 * 2**20  # bytes above which an upload goes in parts; S3 still publishes it at once
MOST_PARTS = 10_000  # of one upload; S3 takes no more
PARTS_AT_ONCE = 4  # each is in memory
UPLOADS = 3  # uploads in parts of one object, if somebody else removes what has arrived

T = TypeVar("T")

_contacted: set[tuple[Terms, str]] = set()  # buckets that have answered


def _md5(data: bytes) -> str:
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode("ascii")


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
            with contextlib.suppress(*FAULTS):
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
            if not isinstance(error.__cause__, boto.ClientError) or code_of(error.__cause__)[1] != 501:
                raise
            if not self.exists(key):  # the server knows no conditions
                self.put(key, data)
        return self.get(key)

    def _put_parts(self, key: str, size: int, part: Callable[[int, int], bytes]) -> str:
        """One large object, of which `part(place, length)` gives the bytes. A fault costs one part; boto3's transfer begins again.

        As every upload in parts, one that is killed leaves what it had sent; `clean_up` clears that away.
        """
        for _ in range(UPLOADS):
            if (etag := self._upload(key, size, part)) is not None:
                return etag
        raise StoreError(
            f"What was sent of {self.uri}/{key} was removed {UPLOADS} times before it was whole; see who aborts uploads"
        )

    def _upload(self, key: str, size: int, part: Callable[[int, int], bytes]) -> str | None:
        """The etag, or None if the server does not know the upload any more and the object is not there."""
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
        except Gone:
            # If the answer to the last request was lost, the object is there; S3 makes its etag from the parts' sums.
            expected = f"{hashlib.md5(b''.join(sums), usedforsecurity=False).hexdigest()}-{len(sums)}"
            try:
                return expected if sums and self.stat(key).etag == expected else None
            except MissingObject:
                return None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            with contextlib.suppress(*FAULTS):
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
            if isinstance(error.__cause__, boto.ClientError | Fault):
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

    def clean_up(self) -> int:
        freed = 0
        if not self.prefix:  # a whole bucket may have others' uploads
            return freed
        with contextlib.suppress(*FAULTS, KeyError, ValueError, TypeError):
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

    def _terms(self) -> Terms:
        return Terms(self.retry, self.access.unsigned, by_arn=self.bucket.startswith("arn:"))

    def _client(self) -> Any:
        """This process's client: neither a fork nor a pickle of the store carries a connection."""
        return client(self._terms(), self.uri, refuse_strangers)

    def _retrying(self, key: str, request: Callable[[], T]) -> T:
        """One small request, tried again after faults that may pass. Raises StoreError with the sentence for the rest."""
        began, tries = time.monotonic(), 0
        while True:
            try:
                answer = request()
            except FAULTS as error:
                tries += 1
                self._consider(error, key, None, tries, began)
                self.retry.pause(tries, self.traffic.debt, None)
            else:
                _contacted.add((self._terms(), self.bucket))
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
        """Returns if another try makes sense, else raises the StoreError that explains `error`."""
        why = cause(error)
        new = (self._terms(), self.bucket) not in _contacted
        late = time.monotonic() - began + self.retry.read_s > self.retry.first_s or (why == "no connection" and tries >= 3)
        hopeless = why is None or (new and (late or why in OTHER_SERVERS)) or (why == "expired credentials" and tries > 3)
        if why is None or hopeless or tries >= self.retry.attempts:
            asked = Asked(self.uri, self.bucket, key, at, self.access, is_anonymous(self._terms()))
            explanation = explained(error, asked)
            if isinstance(explanation, Denied) and asked.anonymous:  # there may be credentials by the next time
                drop_client(self._terms())
            raise explanation from error
        if why == "expired credentials":
            drop_client(self._terms())
        self.traffic.retried(why)
        if on_retry is not None:
            on_retry(why)

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
        body = Body(start, length, etag, most)
        began, tries = time.monotonic(), 0
        while not body.complete:
            reached = body.reached
            try:
                self._receive(key, body, cancel)
            except FAULTS as error:
                tries = 1 if body.reached > reached else tries + 1
                self._consider(error, key, start + body.reached, tries, began, on_retry)
                self.retry.pause(tries, self.traffic.debt, cancel)
            else:
                _contacted.add((self._terms(), self.bucket))
        first = body.first_byte if body.first_byte is not None else time.monotonic()
        self.traffic.read(body.reached, first - began, time.monotonic() - began)
        return b"".join(body.pieces)

    def _receive(self, key: str, body: Body, cancel: threading.Event | None) -> None:
        """One answer: as many of the missing bytes as it brings. Raises one of FAULTS if it does not bring them all."""
        query = self._object(key)
        if body.length is not None:
            query["Range"] = f"bytes={body.start + body.reached}-{body.start + body.length - 1}"
        if body.etag is not None:
            query["IfMatch"] = f'"{body.etag}"'
        answer = self._client().get_object(**query)
        stream = answer["Body"]
        with contextlib.closing(stream):
            body.accept(answer, f"{self.uri}/{key}")
            read = reader_of(stream)
            began, got = time.monotonic(), 0
            while not body.complete:
                if cancel is not None and cancel.is_set():
                    raise Cancelled
                piece = read(min(PIECE, body.missing))
                if not piece:
                    raise Fault("truncated")
                body.append(piece)
                got += len(piece)
                elapsed = time.monotonic() - began
                if elapsed > self.retry.read_s and got < elapsed * self.retry.slow_bytes_per_s:
                    raise Fault("slow")
