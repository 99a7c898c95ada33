"""The demo uses its own S3 server whatever the environment says, and what is on loopback is reached past any proxy."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import botocore.session
import psutil
import pytest

from freeguide.cluster.cli import main
from freeguide.cluster.jobs.demo import BUCKET, demo, environment, local_s3
from freeguide.configs.errors import UserError
from freeguide.configs.loopback import reach_loopback_directly
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.store.unfinished import TEMP

ROOT = Path(__file__).parents[2]
TINY = [
    "model.channels=16", "model.head_channels=16", "train.steps=4", "train.global_batch=16", "train.checkpoint_every=2",
    "train.log_every=2", "sampling.steps=2", "evaluate.images=60", "evaluate.unit=30", "evaluate.w=[0,1]", "evaluate.grid=2",
    "evaluate.evaluator_epochs=1",
]  # fmt: skip
PROXIES = ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")


def forget() -> None:
    """All servers of moto in one process have the same buckets."""
    from moto.backends import get_backend

    if bucket := get_backend("s3")["123456789012"]["aws"].buckets.get("freeguide"):
        bucket.keys.clear()


@pytest.fixture(autouse=True)
def nothing_there() -> None:
    forget()


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[bytes]]]:
    """A proxy that serves nobody: its URL, and the first line of each request that came."""
    asked: list[bytes] = []
    server = socket.create_server(("127.0.0.1", 0), backlog=64)

    def answer() -> None:
        with contextlib.suppress(OSError):
            while True:
                with server.accept()[0] as connection:
                    connection.settimeout(5)
                    asked.append(connection.recv(4096).partition(b"\r\n")[0])
                    connection.sendall(b"HTTP/1.1 503 no\r\nContent-Length: 0\r\n\r\n")

    threading.Thread(target=answer, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}", asked
    server.close()


@pytest.fixture
def users(tmp_path: Path, proxy: tuple[str, list[bytes]]) -> Callable[[str], dict[str, str]]:
    """users("a proxy") is the environment of a user who has one."""
    aws = tmp_path / "a home" / ".aws"
    aws.mkdir(parents=True)
    (aws / "config").write_text(
        "[default]\nregion = eu-west-3\n[profile lab]\nendpoint_url = http://127.0.0.1:9\nregion = eu-west-3\n"
    )
    (aws / "credentials").write_text("[default]\naws_access_key_id = theirs\naws_secret_access_key = theirs\n")
    (aws / "token").write_text("theirs")
    profile = {"AWS_CONFIG_FILE": str(aws / "config"), "AWS_SHARED_CREDENTIALS_FILE": str(aws / "credentials")}
    kinds = {
        "keys": {"AWS_ACCESS_KEY_ID": "theirs", "AWS_SECRET_ACCESS_KEY": "theirs", "AWS_SESSION_TOKEN": "theirs"},
        "a profile that does not exist": {"AWS_PROFILE": "none"},
        "a profile with an endpoint": profile | {"AWS_PROFILE": "lab"},
        "a home with files": {"HOME": str(aws.parent)},
        "endpoints": {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ENDPOINT_URL_S3": "http://127.0.0.1:9"},
        "a role": {"AWS_ROLE_ARN": "arn:aws:iam::1:role/x", "AWS_WEB_IDENTITY_TOKEN_FILE": str(aws / "token")},
        "ignored endpoints": {"AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true", "AWS_USE_FIPS_ENDPOINT": "true"},
        "a proxy": dict.fromkeys(PROXIES, proxy[0]),
        "a proxy and exceptions": {"http_proxy": proxy[0], "NO_PROXY": "example.org"},
        "no HOME and LANG=C": {"HOME": "", "LANG": "C", "LC_ALL": "C"},
    }  # fmt: skip

    def of(kind: str) -> dict[str, str]:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("AWS_") and "proxy" not in name.lower()}
        return {name: value for name, value in (plain | kinds[kind]).items() if value}

    return of


KINDS = [
    "keys", "a profile that does not exist", "a profile with an endpoint", "a home with files", "endpoints", "a role",
    "ignored endpoints", "a proxy", "a proxy and exceptions", "no HOME and LANG=C",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_environment_says_the_demo_reaches_its_own_server(
    kind: str, users, proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    theirs = users(kind)
    for name in os.environ.keys() - theirs.keys():
        monkeypatch.delenv(name)
    for name, value in theirs.items():
        monkeypatch.setenv(name, value)
    with local_s3(tmp_path / "kept") as endpoint:
        open_store(BUCKET).put("a", kind.encode())
        found = botocore.session.get_session()  # what any child would find
        keys = found.get_credentials()
        assert (keys.access_key, keys.secret_key, keys.token) == ("demo", "demo", None)
        assert found.create_client("s3").meta.endpoint_url == endpoint
        assert not [value for name, value in os.environ.items() if name.startswith("AWS_") and "theirs" in value]
        if kind == "a proxy":
            assert main(["prepare", str(ROOT / "configs" / "digits.yaml")]) == 0
    assert dict(os.environ) == theirs
    assert (tmp_path / "kept" / "a").read_bytes() == kind.encode()
    assert proxy[1] == []


def test_a_second_demo_finds_what_the_first_one_left(tmp_path: Path) -> None:
    with local_s3(tmp_path):
        open_store(BUCKET).put("runs/a", b"1")
    forget()
    with local_s3(tmp_path):
        assert open_store(BUCKET).get("runs/a") == b"1"


def test_the_demos_children_see_nothing_of_the_users_store() -> None:
    theirs = {"AWS_PROFILE": "a", "AWS_CONFIG_FILE": "b", "AWS_ANYTHING_NEW": "c", "RAY_ADDRESS": "ray://d:1", "PATH": "e"}
    ours = environment(theirs, "http://127.0.0.1:5")
    assert ours["PATH"] == "e"
    assert not {"AWS_PROFILE", "AWS_ANYTHING_NEW", "RAY_ADDRESS"} & ours.keys()
    assert ours["AWS_CONFIG_FILE"] == ours["AWS_SHARED_CREDENTIALS_FILE"] == os.devnull


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, None),
        ({"no_proxy": "a"}, "a"),  # no proxy is set: nothing to do
        ({"http_proxy": "http://p:1"}, "127.0.0.1,localhost,::1,[::1]"),
        ({"ALL_PROXY": "http://p:1", "no_proxy": ".corp, localhost"}, ".corp,localhost,127.0.0.1,::1,[::1]"),
        ({"HTTPS_PROXY": "http://p:1", "NO_PROXY": "10.0.0.0/8"}, "10.0.0.0/8,127.0.0.1,localhost,::1,[::1]"),
        ({"HTTP_PROXY": "http://p:1", "no_proxy": "*"}, "*"),
    ],
)
def test_a_proxy_is_told_of_loopback_and_other_exceptions_stay(before: dict[str, str], after: str | None) -> None:
    once = dict(before)
    reach_loopback_directly(once)
    twice = dict(once)
    reach_loopback_directly(twice)
    assert once == twice
    assert once.get("no_proxy", once.get("NO_PROXY")) == after
    if once != before:
        assert once["no_proxy"] == once["NO_PROXY"] == after


def test_both_names_of_the_exceptions_keep_what_they_have() -> None:
    seen = {"http_proxy": "http://p:1", "no_proxy": "a", "NO_PROXY": "b"}
    reach_loopback_directly(seen)
    assert (seen["no_proxy"].split(",")[0], seen["NO_PROXY"].split(",")[0]) == ("a", "b")


def test_a_store_on_loopback_is_reached_past_a_proxy_in_any_process(s3: str, proxy, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    """A worker of a cluster that somebody else started has not been through the command line."""
    code = "from freeguide.data_pipeline.store.open import open_store; open_store('s3://lab').put('past-a-proxy', b'1')"
    told = {name: value for name, value in os.environ.items() if name.lower() != "no_proxy"} | dict.fromkeys(PROXIES, proxy[0])
    subprocess.run([sys.executable, "-c", code], env=told | {"PYTHONPATH": str(ROOT)}, check=True, timeout=60)
    assert open_store("s3://lab").get("past-a-proxy") == b"1"
    assert proxy[1] == []


def recorded() -> tuple[list[tuple[list[str], str | None]], Callable[[list[str]], int]]:
    runs: list[tuple[list[str], str | None]] = []

    def run(arguments: list[str]) -> int:
        runs.append((arguments, os.environ.get("AWS_PROFILE")))
        return 0

    return runs, run


def test_given_both_locations_on_a_store_the_environment_counts_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AWS_PROFILE", "mine")
    runs, run = recorded()
    assert demo(["data.uri=s3://mine/d", "run=s3://mine/r"], run) == 0
    assert [(arguments[0], profile) for arguments, profile in runs] == [
        ("prepare", "mine"),
        ("train", "mine"),
        ("evaluate", "mine"),
    ]
    assert not (tmp_path / "runs").exists()
    runs, run = recorded()
    assert demo([], run) == 0
    assert {profile for _, profile in runs} == {None}


@pytest.mark.parametrize("one", ["data.uri=s3://mine/d", "run=s3://mine/r", "run=s3://freeguide-mine/r"])
def test_one_location_on_a_store_alone_is_refused_in_a_sentence(one: str) -> None:
    runs, run = recorded()
    with pytest.raises(UserError, match=r"is not on the demo's own server; give both data\.uri and run on your store, or neither$"):
        demo([one], run)
    assert runs == []


def test_two_demos_in_one_folder_do_not_mix(tmp_path: Path) -> None:
    with local_s3(tmp_path / "kept"), pytest.raises(UserError, match="another demo is using"), local_s3(tmp_path / "kept"):
        pass
    with local_s3(tmp_path / "kept"):
        pass


def test_what_a_killed_demo_left_half_written_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / f"{TEMP}123-0").write_bytes(b"half")
    (tmp_path / "data" / "whole").write_bytes(b"whole")
    with local_s3(tmp_path):
        assert [info.key for info in open_store(BUCKET).list()] == ["data/whole"]
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["whole"]


def test_a_folder_that_cannot_be_used_is_named_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").write_text("a file")
    assert main(["demo"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"freeguide: error: {tmp_path}/runs")


# --- the whole demo, slow ---


def start(folder: Path, *more: str, options: tuple[str, ...] = (), **environment: str) -> "subprocess.Popen[bytes]":
    """The demo, tiny, begun in `folder` with the words `more` before its command."""
    folder.mkdir(parents=True, exist_ok=True)
    home = folder / "home"
    home.mkdir(exist_ok=True)
    here = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    here |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HOME": str(home), "FREEGUIDE_DEMO_TEST": str(folder)} | environment
    command = [*more, sys.executable, "-m", "cluster", "demo", *TINY, *options]
    with open(folder / "log", "ab") as log:
        return subprocess.Popen(command, cwd=folder, env=here, stdout=log, stderr=log, start_new_session=True)


def finished(folder: Path, process: "subprocess.Popen[bytes]") -> str:
    try:
        code = process.wait(timeout=600)
    finally:
        process.kill()
    text = (folder / "log").read_text()
    assert code == 0, text
    assert "demo done in" in text
    assert (folder / "runs" / "digits" / "index.html").stat().st_size > 0
    return text


def of_this_demo(folder: Path) -> list[psutil.Process]:
    """Every process of the demo in `folder`, orphans too: they have inherited its environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FREEGUIDE_DEMO_TEST") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def gone(folder: Path) -> bool:
    deadline = time.monotonic() + 60
    while left := of_this_demo(folder):
        if time.monotonic() > deadline:
            for process in left:
                process.kill()
            return False
        time.sleep(0.5)
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", ["keys", "a profile that does not exist", "a profile with an endpoint", "endpoints", "a proxy", "no HOME and LANG=C"]
)
def test_the_whole_demo_runs_for(kind: str, users, proxy, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    folder = tmp_path / "a folder"
    theirs = {name: value for name, value in users(kind).items() if name not in os.environ or os.environ[name] != value}
    finished(folder, start(folder, **theirs))
    assert [request for request in proxy[1] if b"127.0.0.1" in request or b"localhost" in request] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "machine", [("taskset", "-c", "0"), ("sh", "-c", 'ulimit -n 256; exec "$@"', "sh")], ids=["one core", "256 files"]
)
def test_the_whole_demo_runs_on_a_machine_with(machine: tuple[str, ...], tmp_path: Path) -> None:
    finished(tmp_path, start(tmp_path, *machine))


