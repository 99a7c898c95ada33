"""Tests of s3.py against servers that answer what they like: every refusal has its own sentence, and the user's settings count."""

import http.server
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import botocore.exceptions
import pytest

from freeguide.configs.errors import StoreError
from freeguide.data_pipeline.store.base import Access, Denied, MissingObject, Retry
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.store.s3 import UPLOADS, S3Store
from tests.data_pipeline.conftest import KEYS, s3_uri

FAST = Retry(attempts=3, base_s=0.01, cap_s=0.02, connect_s=2, read_s=5, first_s=15)
EMPTY = b'<?xml version="1.0"?><ListBucketResult><IsTruncated>false</IsTruncated></ListBucketResult>'
AMAZON = {"x-amz-request-id": "1"}
PAGE = b"<!DOCTYPE html><html><body>log in</body></html>"

Answer = tuple[int, dict[str, str], bytes]
Request = http.server.BaseHTTPRequestHandler


def error(status: int, code: str, more: str = "", **headers: str) -> Answer:
    text = f"<Error><Code>{code}</Code><Message>no</Message>{more}</Error>"
    return status, {"Content-Type": "application/xml", **AMAZON, **headers}, text.encode()


class Server:
    """Answers each request with what `answer` says, and keeps the requests."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answer: Callable[[Request], Answer] = lambda request: (200, dict(AMAZON), EMPTY)
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def respond(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server.requests.append(self)
                status, headers, body = server.answer(self)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = respond

            def log_message(self, *_: object) -> None:
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No settings but the test's own, and keys in the environment."""
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path_factory.getbasetemp() / "no config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path_factory.getbasetemp() / "no credentials"))
    return monkeypatch


@pytest.fixture(scope="module")
def one_server() -> Iterator[Server]:
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def server(one_server: Server, alone: pytest.MonkeyPatch) -> Server:
    """The same for all tests, as making a client takes long."""
    alone.setenv("AWS_ENDPOINT_URL", one_server.url)
    one_server.requests.clear()
    one_server.answer = lambda request: (200, dict(AMAZON), EMPTY)
    return one_server


def store_at(bucket: str = "bucket-a", access: Access | None = None) -> S3Store:
    store = open_store(f"s3://{bucket}/x", FAST, access)
    assert isinstance(store, S3Store)
    return store


def sentence(use: Callable[[], object], kind: type[StoreError] = StoreError) -> str:
    with pytest.raises(StoreError) as caught:
        use()
    text = str(caught.value)
    assert type(caught.value) is kind, text
    assert not text.endswith(".")
    assert "\n" not in text
    return text


# ------------------------------------------------------------------------------------------------------- refusals by name

