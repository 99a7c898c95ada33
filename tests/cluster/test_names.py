"""What numbers are called: after the code that decides them, found in the source, and after nothing else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from freeguide.cluster.evaluation import units, yardstick
from freeguide.cluster.jobs import generate
from freeguide.cluster.runtime.submit import copy_package
from freeguide.data_pipeline import closure
from freeguide.data_pipeline.closure import HARMLESS, code_version, reached

ROOT = Path(__file__).parents[2]
ENTRIES = {
    "units": units.MAKING,
    "rows": units.MEASURING,
    "references": yardstick.SEEING,
    "evaluators": yardstick.FITTING,
    "sets": generate.MAKING,
}
SAMPLED = {"units", "sets"}
READ = {"references", "evaluators"}


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tree")
    for room in closure.ROOMS:
        shutil.copytree(ROOT / room, root / room, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def names(root: Path) -> dict[str, str]:
    return {kind: code_version.__wrapped__(entry, root=root) for kind, entry in ENTRIES.items()}


@pytest.fixture(scope="module")
def before(copied: Path) -> dict[str, str]:
    return names(copied)


def changed(root: Path, before: dict[str, str], place: str, old: str, new: str) -> set[str]:
    """The kinds of names that change with one edit."""
    path = root / place
    text = path.read_text()
    assert old in text, f"{place} holds no {old!r}: name another line"
    path.write_text(text.replace(old, new))
    try:
        return {kind for kind, name in names(root).items() if name != before[kind]}
    finally:
        path.write_text(text)


@pytest.mark.parametrize(
    ("place", "old", "new", "kinds"),
    [
        ("data_pipeline/decode.py", "def decode_sample(", "@id\ndef decode_sample(", READ),
        ("data_pipeline/decode.py", "MAX_PIXELS = ", "MAX_PIXELS = 7 + ", READ),
        (
            "data_pipeline/scan.py",
            "range(0, len(manifest.shards), every)",
            "range(0, len(manifest.shards), every)[::-1]",
            {"references", "evaluators"},
        ),
        ("data_pipeline/tar.py", "def samples(", "@list\ndef samples(", {"references", "evaluators", "sets"}),
        (
            "trainer/networks/kernels.py",
            "cudnn.allow_tf32 = False",
            "cudnn.allow_tf32 = True",
            {"units", "rows", "sets", "references", "evaluators"},  # rows, as `Sampler` is used whole
        ),
        ("trainer/sampler.py", "index % config.data.classes", "(index + 1) % config.data.classes", SAMPLED),
        ("trainer/sampler.py", "config.data.classes >> 32", "config.data.classes >> 31", SAMPLED),
        ("cluster/evaluation/units.py", "for w in sorted(weights)", "for w in weights", {"rows"}),
        (
            "cluster/evaluation/series.py",
            "torch.arange(item.first, item.last)",
            "torch.arange(item.first, item.last).flip(0)",
            {"units"},
        ),
        (
            "cluster/jobs/generate.py",
            "torch.arange(unit.first, unit.last)",
            "torch.arange(unit.first, unit.last).flip(0)",
            {"sets"},
        ),
        ("trainer/diffusion/samplers.py", "def heun(", "@staticmethod\ndef heun(", SAMPLED | {"rows"}),
        ("trainer/diffusion/randomness.py", "_MAX_STREAM = ", "_MAX_STREAM = 1 + ", SAMPLED | {"rows"}),
        ("trainer/networks/layers.py", "class GroupNorm(", "@id\nclass GroupNorm(", SAMPLED | {"rows"}),
        ("trainer/checkpoints/profiles.py", "def reconstruction(", "@id\ndef reconstruction(", SAMPLED | {"rows"}),
        ("trainer/rounding.py", "def to_uint8(", "@id\ndef to_uint8(", SAMPLED),
        ("cluster/evaluation/extractors/inception.py", "(x - 128.0) / 128.0", "(x - 127.5) / 127.5", {"units"}),
        ("cluster/evaluation/extractors/evaluator.py", "PEAK_LR = 3e-3", "PEAK_LR = 4e-3", {"evaluators"}),
        ("cluster/evaluation/extractors/evaluator.py", "/ 127.5 - 1.0", "/ 128.0 - 1.0", {"units", "evaluators"}),
        ("cluster/evaluation/extractors/evaluator.py", "np.rot90(images, turns", "np.rot90(images, turns + 1", {"evaluators"}),
        ("cluster/evaluation/reference.py", "KEPT = 10_000", "KEPT = 9_000", {"references"}),
        ("cluster/evaluation/statistics/moments.py", "BLOCK = 4096", "BLOCK = 2048", {"rows", "references"}),
        ("cluster/evaluation/statistics/fid.py", "def fid_spread(", "@id\ndef fid_spread(", {"rows"}),
        ("cluster/evaluation/metrics.py", "POINTS = 15", "POINTS = 14", {"rows"}),
        ("cluster/evaluation/yardstick.py", "PIXELS = 4 * 2**30", "PIXELS = 2 * 2**30", {"evaluators"}),
    ],
)
def test_every_edit_that_decides_a_number_changes_its_name(
    copied: Path, before: dict[str, str], place: str, old: str, new: str, kinds: set[str]
) -> None:
    """At least these: more may follow from a class that is used whole."""
    found = changed(copied, before, place, old, new)
    assert kinds <= found
    if "metrics" not in place:
        assert kinds == found


HARMLESS_FILES = [
    *(
        "cluster/evaluation/report/tables.py",
        "cluster/cli.py",
        "cluster/evaluation/report/page.py",
        "cluster/evaluation/report/figures.py",
        "cluster/jobs/train.py",
        "cluster/jobs/demo.py",
    ),
    *("cluster/evaluation/published.py", "cluster/evaluation/frontier.py", "cluster/jobs/score.py", "cluster/jobs/inspect.py"),
    *(
        "trainer/training/telemetry.py",
        "trainer/training/loop.py",
        "trainer/training/writer.py",
        "trainer/diffusion/theory.py",
        "cluster/evaluation/report/figure_2.py",
        "data_pipeline/order.py",
    ),
    *(
        "data_pipeline/sources/open.py",
        "data_pipeline/sources/folder.py",
        "data_pipeline/sources/shuffle.py",
        "data_pipeline/store/cache.py",
        "data_pipeline/store/open.py",
        "data_pipeline/store/s3.py",
        "configs/load.py",
        "configs/stored.py",
        "trainer/checks.py",
        "configs/errors.py",
    ),
]


def test_what_decides_no_number_changes_no_name(copied: Path, before: dict[str, str]) -> None:
    """These files may say whatever they like, but for the one constant of the order that a checkpoint's identity has."""
    texts = {place: (copied / place).read_text() for place in HARMLESS_FILES}
    for place, text in texts.items():
        kept = [line for line in text.splitlines() if line.startswith("FIRST_ROUNDS")]
        (copied / place).write_text("\n".join([*kept, "def anything(): return 1"]))
    try:
        assert names(copied) == before
    finally:
        for place, text in texts.items():
            (copied / place).write_text(text)