@pytest.mark.slow
def test_the_whole_demo_runs_for_an_unprivileged_user_with_a_home_that_is_not_writable(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("only root may become another user")
    folder = tmp_path / "theirs"
    folder.mkdir()
    os.chown(folder, 65534, 65534)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    tmp_path.chmod(0o755)
    # May read everything, as the interpreter may stand in a folder of root's, and write nothing of others.
    user = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all,+dac_read_search"]
    user += ["--ambient-caps=-all,+dac_read_search", "--bounding-set=-all,+dac_read_search"]
    finished(folder, start(folder, *user, "sh", "-c", 'umask 077; exec "$@"', "sh"))
    assert not list((folder / "home").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("notice", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda s: s.name)
def test_a_demo_that_is_interrupted_leaves_nothing_running_and_goes_on_when_run_again(
    notice: signal.Signals, tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory(prefix="fg-", dir="/tmp") as temporary:  # short, as Ray has sockets in it
        long = ("train.steps=400", "train.checkpoint_every=100")
        process = start(tmp_path, options=long, TMPDIR=temporary)
        deadline = time.monotonic() + 300
        while "step 20/400" not in (tmp_path / "log").read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(notice)
        code = process.wait(timeout=180)
        assert code == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}[notice]
        assert gone(tmp_path)
        finished(tmp_path, start(tmp_path, options=long, TMPDIR=temporary))
        assert gone(tmp_path)
        left = [str(path) for path in Path(temporary).rglob("*") if "freeguide" in path.name and path.is_file()]
    assert left == []
    assert not list((tmp_path / "runs" / ".s3").rglob(f"{TEMP}*"))
