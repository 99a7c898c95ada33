"""Who gets a GPU, on a cluster of the command's own; and where commands keep what is gone when they end."""

import concurrent.futures
import http.server
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import grpc
import pytest
import ray
import torch
from ray.train.torch import TorchTrainer

from freeguide.cluster.runtime import session
from freeguide.cluster.runtime.session import Resources, _gpus_here, _short_folder, private_folder, progress, scratch
from freeguide.cluster.runtime.session import temporary as scratch_of_command
from freeguide.configs.errors import ConfigError, UserError
from freeguide.configs.schema import ClusterConfig, Config


@pytest.mark.parametrize(
    ("there", "asked", "processes", "together", "given"),
    [
        (0, -1.0, 2, True, 0.0),
        (1, -1.0, 2, True, 0.0),  # the second worker would be waited for for ever
        (2, -1.0, 2, True, 1.0),
        (1, -1.0, 4, False, 1.0),  # one actor works alone
        (8, 0.0, 2, True, 0.0),
        (1, 0.5, 2, True, 0.5),
    ],
)
def test_workers_share_out_gpus_or_have_none(
    monkeypatch: pytest.MonkeyPatch, there: int, asked: float, processes: int, together: bool, given: float
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there)
    assert _gpus_here(asked, processes, together) == given


def test_gpus_that_are_left_out_are_mentioned(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    _gpus_here(-1.0, 2, together=True)
    assert capsys.readouterr().out == "this machine has 1 GPU for 2 workers, so none is used; set cluster.workers=1\n"


def test_more_gpus_than_there_are_are_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="for 2 processes needs 2 GPUs and this machine has 1; set it to 0, or name a cluster"):
        _gpus_here(1.0, 2, together=True)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_a_user_has_a_temporary_folder_that_nobody_else_enters(temporary: Path) -> None:
    old = os.umask(0)
    try:
        folder = private_folder()
    finally:
        os.umask(old)
    assert (folder.parent, stat.S_IMODE(folder.stat().st_mode)) == (temporary, 0o700)
    folder.chmod(0o755)
    assert stat.S_IMODE(private_folder().stat().st_mode) == 0o700


