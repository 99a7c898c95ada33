"""What docs/architecture.md names is there: rooms, files, tests."""

import re

from tests.docs.printed import ROOT
from tests.test_house import HOMES, PARTS, ROOMS

TEXT = (ROOT / "docs/architecture.md").read_text()


def test_every_room_has_its_line() -> None:
    named = {
        name.rstrip("/").replace("/", ".").removesuffix(".py") for name in re.findall(r"`((?:[a-z_]+/)+(?:[a-z_]+\.py)?)`", TEXT)
    }
    parts = {part for room in PARTS.values() for part in room if not part.endswith(("__main__", ".cli"))}
    assert (set(ROOMS) - {"trainer", "cluster"}) | parts <= named


def test_every_home_of_a_heavy_dependency_is_said() -> None:
    lines = [line for line in TEXT.splitlines() if line.startswith("| `")]
    for name, homes in HOMES.items():
        spelled = {"boto3": "boto3", "botocore": "boto3", "ray": "Ray"}.get(name, name)
        for home in homes:
            room = home if home.endswith("/") else f"{home.rpartition('/')[0]}/"
            line = next(line for line in lines if line.startswith(f"| `{room}`") or room.startswith(line.split("`")[1]))
            assert spelled.lower() in line.lower(), (name, line)


def test_every_file_and_test_that_is_named_is_there() -> None:
    tests = re.findall(r"`(tests/[\w/]+\.py)(?:::(test_\w+))?`", TEXT)
    assert len(tests) > 10
    for file, name in tests:
        assert (ROOT / file).is_file(), file
        assert not name or f"def {name}(" in (ROOT / file).read_text(), name
    sources = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    for file in re.findall(r"`((?!tests/)[\w/]+\.py)`", TEXT):
        assert [path for path in sources if path.as_posix().endswith(f"/{file}")], file
