"""What README.md and docs/*.md print: their fenced blocks, and the commands in them.

A block says by its language what it holds: `sh` is commands to type, `text` what a program prints, `yaml` a part of a config,
`python` code that a test runs.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
LANGUAGES = ("sh", "text", "yaml", "python", "mermaid")


@dataclass(frozen=True)
class Block:
    """A fenced block: the page, the line of its fence, its language, and its lines."""

    page: str
    line: int
    language: str
    lines: tuple[str, ...]


@dataclass(frozen=True)
class Command:
    """A command as it is printed, without its comment, and where."""

    page: str
    line: int
    text: str

    @property
    def key(self) -> str:
        """The command on one line with single spaces: how the tables of test_docs.py name it."""
        return " ".join(self.text.replace("\\\n", " ").split())


def blocks(page: str, text: str) -> list[Block]:
    found: list[Block] = []
    fence, language, lines, began = "", "", [], 0
    for number, line in enumerate(text.splitlines(), start=1):
        mark = re.match(r"\s*(```+|~~~+)(.*)", line)
        if not fence and mark:
            fence, language, lines, began = mark[1], mark[2].strip(), [], number
        elif fence and line.strip() == fence:
            found.append(Block(page, began, language, tuple(lines)))
            fence = ""
        elif fence:
            lines.append(line)
    assert not fence, f"{page}:{began}: the block has no end"
    return found


def commands(block: Block) -> list[Command]:
    """The commands of a block of sh: a line each, or several where a quotation, a backslash or a loop goes on."""
    found: list[Command] = []
    text, began = "", block.line + 1
    for number, line in enumerate(block.lines, start=block.line + 1):
        text, began = (f"{text}\n{_bare(line)}", began) if text else (_bare(line), number)
        if _whole(text):
            if text.strip():
                found.append(Command(block.page, began, text))
            text = ""
    assert not text, f"{block.page}:{began}: this command does not end: {text}"
    return found


def printed() -> list[Command]:
    """Every command, in the order of the pages and on each from above."""
    every = [block for page in PAGES for block in blocks(page, (ROOT / page).read_text())]
    return [command for block in every if block.language == "sh" for command in commands(block)]


def spans(page: str) -> list[str]:
    """What stands between backticks in the prose of a page."""
    prose = re.sub(r"(?ms)^\s*```.*?^\s*```\s*$", "", (ROOT / page).read_text())
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def _bare(line: str) -> str:
    return re.sub(r"(^|\s+)#\s.*$", "", line).rstrip()


def _whole(text: str) -> bool:
    if text.endswith("\\"):
        return False
    try:
        words = [word.rstrip(";") for word in shlex.split(text)]
    except ValueError:  # a quotation goes on
        return False
    return words.count("for") == words.count("done")