@pytest.mark.parametrize("what", ["link", "file", "foreign"])
def test_a_temporary_folder_that_somebody_else_put_there_is_refused(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    stranger = os.getuid() + 4242
    monkeypatch.setattr(os, "getuid", lambda: stranger)
    place = temporary / f"freeguide-{stranger}"
    {"link": lambda: place.symlink_to(temporary), "file": place.touch, "foreign": place.mkdir}[what]()
    with pytest.raises(UserError, match=f"{place} is no folder of yours.*TMPDIR"):
        private_folder()


def test_a_temporary_folder_that_cannot_be_made_is_one_sentence(temporary: Path) -> None:
    with pytest.raises(UserError, match=r"no temporary folder can be made .*set TMPDIR"):
        private_folder(str(temporary / "missing"))


HOLD = (
    "import sys; from freeguide.cluster.runtime.session import scratch\n"
    "with scratch(sys.argv[1]) as f: print(f, flush=True); sys.stdin.read()"
)


def test_what_a_command_leaves_is_gone_at_its_end_or_when_the_next_begins_if_it_was_killed(temporary: Path) -> None:
    with scratch() as mine:
        (mine / "below").mkdir()
        other = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(temporary)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert other.stdout is not None
        theirs = Path(other.stdout.readline().strip())
        assert mine.is_dir()
        assert theirs.is_dir()
        with scratch() as third:
            assert mine.is_dir()
            assert theirs.is_dir()
        assert not third.exists()
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
        assert theirs.is_dir()
        with scratch():
            assert not theirs.exists()
            assert mine.is_dir()
    assert list(private_folder().iterdir()) == []


def test_all_that_a_command_and_its_libraries_write_to_temporary_folders_is_in_its_own(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TMPDIR", raising=False)
    with scratch_of_command() as folder, scratch_of_command() as again:
        assert (folder, os.environ["TMPDIR"]) == (again, str(folder))
        left = Path(tempfile.mkdtemp())
        seen = subprocess.run([sys.executable, "-c", "import tempfile; print(tempfile.mkdtemp())"], capture_output=True, text=True)
        assert left.parent == Path(seen.stdout.strip()).parent == folder
        assert os.environ["RAY_TMPDIR"] == str(temporary)  # not deeper: its sockets have long names
    assert "TMPDIR" not in os.environ
    assert tempfile.gettempdir() == str(temporary)
    assert not left.exists()
    assert list(private_folder().iterdir()) == []


def test_what_ray_says_goes_to_a_log_that_is_named_when_something_fails(tmp_path: Path) -> None:
    code = """
import os, sys, ray
from pathlib import Path
from freeguide.cluster.runtime.session import _apart
old = sys.stderr
folder = Path(sys.argv[1])
with _apart(folder):
    os.write(2, b"core_worker.cc: noise\\n")
    ray._private.worker.print_to_stdstream({"lines": ["Task failed"], "pid": "raylet", "is_err": False}, ignore_prefix=False)
    print("a logger", file=old)
    print("ours", file=sys.stderr)
    if len(sys.argv) > 2:
        raise RuntimeError("a defect")
"""
    folder = tmp_path / "run"
    folder.mkdir()
    ended = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=100)
    assert (ended.stdout, ended.stderr, ended.returncode) == ("", "ours\n", 0)
    assert (folder / "ray.log").read_text().splitlines() == ["core_worker.cc: noise", "Task failed", "a logger"]
    assert not (tmp_path / "ray.log").exists()
    ended = subprocess.run([sys.executable, "-c", code, str(folder), "fail"], capture_output=True, text=True, timeout=100)
    assert f"what Ray said is in {tmp_path}/ray.log\n" in ended.stderr
    assert "RuntimeError: a defect" in ended.stderr  # with its traceback
    assert "noise" in (tmp_path / "ray.log").read_text()


def test_names_of_ray_that_are_not_public_are_there() -> None:
    assert callable(ray._private.worker.print_to_stdstream)
    assert callable(TorchTrainer._register_sigint_handler)


@pytest.mark.parametrize(
    ("total", "at_once", "clock", "etas"),
    [
        (4, 1, [0, 60, 65, 70, 75], ["", "0:00:10", "0:00:05", "0:00:00"]),  # a minute to begin, then 5 s each
        (5, 2, [0, 60, 61, 65, 66, 70], ["", "", "0:00:05", "0:00:03", "0:00:00"]),
        (1, 2, [0, 60], [""]),
    ],
)
def test_the_time_that_is_left_knows_nothing_of_the_start(  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch, capsys, total: int, at_once: int, clock: list[int], etas: list[str]
) -> None:
    ticks = iter(clock)
    monkeypatch.setattr("freeguide.cluster.runtime.session.time.monotonic", lambda: float(next(ticks)) + 1000)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert list(progress(range(total), total, "unit", at_once)) == list(range(total))
    printed = re.split(r"[\r\n]", capsys.readouterr().out)[:-1]
    assert printed == [f"unit {i}/{total}" + (f"  eta {eta}" if eta else "") for i, eta in enumerate(etas, start=1)]


ALONE = """
import os, psutil, ray, tempfile
from pathlib import Path
from freeguide.cluster.runtime.session import session
from freeguide.configs.load import load_config

SECRET = ["cluster.env={MY_TOKEN: hunter2, MY_LEVEL: on, MY_LOGIN: '${oc.env:LOGIN}'}"]
with session(load_config("configs/digits.yaml", ["cluster.gpus_per_worker=0", *SECRET]), 2) as resources:
    ray.get([ray.remote(lambda: None).remote() for _ in range(2)])
    me = psutil.Process()
    sockets = [c for p in (me, *me.children(recursive=True)) for c in p.net_connections("inet") if c.status == "LISTEN"]
    print(*{c.laddr.ip for c in sockets})
    print(len(sockets) > 5, resources)
    print(os.environ.get("TMPDIR") != tempfile.gettempdir(), ray.get(ray.remote(lambda: os.environ["TMPDIR"]).remote()))
    print(ray.get(ray.remote(lambda: [os.environ[f"MY_{name}"] for name in ("TOKEN", "LEVEL", "LOGIN")]).remote()))
    own = ray.remote(lambda: os.environ["MY_TOKEN"] + os.environ["MY_OWN"]).options(runtime_env={"env_vars": {"MY_OWN": "4"}})
    print(ray.get(own.remote()))
    written = [p for p in Path(ray._private.worker._global_node.get_session_dir_path()).rglob("*") if p.is_file()]
    print(ray.get_runtime_context().runtime_env["env_vars"]["MY_LEVEL"], len(written) > 5)
    print(*[p for p in written if b"hunter" in p.read_bytes()], "hunter" in str(ray.get_runtime_context().runtime_env))
"""


def test_a_private_cluster_listens_on_loopback_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """With the environment of a user, who has set nothing."""
    home, temporary = tmp_path / "home", Path(tempfile.mkdtemp(dir="/tmp"))
    home.mkdir()
    clean = {"PATH": os.environ["PATH"], "HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": ".", "LOGIN": "hunter3"}
    ended = subprocess.run(
        [sys.executable, "-c", ALONE], cwd=Path(__file__).parents[2], env=clean, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    addresses, enough, folders, *of_workers = ended.stdout.splitlines()[-7:]
    assert {*addresses.split()} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert enough == "True Resources(cpus=1.0, gpus=0.0)"
    assert re.fullmatch(rf"True {temporary}/freeguide-\d+/run-\w+", folders)
    assert list(home.rglob("*")) == []
    left = [place for place in temporary.rglob("*") if place.is_file()]
    shutil.rmtree(temporary)
    assert left == []
    # Secrets reach the workers, and neither Ray's logs nor what it shows of the job.
    assert of_workers == ["['hunter2', 'on', 'hunter3']", "hunter24", "on True", "False"]


def test_a_private_cluster_takes_a_temporary_folder_that_is_short_enough_for_sockets(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("long" * 20)))
    assert _short_folder() == "/tmp"
    monkeypatch.setattr(tempfile, "tempdir", "/dev/shm")
    assert _short_folder() == "/dev/shm"
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + 40 * "x")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match=r"may have 1[0-9] bytes at most: /tmp/xxx.* is too long"):
        _short_folder()


