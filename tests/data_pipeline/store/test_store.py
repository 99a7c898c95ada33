"""Tests of store.py: a folder and a bucket behave alike, and every failure is one sentence."""

import errno
import http.server
import os
import pickle
import socket
import tempfile
import threading
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from freeguide.configs.errors import StoreError
from freeguide.data_pipeline.store.base import ChangedObject, MissingObject, Retry, Store
from freeguide.data_pipeline.store.folder import FolderStore
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.store.unfinished import TEMP
from tests.data_pipeline.conftest import s3_uri

FAST = Retry(attempts=3, base_s=0.01, cap_s=0.02, connect_s=1, read_s=1, first_s=5)


def test_put_get_stat_list_delete(store: Store) -> None:
    etag = store.put("a/b.bin", b"hello")
    assert store.get("a/b.bin") == b"hello"
    info = store.stat("a/b.bin")
    assert (info.key, info.bytes, info.etag) == ("a/b.bin", 5, etag)
    store.put("a/c.bin", b"")
    store.put("ab", b"xyz")
    assert [item.key for item in store.list()] == ["a/b.bin", "a/c.bin", "ab"]
    assert [item.key for item in store.list("a/")] == ["a/b.bin", "a/c.bin"]
    assert [(item.bytes, item.etag) for item in store.list("a/b")] == [(5, etag)]
    assert store.get("a/c.bin") == b""
    store.delete("a/b.bin")
    store.delete("a/b.bin")
    assert not store.exists("a/b.bin")
    assert store.exists("ab")


def test_put_replaces(store: Store) -> None:
    first = store.put("key", b"one")
    second = store.put("key", b"other")
    assert store.get("key") == b"other"
    assert first != second


def test_ranges_are_exact(store: Store) -> None:
    data = os.urandom(3000)
    etag = store.put("key", data)
    for start, length in ((0, 3000), (0, 1), (2999, 1), (512, 1024), (7, 0)):
        assert store.get_range("key", start, length, etag) == data[start : start + length]


def test_a_range_past_the_end_is_an_error(store: Store) -> None:
    store.put("key", b"0123456789")
    with pytest.raises(StoreError, match="key"):
        store.get_range("key", 5, 6)
    with pytest.raises(StoreError, match="key"):
        store.get_range("key", 50, 6)


def test_a_changed_object_is_refused(store: Store) -> None:
    etag = store.put("key", b"0123456789")
    store.put("key", b"something else")
    with pytest.raises(ChangedObject, match="changed"):
        store.get_range("key", 0, 4, etag)


def test_a_missing_object_is_named(store: Store) -> None:
    for read in (store.get, store.stat, lambda key: store.get_range(key, 0, 1)):
        with pytest.raises(MissingObject, match=r"no/such\.bin does not exist"):
            read("no/such.bin")


@pytest.mark.parametrize("key", ["", "/etc/passwd", "../up", "a/../../up", "a//b", "a/./b", "a\0b"])
def test_keys_cannot_leave_the_store(store: Store, key: str) -> None:
    for use in (store.get, store.stat, store.delete, lambda k: store.put(k, b"")):
        with pytest.raises(ValueError, match="no key"):
            use(key)


def test_child_is_the_store_below_a_prefix(store: Store) -> None:
    store.child("x/y").put("z", b"1")
    assert [info.key for info in store.child("x").list()] == ["y/z"]
    assert store.get("x/y/z") == b"1"
    assert store.child("x/y").uri == store.uri + "/x/y"


def test_a_pickled_store_works_elsewhere(store: Store) -> None:
    store.put("key", b"data")
    assert pickle.loads(pickle.dumps(store)).get("key") == b"data"


def test_check_passes_where_one_may_write(store: Store) -> None:
    store.check()


def test_file_uris_and_plain_paths_are_the_same_folder(tmp_path: Path) -> None:
    open_store(f"file://{tmp_path}/a%20b").put("k", b"1")
    assert open_store(str(tmp_path / "a b")).get("k") == b"1"


