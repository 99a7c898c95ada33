"""What an answer of S3 means, and of what answers in its place: use it, try again, or say which sentence to the user.

botocore takes some answers for objects that are none: the page of a console or of a log-in, a whole object in place of a range.
These raise `Fault`. Everything that may go wrong with a request is one of `FAULTS`; `cause` says whether trying again can help, and
`explained` what to say if it cannot.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import botocore.exceptions as boto
import urllib3.exceptions

from freeguide.configs.errors import StoreError
from freeguide.data_pipeline.store.base import AGAIN, MEMORY, Access, ChangedObject, Denied, MissingObject, check_size
from freeguide.data_pipeline.store.s3_client import ResponseParserError

FAULTS = (
    boto.BotoCoreError,
    boto.ClientError,
    ResponseParserError,
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


class Fault(OSError):
    """An answer that botocore accepts and we do not; `cause` counts it."""

    def __init__(self, cause: str) -> None:
        super().__init__(cause)
        self.cause = cause


OTHER_SERVERS = {  # what is reached is no S3 server, or not the one that has the bucket
    "web page": "A web page answers in place of S3 at {}; check AWS_ENDPOINT_URL (a console's port?) and the network (a log-in?)",
    "no S3": "What answers at {} does not speak S3; check AWS_ENDPOINT_URL and the network",
    "redirected": "S3 sends elsewhere for {} without saying where; set AWS_DEFAULT_REGION or AWS_ENDPOINT_URL to its place",
}


def cause(error: Exception) -> str | None:
    """The name under which a fault is counted, or None if trying again cannot help."""
    if isinstance(error, Fault):
        return error.cause
    if isinstance(error, boto.ClientError):
        code, status = code_of(error)
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
    if isinstance(error, boto.HTTPClientError | ResponseParserError | urllib3.exceptions.HTTPError | OSError):
        return "connection broken"
    if isinstance(error, boto.CredentialRetrievalError | boto.MetadataRetrievalError):
        return "credentials not at hand"
    return None


def code_of(error: boto.ClientError) -> tuple[str, int]:
    return error.response.get("Error", {}).get("Code", ""), error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)


class Gone(StoreError):
    """The server does not know that upload: it was completed, or aborted."""


@dataclass(frozen=True)
class Asked:
    """What a request was about, for the sentence if it fails."""

    uri: str  # of the store
    bucket: str
    key: str
    at: int | None  # byte of the object, if it was reached
    access: Access
    anonymous: bool  # without credentials, whether it was told so or has found none

    @property
    def where(self) -> str:
        return f"{self.uri}/{self.key}".rstrip("/")

    @property
    def place(self) -> str:
        return self.where if self.at is None else f"{self.where} at byte {self.at}"


def explained(error: Exception, asked: Asked) -> StoreError:
    """The error whose sentence says what went wrong, and what to do."""
    kind, text = StoreError, ""
    if isinstance(error, boto.ClientError):
        kind, text = _refusal(error, asked)
    return kind(f"{text or _failure(error, asked.uri, asked.place)}")


def _refusal(error: boto.ClientError, asked: Asked) -> tuple[type[StoreError], str]:
    """The kind of error and the sentence, empty if there is none, of an answer of the server that is an error."""
    code, status = code_of(error)
    where, place = asked.where, asked.place
    if code == "NoSuchBucket":
        return StoreError, f"The bucket {asked.bucket} does not exist; create it or correct the location {asked.uri}"
    if code == "NoSuchUpload":
        return Gone, f"The upload of {where} is gone; see who aborts uploads"
    if code in _SKEWED:
        return StoreError, f"The clock of this machine differs from that of S3, which refuses {where} ({code}); set the clock"
    if code in _FULL or status == 507:
        return (
            StoreError,
            f"The store is full or over its quota at {where} ({code or status}); delete something or raise the quota",
        )
    if code in _HOST_STYLE:
        how = "set addressing_style = virtual under s3 = in the AWS config file"
        return StoreError, f"The store of {asked.uri} wants the bucket in the name of its host ({code}); {how}"
    if code in _ELSEWHERE or status in (301, 307):
        headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        region = error.response.get("Error", {}).get("Region") or headers.get("x-amz-bucket-region")
        there = f"in the region {region}" if region else "in another region or at another endpoint"
        return StoreError, f"The bucket {asked.bucket} is {there}; set AWS_DEFAULT_REGION (or AWS_ENDPOINT_URL) to that"
    if code in ("NoSuchKey", "404") or status == 404:
        return MissingObject, f"{where} does not exist; check the location"
    if code == "PreconditionFailed" or status == 412:
        return ChangedObject, f"{place} has changed since its manifest was written; {AGAIN}"
    if status == 416:
        return StoreError, f"{where} ends before byte {asked.at}; {AGAIN}"
    if code in _WRONG_KEYS:
        return Denied, f"The credentials for {asked.uri} are wrong ({code}); check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if cause(error) == "expired credentials":
        return StoreError, f"The credentials for {place} have expired; renew them and run the same command again"
    if status in (401, 403) and asked.anonymous:
        return Denied, (
            f"There are no credentials for {asked.uri}, which is not public; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY "
            "or a profile" + (", and data.unsigned=false" if asked.access.unsigned else "")
        )
    if status in (401, 403):
        pays = "" if asked.access.request_payer else ", or set data.request_payer=true if those who read pay"
        which = "this" if where == asked.uri else "this (S3 says the same of what is missing, to those who may not list)"
        ask = f"ask for the right to read, list and write{pays}"
        return Denied, f"The credentials do not allow {which} at {where} ({code or status}); {ask}"
    return StoreError, "" if cause(error) else f"S3 refuses {place} ({code or status}); check the location and the server"


def _failure(error: Exception, uri: str, place: str) -> str:
    """The sentence for what went wrong before or on the way, without an error as answer."""
    why, reason = cause(error), " ".join(str(error).split()).rstrip(".")
    if isinstance(error, boto.ProfileNotFound):
        return f"There is no AWS profile {error.kwargs.get('profile')!r} for {uri}; check AWS_PROFILE and the AWS config file"
    if isinstance(error, _SETUP):
        return f"The AWS configuration for {uri} cannot be used ({reason}); correct it"
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return f"There are no usable credentials for {uri} ({reason}); set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile"
    if isinstance(error, boto.SSLError) and why is None:
        return (
            f"The certificate of the S3 endpoint of {place} is not trusted; set AWS_CA_BUNDLE, or ca_bundle in the AWS config file"
        )
    if isinstance(error, boto.ProxyConnectionError):
        return f"The proxy to the S3 endpoint of {place} does not answer; check HTTPS_PROXY, HTTP_PROXY and NO_PROXY"
    if why in OTHER_SERVERS:
        return OTHER_SERVERS[why].format(place)
    if isinstance(error, ResponseParserError):
        return OTHER_SERVERS["no S3"].format(place)
    if why in ("no connection", "time-out"):
        return f"The S3 endpoint of {place} does not answer ({why}); check AWS_ENDPOINT_URL and the network"
    if why is not None:
        return f"{place} could not be transferred ({why}, after several tries); check the S3 server and the network"
    return f"S3 cannot be asked for {place} ({reason or type(error).__name__}); check the location and the AWS configuration"


def refuse_strangers(response_dict: dict[str, Any], operation_model: Any, **_: Any) -> None:
    """Raises Fault for what consoles, proxies and log-in pages answer, which botocore takes for objects or for missing ones."""
    headers, body, status = response_dict["headers"], response_dict["body"], response_dict["status_code"]
    html = "text/html" in str(headers.get("Content-Type", "")).lower()
    if status > 500:
        return
    if not isinstance(body, bytes):  # the body of an object, not yet read
        if html and not headers.get("ETag"):
            raise Fault("web page")
        return
    begin = body[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if status == 500 and not begin.startswith((b"{", b"[")):  # botocore says 500 for a 200 whose body is not XML
        return
    if html and begin.startswith((b"<!doctype html", b"<html")):
        raise Fault("web page")
    if begin and not begin.startswith(b"<"):
        raise Fault("no S3")
    if operation_model.name == "HeadObject" and status < 300 and not headers.get("ETag"):
        raise Fault("web page" if html else "no S3")
    # botocore asks for the bucket's region in this way, and once more for each such answer, without end.
    if operation_model.name == "HeadBucket" and status in (301, 302, 307) and not headers.get("x-amz-bucket-region"):
        raise Fault("redirected")


@dataclass
class Body:
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
        """Checks the headers of an answer against what was asked for. Raises Fault, StoreError if the object is too short."""
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        etag = str(answer.get("ETag", "")).strip('"') or None
        if self.length is None:
            if status != 200 or answer["ResponseMetadata"]["HTTPHeaders"].get("content-length") is None:
                raise Fault("no length")
            check_size(where, int(answer["ContentLength"]), self.most)
            self.length, self.etag = int(answer["ContentLength"]), etag
            return
        if status != 206:
            raise Fault("range ignored")
        wanted = f"bytes {self.start + self.reached}-{self.start + self.length - 1}"
        got, _, total = str(answer.get("ContentRange", "")).partition("/")
        if total.isdecimal() and int(total) < self.start + self.length:
            raise StoreError(f"{where} ends at byte {total}, before byte {self.start + self.length}; {AGAIN}")
        if got != wanted:
            raise Fault("wrong range")
        if self.etag is None:
            self.etag = etag  # the rest, should it take more answers, must come from the same object

    def append(self, piece: bytes) -> None:
        if self.first_byte is None:
            self.first_byte = time.monotonic()
        self.pieces.append(piece)
        self.reached += len(piece)
