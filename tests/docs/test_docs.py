"""Every command that README.md and docs/*.md print is run as it is printed, or listed here with the reason why not.

They run in their order, in a folder that is like a fresh clone, by `sh`, with the programs of this environment. What stands for
something of the reader's (IMAGES, HEAD) is put in from PLACEHOLDERS. The programs are wrapped: those that are given a config get
`sizes` behind the words that are printed, so that a network is tiny and a training has four steps, and nothing else changes.

The commands of "Your own images" run in the quick suite, the rest among the slow tests.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_origin

import numpy as np
import pytest
from PIL import Image

from freeguide.cluster.cli import _parse, _parser
from freeguide.configs.errors import UserError
from freeguide.configs.load import load_config
from freeguide.configs.schema import options
from freeguide.data_pipeline.store.open import create_bucket, open_store
from tests.cluster.conftest import s3, started_head  # noqa: F401  # a fixture
from tests.docs.printed import LANGUAGES, PAGES, ROOT, Block, Command, blocks, commands, printed, spans

# What the pages leave open, and what stands there when they are run.
PLACEHOLDERS = {
    "IMAGES": "pictures",  # ten class folders, see `pictures`
    "HEAD:8265": "DASHBOARD",  # of a cluster that `ray start --head` began
    "FOLDER_OF_THE_IDX_FILES": "idx",
    "DATA": "s3://freeguide/law/data",
    "RUNS": "s3://freeguide/law",
    "SAMPLES": "samples.npz",
    # Published files, which are not ours to give (a hash in the name says which bytes): what `fit-evaluator` made stands for them.
    "weights-inception-2015-12-05-6726825d.pth": "own-evaluator.safetensors",
    "VIRTUAL_imagenet64_labeled.npz": "s3://freeguide/data/fashion-mnist",
}

SIZES = (
    "model.channels=16 model.head_channels=16 model.res_blocks=1 train.steps=4 train.global_batch=16 train.warmup_steps=1 "
    "train.checkpoint_every=2 train.log_every=2 sampling.steps=2 evaluate.images=40 evaluate.unit=20 evaluate.grid=2 "
    "evaluate.evaluator_epochs=1 generate.images=30 generate.unit=15"
)
FEW_W = " evaluate.w=[0,1]"
# The places that the page tells the reader to give, two workers without a GPU instead of 32 with one, and ten classes.
IMAGENET = (
    " data.uri=s3://freeguide/data/imagenet64 run=s3://freeguide/runs/imagenet64 data.classes=10 train.micro_batch=4 "
    "cluster.workers=2 cluster.actors=1 cluster.gpus_per_worker=0"
)


@dataclass(frozen=True)
class Run:
    """How a command is run, and what shows that it did what the page says."""

    says: str = ""  # a regular expression that its output has
    makes: tuple[str, ...] = ()  # patterns of files that are there afterwards
    again: str = ""  # if the page says that it may be given again: what it says then
    sizes: str = ""  # further overrides behind SIZES
    before: Callable[["Place"], None] | None = None  # what the reader has, or has done, by then


def has_imagenet(place: "Place") -> None:
    options = ["data.path=pictures", *SIZES.split(), *IMAGENET.split()]
    assert place.sh(shlex.join(["freeguide", "prepare", "configs/imagenet64.yaml", *options])).returncode == 0


def has_fashion(place: "Place") -> None:
    assert place.sh("freeguide prepare configs/fashion_mnist.yaml data.path=idx").returncode == 0


def has_samples(place: "Place") -> None:
    (line,) = re.findall(r"pin it: evaluate\.extractor=(\S+)", place.log)
    bucket, _, key = line.removeprefix("s3://").partition("/")
    (place.folder / "own-evaluator.safetensors").write_bytes(open_store(f"s3://{bucket}").get(key))
    images = np.random.default_rng(0).integers(0, 256, (100, 14, 14, 1), np.uint8)
    np.savez(place.folder / "samples.npz", arr_0=images, arr_1=np.arange(100) % 10)


def has_digits(place: "Place") -> None:
    assert place.sh("freeguide prepare configs/digits.yaml").returncode == 0


RUN = {
    "make demo": Run(r"demo done in", ("runs/digits/index.html", "runs/digits/table.md"), sizes=FEW_W),
    "freeguide prepare configs/image_folder.yaml data.path=IMAGES": Run(
        r"120 images 32x32x3, 10 classes", ("runs/image_folder/data/manifest.json", "runs/image_folder/data/**/*.tar")
    ),
    "freeguide train configs/image_folder.yaml": Run(
        r"trained to step 4", ("runs/image_folder/store/checkpoints/step-00000004/manifest.json",), "nothing to do"
    ),
    "freeguide evaluate configs/image_folder.yaml": Run(
        r"\| FID", ("runs/image_folder/index.html", "runs/image_folder/table.md"), sizes=FEW_W
    ),
    "freeguide generate configs/image_folder.yaml generate.w=0.5 generate.images=50000": Run(
        makes=("runs/image_folder/store/**/samples.npz", "runs/image_folder/store/**/*.tar")
    ),
    "freeguide export configs/image_folder.yaml": Run(
        makes=("runs/image_folder/store/export/*.safetensors", "runs/image_folder/store/export/*.md")
    ),
    "freeguide train configs/imagenet64.yaml --submit http://HEAD:8265": Run(
        r"trained to step 4", sizes=IMAGENET, before=has_imagenet
    ),
    "freeguide evaluate configs/imagenet64.yaml --submit http://HEAD:8265": Run(
        r"report: runs/imagenet64/index.html", ("runs/imagenet64/index.html",), sizes=IMAGENET + FEW_W
    ),
    "ray job submit --address http://HEAD:8265 --working-dir . -- python -m cluster train configs/imagenet64.yaml": Run(
        r"step 4 of 4, nothing to do|trained to step 4", sizes=IMAGENET, before=has_imagenet
    ),
    "freeguide fit-evaluator configs/fashion_mnist.yaml": Run(
        r"pin it: evaluate\.extractor=\S+ evaluate\.extractor_hash=[0-9a-f]{64}", before=has_fashion
    ),
    "freeguide score SAMPLES --reference VIRTUAL_imagenet64_labeled.npz --dataset imagenet64 "
    "--extractor weights-inception-2015-12-05-6726825d.pth --name BigGAN-deep --json biggan.json": Run(
        r"BigGAN-deep", ("biggan.json",), before=has_samples
    ),
    "freeguide prepare configs/fashion_mnist.yaml data.uri=DATA data.path=FOLDER_OF_THE_IDX_FILES": Run(
        r"60 images 14x14x1, 10 classes", sizes=" data.shard_samples=32"
    ),
    "for p in 0.1 0.2 0.5; do for s in 0 1 2; do python -m trainer configs/fashion_mnist.yaml data.uri=DATA run=RUNS/p$p-s$s "
    "diffusion.p_uncond=$p seed=$s done; done": Run(r"(?s)(step 4/4.*){9}"),
    'freeguide evaluate configs/fashion_mnist.yaml data.uri=DATA run=RUNS/p0.1-s0 "evaluate.sweep={run: [RUNS/p0.1-s0, '
    "RUNS/p0.2-s0, RUNS/p0.5-s0, RUNS/p0.1-s1, RUNS/p0.2-s1, RUNS/p0.5-s1, RUNS/p0.1-s2, RUNS/p0.2-s2, RUNS/p0.5-s2]}\"": Run(
        r"p_uncond", ("runs/fashion-mnist/index.html",), sizes=FEW_W
    ),
    "freeguide train configs/digits.yaml train.steps=1000 train.checkpoint_every=500": Run(
        r"trained to step 4", before=has_digits
    ),
    "freeguide evaluate configs/digits.yaml train.steps=1000 'evaluate.w=[0,0.05,0.1,0.2,0.3,0.5]' sampling.checkpoint=500": Run(
        r"checkpoint of step 2", ("runs/digits/index.html",), sizes=" sampling.checkpoint=2" + FEW_W
    ),
    "freeguide train configs/imagenet64.yaml": Run(
        r"trained to step 4|nothing to do", sizes=IMAGENET + " run=s3://freeguide/runs/alone", before=has_imagenet
    ),
    "python -m trainer configs/imagenet64.yaml": Run(
        r"step 4/4", sizes=IMAGENET + " run=s3://freeguide/runs/without-ray", before=has_imagenet
    ),
    "torchrun --nproc-per-node 8 -m trainer configs/imagenet64.yaml": Run(
        r"step 4/4", sizes=IMAGENET + " run=s3://freeguide/runs/torchrun train.micro_batch=2", before=has_imagenet
    ),
}  # fmt: skip

NOT_RUN = {
    "make test": "the suite that this test is of",
    "make test-s3": "a suite of its own, which installs Debian packages and starts Ceph; CI runs it",
    "python -m pytest -m slow tests/data_pipeline": "a part of make test-slow, as this test is",
    "python -m tests.faults.radosgw_s3 python benchmarks/data.py --full --rounds 1 --peers PEERS/bin/python": (
        "needs Ceph and an environment with the peers, and measures for an hour; `make bench` is its small form"
    ),
    "srun --ntasks-per-node 1 torchrun --nnodes $SLURM_NNODES --nproc-per-node 8 --rdzv-backend c10d "
    "--rdzv-endpoint $(scontrol show hostnames | head -1):29500 -m trainer configs/imagenet64.yaml": "needs SLURM",
    "python benchmarks/training.py --full --network fashion": "measures for half an hour; `make bench` is its small form",
}
QUICK = "configs/image_folder.yaml"  # what holds it is run in the quick suite

PRINTED = printed()


def name_of(command: Command) -> str:
    return f"{command.page}:{command.line} {command.key}"[:100]


# --- the pages by themselves ---


def test_every_command_is_run_or_listed_with_a_reason_and_nothing_else_is_listed() -> None:
    keys = {command.key for command in PRINTED}
    new = [name_of(command) for command in PRINTED if command.key not in RUN.keys() | NOT_RUN.keys()]
    assert new == [], "say in tests/docs/test_docs.py how it is run, or why not"
    assert (RUN.keys() | NOT_RUN.keys()) - keys == set(), "the pages do not print it any more"
    assert RUN.keys() & NOT_RUN.keys() == set()


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_holds(page: str) -> None:
    assert [b for b in blocks(page, (ROOT / page).read_text()) if b.language not in LANGUAGES] == [], f"use {', '.join(LANGUAGES)}"
    lines = (ROOT / page).read_text().splitlines()
    typed = re.compile(r"(    |\t)\$?\s*(freeguide|python|make|ray|torchrun|srun|pip) ")
    fenced = {n for b in blocks(page, "\n".join(lines)) for n in range(b.line, b.line + len(b.lines) + 1)}
    assert [line for n, line in enumerate(lines) if n not in fenced and typed.match(line)] == [], "use a fenced block of sh"


def words_of(command: Command) -> Iterator[list[str]]:
    """The simple commands within a command, as words; what a shell would put in is a 0."""
    text = re.sub(r"\$\(.*?\)|\$\w+", "0", command.text.replace("\\\n", " "))
    for part in re.split(r";|\n|&&|\|", text) if text.startswith("for ") else [text]:
        words = shlex.split(part)
        while words and (words[0] in ("do", "done", "for") or "=" in words[0]):
            words = [] if words[0] in ("for", "done") else words[1:]
        if words:
            yield words


@pytest.mark.parametrize("command", PRINTED, ids=name_of)
def test_every_command_parses_and_names_what_exists(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    checked = [checked_words(words) for words in words_of(command)]
    assert any(checked), f"nothing of it is known here: {command.key}"


def checked_words(words: list[str]) -> bool:
    """Whether something of a simple command could be checked. AssertionError and SystemExit: it is wrong."""
    if words[0] == "freeguide" or words[:3] == ["python", "-m", "cluster"]:
        options = _parse(words[1:] if words[0] == "freeguide" else words[3:])
        if hasattr(options, "config"):
            load_config(options.config, options.overrides, options.command)
        return True
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text(), f"make has no {words[1]}"
        return True
    if "-m trainer" in " ".join(words):
        config, *overrides = words[words.index("-m") + 2 :]
        load_config(config, overrides)
        return True
    if "--" in words:
        return checked_words(words[words.index("--") + 1 :])
    if words[0] == "python":
        script = next((word for word in words if word.endswith(".py")), None)
        for word in words:
            assert (
                not word.startswith(("tests", "benchmarks/"))
                or list(ROOT.glob(word.replace(".", "/") + "*"))
                or (ROOT / word).exists()
            )
            if script and word.startswith("--"):
                assert word in (ROOT / script).read_text(), f"{script} has no option {word}"
        return "pytest" in words or script is not None
    return False


@pytest.mark.parametrize("page", PAGES)
def test_the_prose_names_commands_and_options_that_exist(page: str) -> None:
    parsers = next(action.choices for action in _parser()._actions if isinstance(action.choices, dict))
    helps = _parser().format_help() + "".join(parser.format_help() for parser in parsers.values())
    wrong = []
    for span in spans(page):
        words = span.split()
        if words[0] == "freeguide" and len(words) > 1 and re.match(r"[a-z-]", words[1]):
            wrong += [] if words[1] in parsers or words[1] in helps else [span]
            wrong += [span for word in words if word.startswith("--") and word not in helps]
        if words[0] == "make" and len(words) > 1 and words[1].islower():
            wrong += [] if f"\n{words[1]}:" in (ROOT / "Makefile").read_text() else [span]
        for word in words:
            key = re.match(r"(data|model|diffusion|train|sampling|evaluate|generate|cluster)(\.[a-z0-9_]+)+(?==|$)", word)
            wrong += [span] if key and not exists(key[0]) else []
    assert wrong == []


def exists(key: str) -> bool:
    """Whether an option of that name exists; below a dictionary, such as cluster.env, any does."""
    known = options()
    return any(key == name or (key.startswith(f"{name}.") and get_origin(kind) is dict) for name, kind in known.items())


# --- a folder like a fresh clone ---


@dataclass
class Place:
    """The reader's folder, with all that has been printed in it so far."""

    folder: Path
    environment: dict[str, str]
    log: str = ""

    def sh(self, text: str, sizes: str = "") -> "subprocess.CompletedProcess[str]":
        ended = subprocess.run(
            ["sh", "-c", text], cwd=self.folder, env=self.environment | {"SIZES": sizes}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=900,
        )  # fmt: skip
        self.log += ended.stdout
        return ended


