"""What a user gets wrong ends in one sentence and exit code 2, before Ray starts."""

import contextlib
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from PIL import Image

from freeguide.cluster.cli import COMMANDS, EXAMPLES, _parse, main
from freeguide.configs.load import load_config
from freeguide.data_pipeline.store.base import Retry

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs" / "digits.yaml")
FOLDER = str(ROOT / "configs" / "image_folder.yaml")


@pytest.fixture
def refuses(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):  # type: ignore[no-untyped-def]
    """refuses(*arguments) runs the command, expects exit code 2, and returns its one sentence."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", lambda *a, **k: pytest.fail("Ray was started"))

    def run(*arguments: str) -> str:
        assert main(list(arguments)) == 2
        text = capsys.readouterr().err
        assert text.startswith("freeguide: error: ")
        assert text.count("\n") == 1, text
        assert "Traceback" not in text
        return text

    return run


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three classes of four noise images, 40x32 pixels."""
    random = np.random.default_rng(0)
    for name in ("ant", "bee", "cat"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(random.integers(0, 256, (32, 40, 3), np.uint8)).save(tmp_path / "pictures" / name / f"{i}.png")
    return tmp_path / "pictures"


@pytest.fixture
def silent_endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """An S3 endpoint that accepts connections and never answers: its listening socket."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
        yield server


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "generate", "inspect"])
def test_a_missing_config_and_an_unknown_key_and_a_wrong_type(refuses, command: str) -> None:  # type: ignore[no-untyped-def]
    assert "no such config file" in refuses(command, str(ROOT / "configs" / "none.yaml"))
    assert "did you mean train.lr?" in refuses(command, DIGITS, "train.lrr=1")
    assert "train.steps takes a whole number, not 'soon'" in refuses(command, DIGITS, "train.steps=soon")


@pytest.mark.parametrize("command", ["prepare", "train", "evaluate", "generate"])
def test_a_bucket_that_does_not_exist(refuses, s3: str, command: str) -> None:  # type: ignore[no-untyped-def]
    text = refuses(command, DIGITS, "data.uri=s3://nowhere/data", "run=s3://nowhere/run")
    assert "nowhere does not exist" in text


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=pytest.mark.slow) for c in ("prepare", "generate")] + ["train", "evaluate"]
)
def test_an_endpoint_that_does_not_answer_is_given_up_within_15_seconds(  # type: ignore[no-untyped-def]
    refuses, silent_endpoint: socket.socket, command: str
) -> None:
    """By the number of its tries and the longest wait of each, as a clock would also count the imports on a busy machine."""
    assert "does not answer" in refuses(command, DIGITS)
    silent_endpoint.setblocking(False)
    tries = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            silent_endpoint.accept()[0].close()
            tries += 1
    assert 1 <= tries <= 15 / (Retry().connect_s + Retry().read_s)


def test_an_endpoint_where_nobody_listens(refuses, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    assert "does not answer" in refuses("train", DIGITS)


def test_wrong_credentials(refuses, strict_s3: None, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-that-is-wrong")
    text = refuses("train", DIGITS, "data.uri=s3://lab/data", "run=s3://lab/run")
    assert "credentials for s3://lab/data are wrong" in text
    assert "secret-that-is-wrong" not in text


def test_an_image_folder_that_is_empty_or_missing(refuses, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "does not exist; set data.path" in refuses("prepare", FOLDER, f"data.path={tmp_path}/none")
    (tmp_path / "empty").mkdir()
    assert "has no class folders" in refuses("prepare", FOLDER, f"data.path={tmp_path}/empty")
    (tmp_path / "empty" / "ant").mkdir()
    assert "hold no images" in refuses("prepare", FOLDER, f"data.path={tmp_path}/empty")
    assert "data.path is empty" in refuses("prepare", FOLDER)


def test_an_image_that_is_none_is_named_counted_and_skipped_under_a_budget(
    refuses,  # type: ignore[no-untyped-def]
    pictures: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (pictures / "bee" / "note.png").write_text("not an image")
    options = [f"data.path={pictures}", "data.classes=3", "data.uri=data"]
    text = refuses("prepare", FOLDER, *options)
    assert "1 of 13 images cannot be read" in text
    assert "bee/note.png" in text
    assert main(["prepare", FOLDER, *options, "data.bad_images=0.1"]) == 0
    printed = capsys.readouterr().out
    assert "12 images 32x32x3, 3 classes" in printed
    assert "1 image left out" in printed
    assert "bee/note.png" in printed


def test_data_that_is_not_there_or_not_what_the_config_says(refuses, pictures: Path) -> None:  # type: ignore[no-untyped-def]
    assert "freeguide prepare" in refuses("train", FOLDER)
    assert main(["prepare", FOLDER, f"data.path={pictures}"]) == 0
    assert "was prepared with classes=3; set data.classes=3" in refuses("train", FOLDER, "data.classes=10")
    assert "another data set" in refuses("prepare", FOLDER, f"data.path={pictures}", "data.classes=3", "data.image_size=16")


def test_batches_that_the_workers_do_not_divide(refuses) -> None:  # type: ignore[no-untyped-def]
    assert "train.global_batch=128 is not divisible by cluster.workers=3" in refuses("train", DIGITS, "cluster.workers=3")


def test_guidance_without_an_unconditional_mode(refuses) -> None:  # type: ignore[no-untyped-def]
    assert "cannot be sampled" in refuses("evaluate", DIGITS, "diffusion.p_uncond=0")
    assert "cannot be sampled" in refuses("generate", DIGITS, "diffusion.p_uncond=0", "generate.w=1")


def test_evaluating_a_run_that_has_no_checkpoint(refuses, pictures: Path) -> None:  # type: ignore[no-untyped-def]
    assert main(["prepare", FOLDER, f"data.path={pictures}", "data.classes=3"]) == 0
    Path("runs/image_folder/store").mkdir(parents=True)
    for command in ("evaluate", "generate"):
        assert "no checkpoint; run `freeguide train` first" in refuses(command, FOLDER, "data.classes=3")


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("http://127.0.0.1:9", "no Ray dashboard answers there"),
        ("127.0.0.1:9", "no address of a dashboard; give the address of the head's dashboard, for example http://HEAD:8265"),
        ("nonsense", "no address of a dashboard"),
    ],
)
def test_submitting_to_a_cluster_that_does_not_answer(refuses, address: str, words: str) -> None:  # type: ignore[no-untyped-def]
    assert f"--submit {address}: {words}" in refuses("train", DIGITS, "--submit", address)


def test_a_ray_address_that_does_not_answer(refuses, s3: str, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    assert main(["prepare", FOLDER, f"data.path={pictures}", "data.classes=3"]) == 0
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert "RAY_ADDRESS=127.0.0.1:9: no Ray cluster answers" in refuses("train", FOLDER, "data.classes=3", "train.global_batch=4")


def test_inspecting_a_run_that_is_not_there(refuses, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    assert "no run stands here" in refuses("inspect", str(tmp_path))


def test_a_dry_run_costs_nothing_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", FOLDER, "--dry-run"]) == 0
    assert "parameters" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_version_names_what_freeguide_stands_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    pattern = r"freeguide (\d+\.\d+\.\d+|source) \(Python 3\.\d+\.\d+, torch 2\.\S+, ray 2\.\S+, deepspeed 0\.\S+\)\n"
    assert re.fullmatch(pattern, capsys.readouterr().out)


@pytest.mark.parametrize("command", [*COMMANDS, "score", "demo"])
def test_every_command_explains_itself_with_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert f"Example: {EXAMPLES[command]}\n" in capsys.readouterr().out  # on one line, so that it can be copied
    words = shlex.split(EXAMPLES[command].split(", ")[0])[1:]
    options = _parse(words)
    assert options.command == command
    if command not in ("score", "demo"):
        load_config(options.config, options.overrides, command)  # its keys and values are right


def test_help_of_the_demo_says_what_it_does_where_it_writes_and_how_long_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(words in text for words in ("train and evaluate", "runs/digits/", "runs/.s3/", "minutes on 2 cores"))


@pytest.mark.parametrize(("shell", "check"), [("bash", "bash -n"), ("zsh", "zsh -n"), ("tcsh", "")])
def test_a_shell_gets_a_script_that_completes_every_command(shell: str, check: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--print-completion", shell])
    script = capsys.readouterr().out
    assert all(command in script for command in COMMANDS)
    assert "submit" in script or shell == "tcsh"  # for which shtab completes commands and files alone
    if check and shutil.which(shell):
        assert subprocess.run([*check.split(), "/dev/stdin"], input=script, text=True, check=False).returncode == 0


BASH = """
source /dev/stdin
complete -p freeguide
for typed in "tra" "train --sub" "train --dry" "score --ext" "fit"; do
    COMP_WORDS=(freeguide $typed) COMPREPLY=()
    COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
    _shtab_freeguide
    echo ${COMPREPLY[@]}
done
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes_commands_and_their_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--print-completion", "bash"])
    script = capsys.readouterr().out
    ended = subprocess.run(["bash", "-c", BASH], input=script, capture_output=True, text=True, timeout=60)
    assert ended.stdout.splitlines()[1:] == ["train", "--submit", "--dry-run", "--extractor --extractor-hash", "fit-evaluator"]


@pytest.mark.parametrize("command", COMMANDS)
def test_what_an_example_needs_quoted_is_quoted(command: str) -> None:
    """zsh takes a bare [ for a pattern of file names, and refuses the command if there are no such files."""
    shown = EXAMPLES[command].split(", ")[0]
    bare = re.sub(r"'[^']*'", "", shown)
    assert not set("[]{}*?") & set(bare), shown


def test_a_packaged_config_is_inspected_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["inspect", "digits"]) == 0
    assert "name: digits" in capsys.readouterr().out
    Path("digits").mkdir()  # a folder of that name is meant: the run
    assert main(["inspect", "digits"]) == 2
    assert "no run stands here" in capsys.readouterr().err


DIES_IN_THE_END = """
import atexit, ctypes, sys
from freeguide.cluster import cli
c = ctypes.CDLL(None)
c.__cxa_atexit(c.abort, None, None)  # as a thread of Ray's that uses what the C library has taken away
sys.modules["ray"] = sys
cli.main = lambda: atexit.register(print, ", and cleared away", end="") and print("done", end="") or {code}
cli.run()
"""


@pytest.mark.parametrize("code", [0, 2])
def test_what_dies_after_the_end_does_not_count(code: int) -> None:
    script = DIES_IN_THE_END.replace("{code}", str(code))
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "done, and cleared away", "")


def test_an_error_that_nobody_catches_still_ends_with_1() -> None:
    fails = DIES_IN_THE_END.replace('print("done", end="") or {code}', "1 / 0")
    ended = subprocess.run([sys.executable, "-c", fails], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "ZeroDivisionError" in ended.stderr