class Cluster:
    """What Ray says of a cluster: its nodes at each look, whether it grows, and what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, looks: list[list[dict[str, float]]], grows: bool | None = False) -> None:
        self.looks, self.asked, self.now = looks, [], 0.0  # type: ignore[var-annotated]
        monkeypatch.setattr(session.ray, "nodes", self._nodes)
        monkeypatch.setattr(session, "_grows", lambda: grows)
        monkeypatch.setattr(session, "_ask_autoscaler", self.asked.append)
        monkeypatch.setattr(session.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(session.time, "sleep", self._sleep)

    def _nodes(self) -> list[dict[str, object]]:
        found = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        return [{"Alive": True, "Resources": node} for node in found] + [{"Alive": False, "Resources": {"CPU": 99.0}}]

    def _sleep(self, seconds: float) -> None:
        self.now += seconds


SMALL = [{"CPU": 2.0}, {"CPU": 2.0}]
FAST = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 8.0}]


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "processes", "together", "given"),
    [
        (SMALL, 1.0, -1.0, 4, True, Resources(1.0, 0.0)),
        (SMALL, 2.0, 0.0, 2, True, Resources(2.0, 0.0)),
        (SMALL, 0.1, 0.0, 40, True, Resources(0.1, 0.0)),
        (FAST, 1.0, -1.0, 2, True, Resources(1.0, 1.0)),
        (FAST, 1.0, 0.5, 4, True, Resources(1.0, 0.5)),
        (SMALL, 1.0, -1.0, 9, False, Resources(1.0, 0.0)),  # actors wait for each other
    ],
)
def test_a_cluster_that_is_large_enough_is_used(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], cpus: float, gpus: float, processes: int, together: bool,
    given: Resources,
) -> None:  # fmt: skip
    Cluster(monkeypatch, [nodes])
    assert session._resources(ClusterConfig(cpus_per_worker=cpus), gpus, processes, together) == given


@pytest.mark.parametrize(
    ("nodes", "cpus", "gpus", "processes", "together", "sentence"),
    [
        (SMALL, 1.0, -1.0, 5, True, r"5 processes of 1 CPU, it has room for 4 \(nodes: 2 of 2 CPU\); lower cluster.workers"),
        (SMALL, 3.0, -1.0, 1, True, "1 process of 3 CPU, it has room for 0"),
        (SMALL, 3.0, 0.0, 8, False, "1 process of 3 CPU, it has room for 0"),
        (SMALL, 1.0, 1.0, 1, False, r"1 process of 1 CPU and 1 GPU, it has room for 0 \(nodes: 2 of 2 CPU and 0 GPU\)"),
        (FAST, 5.0, -1.0, 2, True, r"2 processes of 5 CPU and 1 GPU, it has room for 1 \(nodes: 1 of 8 CPU and 2 GPU, 1 of"),
    ],
)
def test_a_cluster_that_is_too_small_is_named_at_once(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict[str, float]], cpus: float, gpus: float, processes: int, together: bool,
    sentence: str,
) -> None:  # fmt: skip
    cluster = Cluster(monkeypatch, [nodes])
    with pytest.raises(ConfigError, match=f"^the cluster is too small for {sentence}"):
        session._resources(ClusterConfig(cpus_per_worker=cpus), gpus, processes, together)
    assert (cluster.now, cluster.asked) == (0.0, [])


def test_a_cluster_is_waited_for_on_purpose(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    cluster = Cluster(monkeypatch, [SMALL, SMALL, [*SMALL, {"CPU": 2.0}]])
    assert session._resources(ClusterConfig(wait_minutes=1), -1.0, 6, True) == Resources(1.0, 0.0)
    said = capsys.readouterr().out
    assert said.count("waiting for it to grow, for 1 minutes at most\n") == len(said.splitlines()) == 1
    assert cluster.asked == [[{"CPU": 1.0}] * 6, []]
    cluster = Cluster(monkeypatch, [SMALL])
    with pytest.raises(ConfigError, match="too small for 6 processes"):
        session._resources(ClusterConfig(wait_minutes=1), -1.0, 6, True)
    assert 60 <= cluster.now <= 65


def test_a_cluster_with_an_autoscaler_is_waited_for(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    large = {"CPU": 8.0, "GPU": 8.0}
    cluster = Cluster(monkeypatch, [*[[{"CPU": 0.0}]] * 1000, [large]], grows=True)
    assert session._resources(ClusterConfig(), 1.0, 8, True) == Resources(1.0, 1.0)
    assert capsys.readouterr().out.count("waiting for it to grow\n") == 1
    assert cluster.asked == [[{"CPU": 1.0, "GPU": 1.0}] * 8, []]


def test_an_autoscaler_has_a_while_to_report(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch, [SMALL], grows=None)
    with pytest.raises(ConfigError, match="too small"):
        session._resources(ClusterConfig(), 0.0, 5, True)
    assert cluster.now == session._REPORTS


WRONG = {
    "HEAD": "no address of a Ray cluster; give HEAD:6379",
    "head:x": "no address of a Ray cluster .Port could not be cast",
    "head:99999": "no address of a Ray cluster .Port out of range",
    "http://127.0.0.1:8265": "no address of a Ray cluster",
    ":6379": "no address of a Ray cluster",
    "[::1": "no address of a Ray cluster .Invalid IPv6",
    "127.0.0.1:1": "no Ray cluster answers there .*; start one, or unset",
    "[::1]:1": "no Ray cluster answers there .*; start one, or unset",
    "ray://127.0.0.1:1": "no Ray cluster answers there .*; start one, or unset",
    "no-such-host.invalid:6379": "no Ray cluster answers there .*; start one, or unset",
}


@pytest.mark.parametrize("address", WRONG)
def test_an_address_where_no_cluster_answers_is_one_sentence(address: str) -> None:
    with pytest.raises(ConfigError, match=WRONG[address]) as caught:
        session._probe(address)
    assert str(caught.value).startswith(f"RAY_ADDRESS={address}: ")


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_another_server_than_rays_is_named(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setattr(session, "_HANDSHAKE", 0.5)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    with pytest.raises(ConfigError, match="another server than Ray's answers there; give the head's port, mostly 6379"):
        session._probe(f"{scheme}127.0.0.1:{server.server_address[1]}")
    server.shutdown()
    server.server_close()


def test_a_server_of_grpc_is_taken_for_rays() -> None:
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    session._probe(f"127.0.0.1:{port}")
    server.stop(None)


class Guard(grpc.GenericRpcHandler):
    """A head that wants a token: what else it is asked, it does not know."""

    def __init__(self, token: str) -> None:
        self.wanted = ("authorization", f"Bearer {token}")

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        let_in = self.wanted in [tuple(item) for item in details.invocation_metadata]
        code = grpc.StatusCode.UNIMPLEMENTED if let_in else grpc.StatusCode.UNAUTHENTICATED
        return grpc.unary_unary_rpc_method_handler(lambda _, context: context.abort(code, ""))


TOKEN = "0123456789abcdef" * 2
GUARDED: list[tuple[dict[str, str], str]] = [
    ({"RAY_AUTH_TOKEN": TOKEN}, "let in with mode token"),
    ({"RAY_AUTH_TOKEN": "f" * 32}, "does not take the token of RAY_AUTH_TOKEN; set RAY_AUTH_TOKEN"),
    ({}, "wants a token, and there is none here; set RAY_AUTH_TOKEN"),
    ({"RAY_AUTH_MODE": "disabled"}, "wants a token, and RAY_AUTH_MODE=disabled sends none; unset it"),
    ({"RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, "cannot be read"),
]
ASK = """
import json, os, sys, ray
from freeguide.cluster.runtime import session
from freeguide.configs.errors import UserError
session.services.find_bootstrap_address = lambda _: sys.argv[1]
for number, (settings, _) in enumerate(json.loads(sys.argv[2])):
    for name in [name for name in os.environ if name.startswith("RAY_AUTH")]:
        del os.environ[name]
    os.environ |= settings
    ray._raylet.Config.initialize("")
    ray._raylet.AuthenticationTokenLoader.instance().reset_cache()
    try:
        session._probe("auto" if number % 2 else sys.argv[1])
        print("let in with mode", os.environ["RAY_AUTH_MODE"])
    except UserError as error:
        print(error)
