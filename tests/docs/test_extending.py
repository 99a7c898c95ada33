"""Every example of docs/extending.md runs as it is printed, by itself: in a process and a folder of its own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.printed import ROOT, Block, blocks

PAGE = "docs/extending.md"
TEXT = (ROOT / PAGE).read_text()
EXAMPLES = [block for block in blocks(PAGE, TEXT) if block.language == "python"]


def section(line: int) -> str:
    """The title of the section that a line of the page is in."""
    titles = re.findall(r"^## (.*)$", "\n".join(TEXT.splitlines()[:line]), re.MULTILINE)
    return titles[-1] if titles else ""


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: section(example.line).replace(" ", "-"))
def test_the_example_runs_by_itself(example: Block, tmp_path: Path) -> None:
    code = "\n" * example.line + "\n".join(example.lines) + "\n"  # so that a traceback has the line of the page
    place = tmp_path / Path(PAGE).name
    place.write_text(code)
    (tmp_path / "work").mkdir()
    ended = subprocess.run(
        [sys.executable, str(place)],
        cwd=tmp_path / "work",
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr


def test_each_section_has_one_example() -> None:
    assert sorted(section(example.line) for example in EXAMPLES) == sorted(re.findall(r"^## (.*)$", TEXT, re.MULTILINE))