REFUSALS = {
    "skew": (error(403, "RequestTimeTooSkewed"), "clock of this machine differs"),
    "quota": (error(403, "QuotaExceeded"), "full or over its quota"),
    "no room": (error(507, "InsufficientStorage"), "full or over its quota"),
    "minio's disk": (error(507, "XMinioStorageFull"), "full or over its quota"),
    "host style": (error(403, "SecondLevelDomainForbidden"), "addressing_style = virtual"),
    "region": (
        error(400, "AuthorizationHeaderMalformed", "<Region>eu-west-3</Region>"),
        "is in the region eu-west-3; set AWS_DEFAULT",
    ),
    "redirect": (error(301, "PermanentRedirect"), "S3 sends elsewhere for"),
    "bucket": (error(404, "NoSuchBucket"), "bucket bucket-a does not exist"),
    "a page": ((200, {"Content-Type": "text/html"}, PAGE), "web page answers in place of S3"),
    "a page that misses": ((404, {"Content-Type": "text/html"}, PAGE), "web page answers in place of S3"),
    "a page that refuses": ((403, {"Content-Type": "text/html; charset=utf-8"}, PAGE), "web page answers in place of S3"),
    "a page elsewhere": ((302, {"Content-Type": "text/html", "Location": "http://log.in/"}, PAGE), "web page answers in place"),
    "a plain text": ((404, {"Content-Type": "text/plain"}, b"404: Not Found"), "does not speak S3"),
    "json": ((200, {"Content-Type": "application/json"}, b'{"status": "ok"}'), "does not speak S3"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_each_refusal_has_its_sentence(name: str, server: Server) -> None:
    answer, expected = REFUSALS[name]
    server.answer = lambda request: answer
    store = store_at()
    uses: list[Callable[[], object]] = [store.check, store.list, lambda: store.get("k"), lambda: store.put("k", b"1")]
    for use in uses:
        if name == "json" and use is uses[2]:
            continue  # any bytes may be an object
        assert expected in sentence(use), use
    assert expected in sentence(lambda: store.exists("k"))


def test_a_page_in_place_of_an_object_is_no_object(server: Server) -> None:
    server.answer = lambda request: (200, {"Content-Type": "text/html"}, PAGE)
    assert "web page answers" in sentence(lambda: store_at().get("k"))
    assert "web page answers" in sentence(lambda: store_at().get_range("k", 0, 4))


def test_a_bucket_that_went_away_is_not_a_missing_object(server: Server) -> None:
    def answer(request: Request) -> Answer:
        return (404, dict(AMAZON), b"") if request.command == "HEAD" else error(404, "NoSuchBucket")

    store = store_at("bucket-b")
    assert store.list() == []  # it was there
    server.answer = answer
    assert "bucket bucket-b does not exist" in sentence(lambda: store.exists("k"))
    server.answer = lambda request: (404, dict(AMAZON), b"") if request.command == "HEAD" else (200, dict(AMAZON), EMPTY)
    assert not store.exists("k")
    with pytest.raises(MissingObject):
        store.stat("k")


def test_without_the_right_to_list_objects_can_be_read_all_the_same(server: Server) -> None:
    def answer(request: Request) -> Answer:
        there = request.path.startswith("/bucket-c/x/manifest.json")
        if "list-type" in request.path or not there:
            return error(403, "AccessDenied")
        return 200, {**AMAZON, "ETag": '"1"'}, b"12"

    server.answer = answer
    store = store_at("bucket-c")
    store.check()
    assert store.get("manifest.json") == b"12"
    assert store.stat("manifest.json").bytes == 2
    for use in (lambda: store.get("other"), lambda: store.exists("other")):
        text = sentence(use, Denied)
        assert "says the same of what is missing" in text
        assert "data.request_payer=true" in text
    assert "do not allow this at" in sentence(store.list, Denied)


def test_a_missing_profile_and_a_broken_configuration_are_named(alone: pytest.MonkeyPatch, tmp_path: Path) -> None:
    alone.setenv("AWS_PROFILE", "nobody")
    assert "no AWS profile 'nobody' for s3://bucket-a/x" in sentence(store_at().check)
    alone.delenv("AWS_PROFILE")
    alone.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    (tmp_path / "config").write_text("[profile\nnonsense")
    assert "AWS configuration for s3://bucket-a/x cannot be used" in sentence(store_at().check)
    (tmp_path / "config").write_text("")
    alone.setenv("AWS_ENDPOINT_URL", "not an address")
    assert "not an address" in sentence(store_at().check)


def test_a_proxy_that_is_gone_is_named_and_never_asked_for_what_is_on_this_machine(server: Server) -> None:
    with pytest.MonkeyPatch().context() as patch:
        for name in ("no_proxy", "NO_PROXY"):
            patch.setenv(name, "")
        for name in ("http_proxy", "HTTP_PROXY"):
            patch.setenv(name, "http://127.0.0.1:9")
        store_at("bucket-d").check()
        assert server.requests
        patch.setenv("AWS_ENDPOINT_URL", "http://store.example:9000")
        assert "proxy to the S3 endpoint" in sentence(store_at("bucket-d").check)


# ---------------------------------------------------------------------------------------------------- the user's settings


def address(store: S3Store) -> urllib.parse.SplitResult:
    """Where the store asks for an object."""
    url = store._client().generate_presigned_url("get_object", {"Bucket": store.bucket, "Key": store._key("k")})
    return urllib.parse.urlsplit(url)


def test_the_addressing_style_of_the_profile_counts(alone: pytest.MonkeyPatch, tmp_path: Path) -> None:
    alone.setenv("AWS_ENDPOINT_URL", "https://store.example:9000")
    assert (address(store_at()).netloc, address(store_at()).path) == ("store.example:9000", "/bucket-a/x/k")
    (tmp_path / "config.virtual").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    alone.setenv("AWS_CONFIG_FILE", str(tmp_path / "config.virtual"))
    assert (address(store_at()).netloc, address(store_at()).path) == ("bucket-a.store.example:9000", "/x/k")


def test_endpoint_and_region_of_the_profile_count(alone: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "[profile house]\nregion = mars-1\nservices = ours\nrequest_checksum_calculation = when_supported\n"
    (tmp_path / "config").write_text(text + "[services ours]\ns3 =\n  endpoint_url = https://s3.house:7000\n")
    alone.delenv("AWS_DEFAULT_REGION")
    alone.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    alone.setenv("AWS_PROFILE", "house")
    found = address(store_at())
    assert (found.netloc, found.path) == ("s3.house:7000", "/bucket-a/x/k")
    config = store_at()._client().meta.config
    assert config.region_name == "mars-1"
    assert config.request_checksum_calculation == "when_supported"
    assert config.response_checksum_validation == "when_required"


@pytest.mark.parametrize("colon", [":", "/"])
def test_an_access_point_is_a_bucket(colon: str, alone: pytest.MonkeyPatch) -> None:
    store = store_at(f"arn:aws:s3:eu-west-1:123456789012:accesspoint{colon}data")
    assert store.uri == f"s3://arn:aws:s3:eu-west-1:123456789012:accesspoint{colon}data/x"
    found = address(store)
    assert (found.netloc, found.path) == ("data-123456789012.s3-accesspoint.eu-west-1.amazonaws.com", "/x/k")
    alone.setenv("AWS_ENDPOINT_URL", "https://s3-accesspoint.house:7000")
    assert address(store).netloc == "data-123456789012.s3-accesspoint.house:7000"


def test_who_reads_pays_where_that_is_asked_for(server: Server) -> None:
    def uses(store: S3Store) -> list[str | None]:
        server.answer = lambda request: (200, {**AMAZON, "ETag": '"1"'}, EMPTY)
        server.requests.clear()
        store.check()
        store.get("k")
        store.stat("k")
        store.put("k", b"1")
        store.delete("k")
        store.child("y").list()
        return [request.headers.get("x-amz-request-payer") for request in server.requests]

    assert uses(store_at()) == [None] * 6
    assert uses(store_at(access=Access(request_payer=True))) == ["requester"] * 6


def test_public_data_need_no_credentials(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(request: Request) -> Answer:
        return (200, {**AMAZON, "ETag": '"1"'}, EMPTY) if request.command == "GET" else error(403, "AccessDenied")

    server.answer = answer
    with pytest.MonkeyPatch().context() as patch:
        patch.delenv("AWS_ACCESS_KEY_ID")
        patch.delenv("AWS_SECRET_ACCESS_KEY")
        store = store_at("bucket-e")
        store.check()
        assert store.get("k") == EMPTY
        said = capsys.readouterr().err
        assert said == "no AWS credentials are found: s3://bucket-e/x is read without, as public data\n"
        assert "There are no credentials for s3://bucket-e/x, which is not public" in sentence(lambda: store.put("k", b"1"), Denied)
        server.answer = lambda request: error(403, "AccessDenied")
        assert "There are no credentials for s3://bucket-e/x, which is not public" in sentence(store.check, Denied)
        server.answer = answer
    assert {request.headers.get("Authorization") for request in server.requests} == {None}
    store_at("bucket-e").get("k")
    assert server.requests[-1].headers["Authorization"]
    store_at("bucket-e", Access(unsigned=True)).get("k")
    assert server.requests[-1].headers.get("Authorization") is None
    text = sentence(lambda: store_at("bucket-e", Access(unsigned=True)).put("k", b"1"), Denied)
    assert "data.unsigned=false" in text


# --------------------------------------------------------------------------------------------------------- uploads in parts


@pytest.fixture
def parts(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    monkeypatch.setattr("freeguide.data_pipeline.store.s3.MULTIPART", 5 * 2**20)
    store = open_store(s3_uri(tmp_path), FAST)
    assert isinstance(store, S3Store)
    return store


GONE = botocore.exceptions.ClientError(
    {"Error": {"Code": "NoSuchUpload"}, "ResponseMetadata": {"HTTPStatusCode": 404}}, "CompleteMultipartUpload"
)
LARGE = bytes(5 * 2**20) + b"the last part"


def uploads(store: S3Store) -> int:
    return len(store._client().list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix).get("Uploads", []))


def test_an_upload_whose_last_answer_is_lost_has_succeeded(parts: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    client, calls = parts._client(), []
    complete = client.complete_multipart_upload

    def lost(**request: object) -> object:
        calls.append(request)
        if len(calls) > 1:
            raise GONE
        complete(**request)
        raise botocore.exceptions.ReadTimeoutError(endpoint_url="http://s3")

    monkeypatch.setattr(client, "complete_multipart_upload", lost)
    etag = parts.put("large", LARGE)
    assert parts.stat("large").etag == etag
    assert parts.get("large") == LARGE
    assert len(calls) == 2


def test_an_upload_that_somebody_aborts_begins_anew(parts: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    client, calls = parts._client(), []
    complete = client.complete_multipart_upload

    def aborted(**request: object) -> object:
        calls.append(request)
        if len(calls) in often:
            client.abort_multipart_upload(**{name: request[name] for name in ("Bucket", "Key", "UploadId")})
            raise GONE  # moto itself would answer 500
        return complete(**request)

    monkeypatch.setattr(client, "complete_multipart_upload", aborted)
    often = [1]
    parts.put("large", LARGE)
    assert parts.get("large") == LARGE
    often = list(range(100))
    assert f"removed {UPLOADS} times before it was whole" in sentence(lambda: parts.put("other", LARGE))
    assert not parts.exists("other")


def test_what_killed_uploads_left_is_swept_after_a_day(parts: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    client = parts._client()
    for store in (parts, parts.child("below"), open_store(f"{parts.uri}-2", FAST)):
        assert isinstance(store, S3Store)
        place = {"Bucket": store.bucket, "Key": store._key("large")}
        upload = client.create_multipart_upload(**place)["UploadId"]
        client.upload_part(**place, UploadId=upload, PartNumber=1, Body=b"half")
    assert parts.clean_up() == 0
    assert uploads(parts) == 3
    monkeypatch.setattr(
        "freeguide.data_pipeline.store.s3.LEFT_S", -60.0
    )  # as if a day had gone by, on a server whose clock has whole seconds
    assert parts.clean_up() == 2 * len(b"half")
    assert uploads(parts) == 1  # of the neighbour whose name begins alike


def test_an_upload_that_still_grows_is_left_alone(parts: S3Store, monkeypatch: pytest.MonkeyPatch) -> None:
    client, aborted = parts._client(), []
    now = datetime.now(timezone.utc)
    monkeypatch.setattr(client, "abort_multipart_upload", lambda **request: aborted.append(request["UploadId"]))

    class Pages:
        def paginate(self, UploadId: str, **_: object) -> list[dict[str, object]]:
            headers = {"date": now.strftime("%a, %d %b %Y %H:%M:%S GMT")}
            part = {"Size": 5, "LastModified": now - timedelta(hours=1 if UploadId == "alive" else 30)}
            return [{"ResponseMetadata": {"HTTPHeaders": headers}, "Parts": [part]}]

    monkeypatch.setattr(client, "get_paginator", lambda name: Pages())
    for upload in ("alive", "dead"):
        parts._abort_left("key", upload, now - timedelta(days=3))
    assert aborted == ["dead"]


def test_nothing_is_swept_where_nobody_answers(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert store_at().clean_up() == 0
    alone.setenv("AWS_PROFILE", "nobody")
    assert store_at().clean_up() == 0


# -------------------------------------------------------------------------------------------------------------- conditions


def test_of_two_that_create_an_object_both_get_the_first_ones(s3_endpoint: str, tmp_path: Path) -> None:
    for store in (open_store(s3_uri(tmp_path)), open_store(str(tmp_path / "folder"))):
        assert store.create("a/b", b"first") == b"first"
        assert store.create("a/b", b"second") == b"first"
        assert store.get("a/b") == b"first"
        assert [info.key for info in store.list()] == ["a/b"]


def test_a_server_that_knows_no_conditions_is_asked_first(server: Server) -> None:
    kept: dict[str, bytes] = {}

    def answer(request: Request) -> Answer:
        if request.headers.get("If-None-Match"):
            return error(501, "NotImplemented")
        if request.command == "PUT":
            kept[request.path] = b"ours"
            return 200, {**AMAZON, "ETag": '"1"'}, b""
        there = request.path in kept or "list-type" in request.path
        return (200, {**AMAZON, "ETag": '"1"'}, kept.get(request.path, EMPTY)) if there else error(404, "NoSuchKey")

    server.answer = answer
    store = store_at("bucket-f")
    assert store.create("k", b"ours") == b"ours"
    assert store.create("k", b"other") == b"ours"


def test_a_folder_without_links_creates_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("freeguide.data_pipeline.store.folder.os.link", no_links)
    store = open_store(str(tmp_path))
    assert [store.create("k", b"first"), store.create("k", b"second")] == [b"first", b"first"]