"""


def test_a_head_that_wants_a_token_gets_the_users_or_a_sentence_at_once(tmp_path: Path) -> None:
    """Ray itself tries a wrong token for half a minute. In a process of its own, as Ray keeps its mode and token."""
    server = grpc.server(concurrent.futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((Guard(TOKEN),))
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "PYTHONPATH": "."}
    words = [sys.executable, "-c", ASK, address, json.dumps(GUARDED)]
    ended = subprocess.run(words, cwd=Path(__file__).parents[2], env=clean, capture_output=True, text=True, timeout=100)
    server.stop(None)
    said = ended.stdout.splitlines()
    assert len(said) == len(GUARDED), ended.stdout + ended.stderr
    assert [sentence for (_, sentence), line in zip(GUARDED, said, strict=True) if sentence not in line] == [], said


def test_no_cluster_on_this_machine_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.services, "find_bootstrap_address", lambda _: None)
    monkeypatch.setattr(session.services, "find_gcs_addresses", lambda: [])
    with pytest.raises(ConfigError, match="RAY_ADDRESS=auto: no Ray cluster runs on this machine; start one, or unset"):
        session._probe("auto")


def test_a_ray_that_does_not_start_is_one_sentence(monkeypatch: pytest.MonkeyPatch, temporary: Path) -> None:
    def late(**_: object) -> None:
        raise Exception("The current node timed out during startup. This could happen because some of the raylet failed to startup")

    monkeypatch.setattr(ray, "init", late)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    sentence = r"Ray did not start on this machine \(The current node timed out during startup\); see its logs"
    with pytest.raises(UserError, match=sentence), session.session(Config(), 1):
        pass