@pytest.mark.parametrize("uri", ["gs://bucket/x", "http://host/x", "", "s3://", "s3:///key"])
def test_other_locations_are_refused(uri: str) -> None:
    with pytest.raises(StoreError, match="s3://bucket/prefix"):
        open_store(uri)


def test_an_interrupted_write_leaves_nothing_and_left_over_temps_are_not_listed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path)
    store.put("a/key", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            store.put("a/key", b"new")
    assert store.get("a/key") == b"old"
    assert os.listdir(tmp_path / "a") == ["key"]
    (tmp_path / "a" / f"{TEMP}123-dead").write_bytes(b"half")
    assert [info.key for info in store.list()] == ["a/key"]


def test_a_file_in_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match="is a file"):
        open_store(str(tmp_path / "file")).check()


def test_a_folder_that_cannot_even_be_looked_for_is_named(tmp_path: Path) -> None:
    assert "cannot be used (File name too long)" in sentence(open_store(str(tmp_path / ("x" * 300))))


def test_a_listing_follows_links_and_is_not_caught_in_a_loop(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    FolderStore(elsewhere).put("b/c", b"123")
    store = FolderStore(tmp_path / "store")
    store.put("x", b"")
    (store.folder / "a").symlink_to(elsewhere)
    (elsewhere / "b/up").symlink_to(elsewhere)
    (elsewhere / "file").symlink_to(elsewhere / "b/c")
    assert [(info.key, info.bytes) for info in store.list()] == [("a/b/c", 3), ("a/file", 3), ("x", 0)]
    (tmp_path / "link").symlink_to(store.folder)
    assert [info.key for info in FolderStore(tmp_path / "link").list("a/b/")] == ["a/b/c"]


@pytest.mark.parametrize("link", ["store", "store/a", "store/a/b"])
def test_a_link_to_nothing_is_not_an_empty_place(tmp_path: Path, link: str) -> None:
    """A disk that is not mounted: what stands there is not gone, and nothing is made in its stead."""
    store = FolderStore(tmp_path / "store")
    (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "not mounted")
    uses: list[Callable[[], object]] = [lambda: store.list("a/b/"), lambda: store.get("a/b/c"), lambda: store.exists("a/b/c")]
    for use in uses:
        with pytest.raises(StoreError, match=r"is a link to nothing \(.*not mounted\); mount that") as raised:
            use()
        assert not isinstance(raised.value, MissingObject)
    with pytest.raises(StoreError):
        store.put("a/b/c", b"")
    if link == "store":
        assert "is a link to nothing" in sentence(store)


def test_links_that_lead_round_in_a_circle_and_files_in_place_of_folders_are_named(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    (tmp_path / "a").symlink_to(tmp_path / "a")
    for use in (store.list, store.exists):
        with pytest.raises(StoreError, match=r"a cannot be used .*symbolic links"):
            use("a")
    store.put("b", b"")
    with pytest.raises(StoreError, match="b is a file"):
        store.list("b/c/")
    with pytest.raises(StoreError, match="b is a file"):
        store.child("b").list()


def failing(call: Callable[..., Any], path: Path, error: int) -> Callable[..., Any]:
    """`call` of the operating system, which fails for `path`."""

    def fail(at: Any, *args: Any, **options: Any) -> Any:
        if isinstance(at, str | Path) and os.path.abspath(at) == str(path):
            raise OSError(error, os.strerror(error), str(at))
        return call(at, *args, **options)

    return fail


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize(("call", "place"), [("scandir", "a/b"), ("scandir", ""), ("stat", "a/b/c"), ("stat", "a/b")])
def test_what_cannot_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, place: str, error: int
) -> None:
    store = FolderStore(tmp_path)
    store.put("a/b/c", b"")
    monkeypatch.setattr(os, call, failing(getattr(os, call), tmp_path / place, error))
    with pytest.raises(StoreError, match=rf"{tmp_path / place} cannot be used \({os.strerror(error)}\)"):
        store.list("a/")


def as_nobody(does: Callable[[], object]) -> str:
    """What `does` raises in a process without root's rights, "" for nothing."""
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child touches no lock of another thread
        child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            does()
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with os.fdopen(read) as said:
        return said.read()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become another user")
@pytest.mark.parametrize(
    ("closed", "rights"), [("run/checkpoints/step-1", 0o700), ("run/checkpoints", 0), ("run", 0o711), ("", 0o700)]
)
def test_folders_of_another_user_are_an_error(closed: str, rights: int) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        run = FolderStore(Path(folder) / "run")
        run.put("checkpoints/step-1/manifest.json", b"{}")
        assert as_nobody(lambda: run.list("checkpoints/")) == ""
        (Path(folder) / closed).chmod(rights)
        assert "cannot be used (Permission denied)" in as_nobody(lambda: run.list("checkpoints/"))
        if rights != 0o711:  # under which files of a known name can be read
            assert "cannot be used (Permission denied)" in as_nobody(lambda: run.exists("checkpoints/step-1/manifest.json"))


@pytest.mark.parametrize("prefix", ["", "a", "a/", "a/b", "a/b/", "a/b/c", "ab/", "../", "..", "/", "a//", "no/such/"])
def test_a_listing_has_the_keys_that_begin_with_its_prefix(store: Store, prefix: str) -> None:
    keys = ["a/b/c", "a/b/d/e", "a/bc", "ab/c", "b/a/b"]
    for key in keys:
        store.put(key, b"")
    assert [info.key for info in store.list(prefix)] == [key for key in keys if key.startswith(prefix)]


def test_a_folder_is_listed_without_looking_where_no_key_begins_with_the_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FolderStore(tmp_path)
    for key in ("checkpoints/step-1/manifest.json", "checkpoints/step-2/a", "checkpoints/step-2/b/c", "events/a/b"):
        store.put(key, b"")
    seen: list[str] = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: seen.append(os.path.relpath(path, tmp_path)) or scandir(path))
    assert [info.key for info in store.list("checkpoints/step-2/")] == ["checkpoints/step-2/a", "checkpoints/step-2/b/c"]
    assert seen == [".", "checkpoints", "checkpoints/step-2", "checkpoints/step-2/b"]