def test_comments_layout_docstrings_and_words_change_no_name(copied: Path, before: dict[str, str]) -> None:
    place = "cluster/evaluation/statistics/moments.py"
    for old, new in (
        ('    """The sum of the units,', '    # more\n\n    """What the units are together,'),
        ("not finite; look at that image", "NaN; look there"),
        ("iterator = iter(units)", "iterator = iter(\n        units  # all of them\n    )"),
    ):
        assert changed(copied, before, place, old, new) == set()
    assert changed(copied, before, place, "iterator = iter(units)", "iterator = iter(units[::-1])") == {"rows", "references"}


def test_the_walk_follows_modules_functions_aliases_and_imports_inside_functions(tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "cluster").mkdir()
    a = "import math\nfrom freeguide.trainer import b as other\nimport freeguide.trainer.c\n"
    a += "def f():\n return other.g() + freeguide.trainer.c.K\ndef no(): pass"
    b = "from freeguide.trainer.d import h as again\n"
    b += "def g():\n from freeguide.cluster.e import late\n return again, late\ndef no(): pass"
    files = {
        **{"trainer/__init__.py": "", "cluster/__init__.py": "", "trainer/a.py": a, "trainer/b.py": b},
        "trainer/c.py": "K = 1\nTABLE = {}\nTABLE['x'] = K\n",
        "trainer/d.py": "class h:\n    x = 1\n\n\nprint('said')\n",
        "cluster/e.py": "from freeguide.trainer.b import again as late\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = {place for place in reached("freeguide.trainer.a:f", root=tmp_path) if "(" not in place}
    assert found == {f"freeguide.trainer.{each}" for each in ("a:f", "b:g", "c:K", "d:h")}
    with pytest.raises(LookupError, match=r"there is no freeguide\.trainer"):
        reached("freeguide.trainer.a:nothing", root=tmp_path)


def test_the_ends_of_the_walk_exist() -> None:
    for module, why in HARMLESS.items():
        place = ROOT / module.removeprefix("freeguide.").replace(".", "/")
        assert place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()
        assert len(why) > 10


def test_names_are_the_same_from_another_folder_and_process_and_as_a_wheel_lays_the_rooms(copied: Path, tmp_path: Path) -> None:
    shutil.copytree(ROOT / "freeguide", copied / "freeguide")
    copy_package(tmp_path)  # also what Ray unpacks on the nodes of a cluster
    code = "import sys; from freeguide.data_pipeline.closure import code_version; print(*map(code_version, sys.argv[1:]))"
    for place in (copied, tmp_path):
        command = [sys.executable, "-c", code, *ENTRIES.values()]
        ended = subprocess.run(
            command, cwd=place, capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": str(place)}
        )
        assert ended.stdout.split() == [code_version(entry) for entry in ENTRIES.values()]
    assert units.code_version().split("+")[1] == code_version(units.MAKING, units.MEASURING)