WRAPPED = """#!/bin/sh
set -f
case " $* " in
*" demo "* | *.yaml*) exec {program} "$@" $SIZES ;;
*) exec {program} "$@" ;;
esac
"""


@pytest.fixture(scope="module")
def place(s3: str, tmp_path_factory: pytest.TempPathFactory) -> Place:  # noqa: F811
    """A clone, set up: `.venv/bin` has the programs, wrapped. The environment is a user's, with the test's S3 server."""
    folder = tmp_path_factory.mktemp("docs") / "freeguide"
    leave = shutil.ignore_patterns(".git", ".venv*", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info", "runs", "build")
    shutil.copytree(ROOT, folder, ignore=leave)
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("freeguide", "python", "ray", "torchrun"):
        program = {
            "freeguide": f"{sys.executable} -m cluster",
            "python": sys.executable,
            "torchrun": f"{sys.executable} -m torch.distributed.run",
        }
        (programs / name).write_text(
            WRAPPED.format(program=program.get(name, f"{sys.executable} {Path(sys.executable).parent / name}"))
        )
        (programs / name).chmod(0o755)
    (folder / ".venv" / "ready").touch()
    pictures(folder / "pictures")
    idx(folder / "idx")
    create_bucket("s3://freeguide")
    theirs = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    (folder.parent / "home").mkdir()
    return Place(folder, theirs | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(folder), "HOME": str(folder.parent / "home"),
        "OMP_NUM_THREADS": "1",
    })  # fmt: skip