def test_the_listing_of_many_objects_is_complete(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(s3_uri(tmp_path))
    keys = [f"k{i:03d}" for i in range(20)]
    for key in keys:
        store.put(key, b"")
    client = store._client()  # type: ignore[attr-defined]
    pages: list[int] = []
    original = client.list_objects_v2

    def small_pages(**query: object) -> dict[str, object]:
        pages.append(1)
        answer: dict[str, object] = original(**{**query, "MaxKeys": 7})
        return answer

    monkeypatch.setattr(client, "list_objects_v2", small_pages)
    assert [info.key for info in store.list()] == keys
    assert len(pages) == 3


def test_large_uploads_go_in_parts_and_read_back(s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("freeguide.data_pipeline.store.s3.MULTIPART", 9 * 2**20)
    store = open_store(s3_uri(tmp_path))
    data = os.urandom(2**20) * 10
    etag = store.put("large", data)
    assert "-" in etag  # S3's mark of an object that came in parts
    assert store.get("large") == data
    assert store.get_range("large", 9 * 2**20, 100, etag) == data[9 * 2**20 : 9 * 2**20 + 100]


# ------------------------------------------------------------------------------------------------- failures, one sentence each


def sentence(store: Store) -> str:
    """The message of check(), which must be one sentence."""
    with pytest.raises(StoreError) as caught:
        store.check()
    text = str(caught.value)
    assert not text.endswith(".")
    assert "\n" not in text
    return text


def test_a_bucket_that_does_not_exist(s3_endpoint: str) -> None:
    assert "bucket no-such-bucket does not exist" in sentence(open_store("s3://no-such-bucket/x", FAST))


@pytest.fixture
def strict_s3(s3_endpoint: str) -> object:
    """The server with its credentials checked for one test: moto does not do so by itself."""
    if "FREEGUIDE_TEST_S3" in os.environ:
        yield
        return

    def authenticate(after: str) -> None:
        url, plain = f"{s3_endpoint}/moto-api/reset-auth", {"Content-Type": "text/plain"}
        urllib.request.urlopen(urllib.request.Request(url, after.encode(), plain, method="POST")).close()

    authenticate("0")
    yield
    authenticate("inf")


def test_wrong_credentials(strict_s3: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "very-secret-key")
    text = sentence(open_store("s3://freeguide/x", Retry(attempts=2)))
    assert "credentials for s3://freeguide/x are wrong" in text
    assert "very-secret-key" not in text


def test_no_credentials(strict_s3: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if "FREEGUIDE_TEST_S3" not in os.environ:
        pytest.skip("moto fails at requests without credentials; test_answers has a server that refuses them")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    assert "no credentials for s3://freeguide/x" in sentence(open_store("s3://freeguide/x", Retry(attempts=4)))


def _elsewhere(bucket: str, retry: Retry) -> set[tuple[object, ...]]:
    """What is noted of a bucket that has answered at the endpoint of the tests' server."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        store = open_store(f"s3://{bucket}/x", retry)
        return {(store._terms(), bucket)}  # type: ignore[attr-defined]


def test_nobody_listens_at_the_endpoint(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free.getsockname()[1]}")
    # A bucket of that name may have answered at another endpoint, which says nothing of this one.
    monkeypatch.setattr(
        "freeguide.data_pipeline.store.s3._contacted", {(os.getpid(), "bucket-1"), *_elsewhere("bucket-1", Retry(attempts=5))}
    )
    store = open_store("s3://bucket-1/x", Retry(attempts=5))
    assert "does not answer" in sentence(store)
    assert store.traffic.retries == {"no connection": 2}  # of the four that a server which has answered before would get


def test_an_endpoint_that_accepts_and_is_silent_is_tried_once(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled down: the rule that keeps the default settings (10 s of silence) below 15 s keeps these (1 s) below 2 s."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        store = open_store("s3://bucket-2/x", Retry(base_s=0.01, connect_s=0.5, read_s=1.0, first_s=1.5))
        text = sentence(store)
    assert "does not answer (time-out)" in text
    assert store.traffic.retries == {}


def test_reads_from_many_threads_share_one_client(s3_endpoint: str, tmp_path: Path) -> None:
    store = open_store(s3_uri(tmp_path))
    data = os.urandom(50_000)
    store.put("key", data)
    wrong: list[int] = []

    def read(number: int) -> None:
        if store.get_range("key", number * 1000, 5000) != data[number * 1000 : number * 1000 + 5000]:
            wrong.append(number)

    threads = [threading.Thread(target=read, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert store.traffic.gets >= 16
    assert store.traffic.bytes >= 16 * 5000


class RangeServer(http.server.BaseHTTPRequestHandler):
    """A server that keeps connections, which moto does not, and counts them."""

    protocol_version = "HTTP/1.1"
    data = bytes(range(256)) * 1000
    connections = 0

    def setup(self) -> None:
        super().setup()
        type(self).connections += 1

    def do_GET(self) -> None:
        first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.data)}")
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("ETag", '"1"')
        self.end_headers()
        self.wfile.write(self.data[first : last + 1])

    def log_message(self, *_: object) -> None:
        pass


def test_reads_one_after_the_other_share_one_connection(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), RangeServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
        store = open_store("s3://bucket-3", Retry(cap_s=9.0))
        for start in range(0, 200_000, 20_000):
            assert store.get_range("key", start, 30_000) == RangeServer.data[start : start + 30_000]
        server.shutdown()
    assert RangeServer.connections == 1


def test_a_child_process_makes_its_own_client(s3_endpoint: str, tmp_path: Path) -> None:
    store = open_store(s3_uri(tmp_path))
    store.put("key", b"data")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, store.get("key"))
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as pipe:
        assert pipe.read() == b"data"
    os.waitpid(child, 0)
    assert store.get("key") == b"data"
