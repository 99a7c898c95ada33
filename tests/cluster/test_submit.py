"""What travels with a submitted job, what its server may answer, and how it is followed over a connection that breaks."""

import json
import os
import socket
import threading
import zipfile
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus

from freeguide.cluster.cli import _parser
from freeguide.cluster.runtime import submit
from freeguide.configs.errors import ConfigError, UserError


class Dashboard:
    """Answers each request for the log with the next of `answers`: chunks, the last of which may be an error; and "" = silence."""

    def __init__(self, answers: list[list[str | Exception]], statuses: list[JobStatus | Exception] | None = None) -> None:
        self._answers, self._statuses = iter(answers), iter(statuses or [JobStatus.SUCCEEDED])

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        for chunk in next(self._answers):
            if isinstance(chunk, Exception):
                raise chunk
            if not chunk:
                await submit.asyncio.Event().wait()
            yield chunk

    def get_job_status(self, job: str) -> JobStatus:
        status = next(self._statuses)
        if isinstance(status, Exception):
            raise status
        return status


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_PAUSE", 0.0)


BROKEN = RuntimeError("WebSocket connection closed unexpectedly with close code 1006")


def follow(dashboard: Dashboard) -> None:
    submit.asyncio.run(submit._follow(dashboard, "http://head:8265", "job-7"))


