"""How far a command has come, as its user reads it."""

import re

import pytest

from freeguide.cluster.runtime.progress import progress


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
    monkeypatch.setattr("freeguide.cluster.runtime.progress.time.monotonic", lambda: float(next(ticks)) + 1000)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert list(progress(range(total), total, "unit", at_once)) == list(range(total))
    printed = re.split(r"[\r\n]", capsys.readouterr().out)[:-1]
    assert printed == [f"unit {i}/{total}" + (f"  eta {eta}" if eta else "") for i, eta in enumerate(etas, start=1)]