@pytest.fixture(scope="module")
def head(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The dashboard of a cluster that the reader has begun on the same machine: without a token, as Ray does by itself."""
    with started_head(tmp_path_factory.mktemp("head"), place.environment) as (_, dashboard):
        yield dashboard


def pictures(folder: Path) -> None:
    """Twelve pictures of mixed sizes and kinds in each of ten folders, nested and with odd names, each class of one colour."""
    random = np.random.default_rng(0)
    for label in range(10):
        below = folder / f"class {label} é" / ("2024/summer" if label % 2 else "")
        below.mkdir(parents=True)
        for number in range(12):
            height, width = random.integers(40, 90, 2)
            pixels = random.integers(0, 60, (height, width, 3)) + np.array([label * 19, 190 - label * 19, label % 3 * 60])
            kind = ("png", "jpg", "webp")[number % 3]
            Image.fromarray(pixels.astype(np.uint8)).save(below / f"a picture, {number} (1).{kind}")


def idx(folder: Path) -> None:
    """Sixty pictures in the files of MNIST."""
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (60, 28, 28), np.uint8)
    header = lambda kind, *shape: bytes([0, 0, 8, kind]) + b"".join(n.to_bytes(4, "big") for n in shape)  # noqa: E731
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte").write_bytes(header(3, 60, 28, 28) + images.tobytes())
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(header(1, 60) + (np.arange(60) % 10).astype(np.uint8).tobytes())


def filled(text: str, dashboard: str = "") -> str:
    for name, value in PLACEHOLDERS.items():
        text = re.sub(rf"(?<![\w-]){re.escape(name)}(?![\w])", value.replace("DASHBOARD", dashboard), text)
    return text


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "command",
    [pytest.param(c, id=name_of(c), marks=[] if QUICK in c.text else [pytest.mark.slow]) for c in PRINTED if c.key in RUN],
)
def test_the_command_does_what_the_page_says(command: Command, place: Place, request: pytest.FixtureRequest) -> None:
    how = RUN[command.key]
    if how.before:
        how.before(place)
    dashboard = request.getfixturevalue("head").removeprefix("http://") if "HEAD:8265" in command.text else ""
    typed = filled(command.text, dashboard)
    ended = place.sh(typed, SIZES + how.sizes)
    assert ended.returncode == 0, f"{typed}\n{ended.stdout[-6000:]}"
    assert re.search(how.says, ended.stdout), f"{typed}\n{ended.stdout[-6000:]}"
    assert [pattern for pattern in how.makes if not list(place.folder.glob(pattern))] == []
    assert "Traceback" not in ended.stdout, ended.stdout
    if how.again:
        again = place.sh(typed, SIZES + how.sizes)
        assert again.returncode == 0
        assert how.again in again.stdout


# --- the reader of the pages ---


def block(*lines: str) -> Block:
    return Block("page", 10, "sh", lines)


def test_commands_are_told_apart_and_keep_their_words() -> None:
    found = commands(
        block("a b=1   # why", "", "# a comment", "c \\", "    d", 'e "f: [1,', '   2]"', "for x in 1; do", "  g $x", "done")
    )
    assert [(c.line, c.key) for c in found] == [(11, "a b=1"), (14, "c d"), (16, 'e "f: [1, 2]"'), (18, "for x in 1; do g $x done")]


def test_a_block_without_an_end_and_a_command_without_one_are_found() -> None:
    with pytest.raises(AssertionError, match="page:1: the block has no end"):
        blocks("page", "```sh\na\n")
    with pytest.raises(AssertionError, match="page:11: this command does not end"):
        commands(block('a "b'))


@pytest.mark.parametrize(
    "words",
    [
        "freeguide no-such-command",
        "freeguide train configs/digits.yaml train.no_such=1",
        "freeguide train configs/none.yaml",
        "make no-such-target",
        "python benchmarks/data.py --no-such",
        "python -m trainer configs/digits.yaml data.nothing=1",
    ],
)
def test_commands_that_name_what_does_not_exist_are_found(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, SystemExit, UserError)):
        checked_words(words.split())


def test_placeholders_are_filled_as_whole_words() -> None:
    assert filled("a data.uri=DATA METADATA http://HEAD:8265", "h:1") == "a data.uri=s3://freeguide/law/data METADATA http://h:1"