@pytest.mark.parametrize("reason", [BROKEN, ConnectionResetError("gone"), submit.ClientError("proxy")])
def test_a_log_that_breaks_off_is_followed_again_and_no_line_is_shown_twice(
    reason: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    follow(Dashboard([["a\nb\n", "c\n", reason], [reason], ["a\n", reason], ["a\n", "b\nc\nd\n", "e\n"]]))
    assert capsys.readouterr().out == "a\nb\nc\nd\ne\n"


RAYS = [
    "2026-11-25 18:27:14,649\tINFO job_manager.py:581 -- Runtime env is setting up.",
    "Running entrypoint for job freeguide-train-eab77cd0: python -m cluster train job/digits.yaml",
    "[2026-11-25 18:27:20,001 E 4242 4242] core_worker.cc:2745: Actor with class name: 'PreemptionWatcher' and ID: '0a'",
    "(PlacementGroupCleaner pid=4243) Traceback (most recent call last):",
    "\x1b[36m(raylet, ip=10.0.0.2)\x1b[0m A worker died",
]


def test_rays_own_lines_stay_in_the_log(capsys: pytest.CaptureFixture[str]) -> None:
    """Whole or in pieces, as the connection brings them; what is ours, or what a user's code prints, is shown."""
    ours = ["starting at step 0 of 8", "core_worker.cc is a file", "(1 image left out)", "[2026] a line", "without an end"]
    text = "\n".join(line for pair in zip(RAYS, ours, strict=True) for line in pair)
    for size in (1, 7, len(text)):
        follow(Dashboard([[text[at : at + size] for at in range(0, len(text), size)]]))
        assert capsys.readouterr().out.splitlines() == ours


def test_a_log_that_ends_before_its_job_is_followed_again(capsys: pytest.CaptureFixture[str]) -> None:
    follow(Dashboard([["a\n"], ["a\nb\n"]], [JobStatus.RUNNING, JobStatus.FAILED]))
    assert capsys.readouterr().out == "a\nb\n"


def test_a_connection_that_fell_silent_is_made_again(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(submit, "_SILENCE", 0.5)
    follow(Dashboard([["a\n", ""], ["a\nb\n"]], [JobStatus.SUCCEEDED] * 2))  # it ended meanwhile
    assert capsys.readouterr().out == "a\nb\n"


def test_a_connection_that_is_lost_for_good_says_that_the_job_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    many = submit._TRIES
    with pytest.raises(UserError, match=r"job job-7 goes on.*ray job logs --address http://head:8265 --follow job-7"):
        follow(Dashboard([["a\n", BROKEN], *[[BROKEN]] * (many - 1), ["a\nb\n", BROKEN], *[[BROKEN]] * many]))
    assert capsys.readouterr().out == "a\nb\n"


def test_a_job_that_is_silent_for_long_is_followed_as_long_as_its_head_answers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(submit, "_SILENCE", 0.01)
    many = 2 * submit._TRIES
    follow(Dashboard([*[[""]] * many, ["a\n"]], [*[JobStatus.PENDING] * many, JobStatus.SUCCEEDED]))
    assert capsys.readouterr().out == "a\n"


def test_a_job_that_a_new_head_does_not_know_is_named() -> None:
    gone = RuntimeError("Request failed with status code 404: Job job-7 does not exist.")
    with pytest.raises(
        UserError, match="does not know job job-7 any more, as its head was started again; the same command goes on"
    ):
        follow(Dashboard([["a\n"]], [gone]))


# --- what the job server says ---


class Server:
    """A job server that answers as `answers` say, by method and beginning of the path; each with (status, body) or a call."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {
            "GET /api/version": (200, json.dumps({"version": "4", "ray_version": "2.60.0", "ray_commit": "x"})),
            "GET /api/packages": (404, "none"),
            "PUT /api/packages": (200, ""),
            "POST /api/jobs/": lambda body: (
                200,
                json.dumps({"job_id": body["submission_id"], "submission_id": body["submission_id"]}),
            ),
            "GET /api/jobs/": (
                200,
                json.dumps({"type": "SUBMISSION", "entrypoint": "", "status": "SUCCEEDED", "driver_exit_code": 0}),
            ),
        }
        self.asked: list[str] = []
        self.jobs: list[dict[str, Any]] = []
        self.packages: list[bytes] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                what = f"{self.command} {self.path}"
                server.asked.append(what)
                if self.command == "PUT":
                    server.packages.append(body)
                answer = next(value for key, value in server.answers.items() if what.startswith(key))
                if isinstance(answer, list):
                    answer = answer.pop(0) if len(answer) > 1 else answer[0]
                if callable(answer):
                    server.jobs.append(json.loads(body))
                    answer = answer(server.jobs[-1])
                if answer is None:  # hangs up
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                status, text = answer
                data = text.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_PUT = do_POST = do_GET

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    async def followed(*_: object) -> None:
        pass

    monkeypatch.setattr(submit, "_follow", followed)
    monkeypatch.setattr(submit, "_PATIENCE", 0.2)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")  # of another cluster, which a submission does not concern
    found = Server()
    yield found
    found.http.shutdown()
    found.http.server_close()


PLACES = ["data.uri=s3://bucket/data", "run=s3://bucket/run"]
CONFIG = Path("configs/digits.yaml").resolve()


def send(server: Server, *overrides: str, command: str = "train", config: Path = CONFIG) -> int:
    return submit.submit(server.url, command, config, [*PLACES, *overrides])


def test_a_job_carries_what_was_typed_as_files_and_nothing_on_its_command_line(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "my config.yaml"
    config.write_text(CONFIG.read_text())
    typed = ["cluster.env={TOKEN: hunter2}", "name=${oc.env:WHO}", "evaluate.w=[0, 1]"]
    monkeypatch.setenv("WHO", "me")
    assert send(server, *typed, config=config) == 0
    (job,) = server.jobs
    assert job["entrypoint"] == "python -m freeguide.cluster train 'job/my config.yaml' @job/overrides"
    assert "hunter2" not in json.dumps(job)
    (tmp_path / "package.zip").write_bytes(server.packages[0])
    with zipfile.ZipFile(tmp_path / "package.zip") as archive:
        archive.extractall(tmp_path / "there")
    monkeypatch.chdir(tmp_path / "there")
    assert Path("job/my config.yaml").read_bytes() == CONFIG.read_bytes()
    assert _parser().parse_args(["train", "job/my config.yaml", "@job/overrides"]).overrides == [*PLACES, *typed]
    assert {place.suffix for place in Path().rglob("*") if place.is_file()} == {".py", ".yaml", ""}
    assert Path("freeguide/trainer/networks/adm.py").read_bytes() == (submit.ROOT / "trainer/networks/adm.py").read_bytes()


def test_only_sources_of_the_packages_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, there = tmp_path / "root", tmp_path / "there"
    there.mkdir()
    for package in submit.ROOMS:
        (root / package / "sub" / "__pycache__").mkdir(parents=True)
        for name in ("__init__.py", "a.py", "data.bin", ".env", "sub/__init__.py", "sub/b.py", "sub/__pycache__/b.py"):
            (root / package / name).write_text(name)
    package = root / "cluster"
    (package / ".venv" / "lib").mkdir(parents=True)
    (package / ".venv" / "lib" / "c.py").touch()
    (tmp_path / "secret.py").write_text("secret")
    (package / "link.py").symlink_to(tmp_path / "secret.py")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "__init__.py").touch()
    (package / "linked").symlink_to(tmp_path / "elsewhere")
    os.mkfifo(package / "pipe.py")
    monkeypatch.setattr(submit, "ROOT", root)
    submit.copy_package(there)
    files = {place.relative_to(there).as_posix() for place in there.rglob("*") if not place.is_dir()}
    assert files == {"freeguide/__init__.py"} | {
        f"freeguide/{p}/{n}" for p in submit.ROOMS for n in ("__init__.py", "a.py", "sub/__init__.py", "sub/b.py")
    }
    (package / "huge.yaml").write_bytes(bytes(submit._SOURCE_BYTES + 1))
    with pytest.raises(ConfigError, match=r"huge.yaml is too large to travel with a job"):
        submit.copy_package(tmp_path / "elsewhere")


TRACEBACK = "Traceback (most recent call last):\n  File x\nValueError: no such thing\n"
FINAL: dict[str, tuple[str, Any, str]] = {
    "not json": ("GET /api/version", (200, "<html>Welcome</html>"), "another server than a Ray dashboard answers there"),
    "other json": ("GET /api/version", (200, "[]"), "another server than a Ray dashboard answers there"),
    "no such page": ("GET /api/version", (404, ""), r"no Ray dashboard answers there \(404 Not Found\)"),
    "old": ("GET /api/version", (200, '{"ray_version": "2.9.3"}'), "the cluster runs Ray 2.9.3, and freeguide needs 2.60 or newer"),
    "hangs up": ("GET /api/version", None, "no Ray dashboard answers there"),
    "broken": ("GET /api/version", (503, ""), "the server there answers with 503 Service Unavailable"),
    "token": (
        "GET /api/version",
        (401, "Unauthorized: Missing authentication token"),
        "wants a token, and there is none here; set RAY_AUTH_TOKEN",
    ),
    "wrong token": ("GET /api/version", (403, "Forbidden"), "does not take the token of RAY_AUTH_TOKEN_PATH; set RAY_AUTH_TOKEN"),
    "upload": ("PUT /api/packages", (500, TRACEBACK), "refuses with 500: ValueError: no such thing$"),
    "upload too large": ("PUT /api/packages", (413, "<html>Too large</html>"), "refuses with 413: an HTML page$"),
    "package": ("GET /api/packages", (400, "odd"), "refuses with 400: odd$"),
    "no agent": (
        "POST /api/jobs/",
        (500, "No available agent to submit job, please try again later."),
        "has no agent that starts jobs: .* --dashboard-agent-listen-port=0",
    ),
    "gateway": ("POST /api/jobs/", (502, "<html>"), r"answers with 502 \(an HTML page\)"),
    "refused": ("POST /api/jobs/", (400, TRACEBACK), "refuses with 400: ValueError: no such thing$"),
    "forbidden": ("POST /api/jobs/", (403, "Forbidden"), "does not take the token"),
    "not as Ray": ("POST /api/jobs/", (200, "<html>"), "does not answer as Ray's does"),
    "another form": ("POST /api/jobs/", (200, '{"odd": 1}'), "does not answer as Ray's does"),
    "lost": ("POST /api/jobs/", None, "does not answer .*see whether the head is well"),
    "no info": ("GET /api/jobs/", (500, TRACEBACK), "refuses with 500: ValueError"),
}


@pytest.mark.parametrize("case", FINAL)
def test_whatever_a_job_server_answers_is_one_sentence(server: Server, case: str) -> None:
    what, answer, sentence = FINAL[case]
    server.answers = {what: answer, **server.answers} | {what: answer}
    with pytest.raises(UserError, match=sentence) as caught:
        send(server)
    message = str(caught.value)
    assert server.url in message
    assert len(message.splitlines()) == 1
    assert not message.endswith(".")


@pytest.mark.parametrize("what", ["GET /api/version", "POST /api/jobs/"])
def test_a_server_that_is_not_ready_yet_is_asked_again(
    server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    monkeypatch.setattr(submit, "_PATIENCE", 60.0)
    later = (500, "No available agent to submit job, please try again later.")
    server.answers[what] = [later, later, server.answers[what]]
    assert send(server) == 0
    assert len(server.jobs) == 1
    assert capsys.readouterr().err.count("trying again for 60 seconds") == 1


def test_a_token_that_is_not_there_is_named() -> None:
    """What Ray's own client raises before it asks."""
    found = "Token authentication is enabled but no authentication token was found"
    assert "wants a token, and there is none here; set RAY_AUTH_TOKEN" in submit.token_sentence("http://head:8265", found)


def test_a_submission_whose_answer_is_lost_is_not_made_twice(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_PATIENCE", 60.0)
    exists = "Job with submission_id {} already exists. Please use a different submission_id."
    server.answers["POST /api/jobs/"] = [lambda _: None, lambda body: (500, TRACEBACK + exists.format(body["submission_id"]))]
    assert send(server) == 0
    assert len({job["submission_id"] for job in server.jobs}) == 1


def test_a_server_that_never_answers_is_not_waited_for_without_end(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "_ANSWER", 0.5)
    forever = threading.Event()
    server.answers["POST /api/jobs/"] = lambda _: forever.wait(20) and None
    try:
        with pytest.raises(UserError, match=r"does not answer within 0.5 seconds"):
            send(server)
    finally:
        forever.set()


ENDS: dict[str, tuple[dict[str, Any], int, str]] = {
    "well": ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0, ""),
    "its own code": ({"status": "FAILED", "driver_exit_code": 2}, 2, ""),
    "killed": ({"status": "FAILED", "driver_exit_code": -9}, 137, "was killed by signal 9; the same command goes on"),
    "stopped": ({"status": "STOPPED"}, 143, "was stopped; the same command goes on"),
    "stopped in time": ({"status": "STOPPED", "driver_exit_code": 143}, 143, "was stopped; the same command goes on"),
}


@pytest.mark.parametrize("case", ENDS)
def test_how_a_job_ended_is_how_the_command_ends(server: Server, capsys: pytest.CaptureFixture[str], case: str) -> None:
    info, code, said = ENDS[case]
    server.answers["GET /api/jobs/"] = (200, json.dumps({"type": "SUBMISSION", "entrypoint": "", **info}))
    assert send(server) == code
    assert capsys.readouterr().err.strip().endswith(said)


def test_a_job_that_could_not_start_says_why(server: Server) -> None:
    why = "runtime_env setup failed: no space left on device\nTraceback\n  File x"
    info = {"type": "SUBMISSION", "entrypoint": "", "status": "FAILED", "message": why}
    server.answers["GET /api/jobs/"] = (200, json.dumps(info))
    with pytest.raises(UserError, match=r"did not start \(runtime_env setup failed: no space left on device\)"):
        send(server)


WRONG = {
    "HEAD:8265": "no address of a dashboard",
    "ray://HEAD:10001": "no address of a dashboard",
    "http://": "no address of a dashboard",
    "http://HEAD:x": "Port could not be cast",
    "http://[::1": "Invalid IPv6 URL",
    "http://me:hunter2@HEAD:8265": r"http://...@head: credentials do not belong into the address",
}


@pytest.mark.parametrize("address", WRONG)
def test_what_is_no_address_of_a_dashboard_is_one_sentence(address: str) -> None:
    with pytest.raises(ConfigError, match=WRONG[address]) as caught:
        submit.submit(address, "train", CONFIG, PLACES)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_where_nobody_listens_is_one_sentence(host: str) -> None:
    with pytest.raises(ConfigError, match=r"no Ray dashboard answers there .*http://HEAD:8265"):
        submit.submit(f"http://{host}:1", "train", CONFIG, PLACES)


def test_the_endpoint_travels_without_credentials(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://minio:9000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
    assert send(server) == 0
    assert server.jobs[0]["runtime_env"]["env_vars"]["AWS_ENDPOINT_URL"] == "http://minio:9000"
    assert "hunter2" not in json.dumps(server.jobs)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://me:hunter2@minio:9000")
    with pytest.raises(ConfigError, match="AWS_ENDPOINT_URL holds credentials, which do not travel"):
        send(server)


# --- what the cluster sees ---

SEEN = [
    (
        "train",
        ["data.uri=s3://bucket/x", "data.path=/home/me/photos", "data.disk_cache=/scratch", "evaluate.extractor=mine.safetensors"],
    ),
    ("prepare", ["data.uri=s3://bucket/x", "run=runs/x", "data.path=s3://bucket/tars"]),
    ("evaluate", ["data.uri=/nfs/data", "evaluate.others=[/nfs/row.json]", "cluster.shared_folders=[/nfs/]"]),
    ("train", ["data.uri=/data", "cluster.shared_folders=[/]"]),
    ("train", ["data.uri=file:///nfs/data", "cluster.shared_folders=[/nfs]"]),
]
UNSEEN = [
    ("train", "run", ["run=runs/x"]),
    ("train", "data.uri", ["data.uri=../x"]),
    ("train", "data.uri", ["data.uri=~/x", "cluster.shared_folders=[/]"]),
    ("train", "data.uri", ["data.uri=x", "cluster.shared_folders=[/]"]),
    ("prepare", "data.uri", ["data.uri=runs/x"]),
    ("prepare", "data.uri", ["data.uri=/nfsx", "cluster.shared_folders=[/nfs]"]),
    ("prepare", "data.path", ["data.path=/home/me/photos"]),
    ("index", "data.mixture", ["data.mixture={s3://bucket/a: 1, data/b: 2}"]),
    ("evaluate", "evaluate.extractor", ["evaluate.extractor=mine.safetensors"]),
    ("evaluate", "evaluate.reference", ["evaluate.reference=/home/me/reference.npz"]),
    ("evaluate", "evaluate.others", ["evaluate.others=[s3://bucket/row.json, row.json]"]),
    ("evaluate", "evaluate.sweep", ["evaluate.sweep={run: [s3://bucket/a, runs/b]}"]),
    ("generate", "run", ["run=/home/me/run"]),
    ("export", "run", ["run=file:///home/me/run"]),
]


@pytest.mark.parametrize(("command", "overrides"), SEEN)
def test_places_that_the_cluster_sees_are_sent(server: Server, command: str, overrides: list[str]) -> None:
    assert send(server, *overrides, command=command) == 0


@pytest.mark.parametrize(("command", "key", "overrides"), UNSEEN)
def test_a_place_that_the_cluster_does_not_see_is_refused_before_anything_is_sent(
    server: Server, command: str, key: str, overrides: list[str]
) -> None:
    with pytest.raises(
        ConfigError, match=rf"^{key}=.*with --submit, a (path from here|folder of this machine).*give s3://bucket/prefix"
    ):
        send(server, *overrides, command=command)
    assert server.asked == []


def test_a_shared_folder_has_a_whole_path(server: Server) -> None:
    with pytest.raises(ConfigError, match=r"^cluster.shared_folders=nfs: give the whole path"):
        send(server, "data.uri=/nfs/x", "cluster.shared_folders=[nfs]")


def test_the_oldest_ray_is_the_one_of_the_requirements() -> None:
    assert f"ray[data,default,train]>={'.'.join(map(str, submit.OLDEST_RAY))}" in Path("pyproject.toml").read_text()
