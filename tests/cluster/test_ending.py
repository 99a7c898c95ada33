"""How commands end that are asked to: Ctrl-C, SIGTERM, a reader that has gone. With Ray: tests/faults/test_ray_drills.py."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from freeguide.cluster.runtime.ending import GO_ON

ROOT = Path(__file__).parents[2]
STOPPING = "stopping; Ctrl-C again ends it at once"
# A command that says when it is where it is to be interrupted, and works until it is.
AT_WORK = """
import sys, time
from freeguide.cluster import cli
from freeguide.cluster.runtime import ending
say = lambda: print("at work", flush=True)
def work(options):
    {work}
    return 0
cli._command = work
sys.exit(cli.main(["train", "digits"]))
"""
Ended = tuple[int, str, str]


@pytest.fixture
def stopped(tmp_path: Path) -> Callable[..., Ended]:
    """stopped(work, *signals) sends them to a command at work, the next when it says "stopping"; (code, stdout, stderr)."""
    out, error = tmp_path / "out", tmp_path / "error"

    def stop(work: str, *signals: signal.Signals) -> Ended:
        with out.open("w") as o, error.open("w") as e:
            process = subprocess.Popen([sys.executable, "-c", AT_WORK.format(work=work)], cwd=ROOT, stdout=o, stderr=e)
        for said, words, number in zip([out, error], ["at work", STOPPING], signals, strict=False):
            while words not in said.read_text():
                assert process.poll() is None, error.read_text()
                time.sleep(0.01)
            process.send_signal(number)
        process.wait(timeout=60)
        return process.returncode, out.read_text().removeprefix("at work\n"), error.read_text()

    return stop


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_says_at_once_that_it_stops_and_then_how_to_go_on(
    stopped: Callable[..., Ended], number: signal.Signals, code: int
) -> None:
    ended, out, error = stopped("try: say(); time.sleep(60)\n    finally: print('in order')", number)
    assert (ended, out) == (code, "in order\n")
    assert error.split("\n") == ["", STOPPING, GO_ON, ""]


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_second_ctrl_c_waits_for_nothing(stopped: Callable[..., Ended], first: signal.Signals) -> None:
    ended, out, error = stopped("try: say(); time.sleep(60)\n    finally: time.sleep(60)", first, signal.SIGINT)
    assert (ended, out) == (128 + first, "")
    assert error.rstrip().endswith(GO_ON)


def test_what_can_save_first_does_so(stopped: Callable[..., Ended]) -> None:
    work = """
    asked = []
    with ending.gently(lambda: asked.append(1) or True):
        say()
        while not ending.asked(): time.sleep(0.01)
    print("saved", asked)
    ending.leave()
    """
    assert stopped(work, signal.SIGINT)[:2] == (130, "saved [1]\n")
    assert stopped(work, signal.SIGTERM)[:2] == (143, "saved [1]\n")


def test_a_command_that_was_done_before_it_could_stop_ends_as_asked(stopped: Callable[..., Ended]) -> None:
    work = """
    with ending.gently(lambda: True):
        say()
        while not ending.asked(): time.sleep(0.01)
    print("done all the same")
    """
    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        ended, out, error = stopped(work, number)
        assert (ended, out) == (code, "done all the same\n")
        assert error.split("\n") == ["", STOPPING, GO_ON, ""]


def test_a_demo_that_is_asked_to_end_in_its_last_step_of_training_does_not_evaluate(stopped: Callable[..., Ended]) -> None:
    work = """
    import os, signal
    from freeguide.cluster.jobs.demo import demo
    def command(options):
        print("begun", options.command, flush=True)
        if options.command == "train":
            with ending.gently(lambda: True):
                os.kill(os.getpid(), signal.SIGTERM)
            print("trained")
        return 0
    cli._command = command
    return demo(["data.uri=s3://mine/data", "run=s3://mine/run"], cli.main)
    """
    ended, out, error = stopped(work)
    assert ended == 143
    assert out.rstrip().endswith("trained")
    assert "begun evaluate" not in out
    assert error.rstrip().endswith(GO_ON)


def test_where_nothing_is_to_be_saved_a_command_stops_at_once(stopped: Callable[..., Ended]) -> None:
    assert stopped("\n    with ending.gently(lambda: False): say(); time.sleep(60)", signal.SIGINT)[0] == 130


def test_handlers_are_as_before_when_a_command_has_ended() -> None:
    code = (
        "import signal; before = signal.getsignal(15)\nfrom freeguide.cluster import cli; cli.main(['train', 'x'])\n"
        "print(signal.getsignal(15) == before)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == "True\n"


def test_a_reader_that_has_gone_ends_a_command_without_a_traceback() -> None:
    """As in `freeguide inspect digits | head -1`, whatever the size of the pipe."""
    process = subprocess.Popen(
        [sys.executable, "-c", AT_WORK.format(work="say(); sys.stdin.read(); print('more')")],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "at work\n"
    process.stdout.close()
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=60) == 141


def test_a_broken_pipe_that_is_not_the_terminals_is_a_defect() -> None:
    work = "raise BrokenPipeError(32, 'of a socket')"
    ended = subprocess.run([sys.executable, "-c", AT_WORK.format(work=work)], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, "of a socket" in ended.stderr) == (1, True)


@pytest.mark.parametrize(
    ("work", "words"),
    [
        ("open('/nonexistent/x')", "freeguide: error: /nonexistent/x: No such file or directory\n"),
        ("open('/')", "freeguide: error: /: Is a directory\n"),
        ("raise PermissionError(13, 'Permission denied', 'runs')", "freeguide: error: runs: Permission denied\n"),
    ],
)
def test_what_the_machine_refuses_is_one_sentence(work: str, words: str) -> None:
    ended = subprocess.run([sys.executable, "-c", AT_WORK.format(work=work)], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (2, words)


def test_names_that_a_terminal_cannot_show_are_shown_escaped() -> None:
    work = "print('\\udce9', '\\u2193')"
    latin = os.environ | {"PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", AT_WORK.format(work=work)], cwd=ROOT, env=latin, capture_output=True, text=True)
    assert ended.stdout == "\\udce9 \\u2193\n", ended.stderr
