"""What a config has to hold: of each option what the schema says of it.

A check is whether something holds, and the sentence for when it does not. What options ask of each other is said by the room that
reads them, in a `checks.py` of its own: its `contradictions` begin with those of the rooms before it. A command hands those of the
last room it uses to `load_config`. No check computes or allocates anything.
"""

import difflib
import functools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from freeguide.configs.schema import Config, Length, Pattern, Range, options
from freeguide.configs.secrets import masked_values

Checks = Iterator[tuple[bool, str]]  # what has to hold, and the sentence for when it does not; later ones rely on earlier ones
Contradictions = Callable[[Config, str], Checks]  # what a room asks of a config for a command


def no_contradictions(config: Config, command: str) -> Checks:
    """Of a config that no room has been asked about."""
    yield from ()


def checks(config: Config) -> Checks:
    """What the schema says of the value of every option."""
    for key, kind in options().items():
        if not is_dataclass(kind):
            value = value_of(config, key)
            yield from _fits(key, kind, value, shown(config.written[key][0] if key in config.written else value))


def _fits(key: str, kind: Any, value: Any, whole: str, each: str = "") -> Checks:
    """Whether the value of an option, shown as `whole`, is what the schema says of its type; or `each` of the values in it."""
    marks: tuple[Any, ...] = ()
    if get_origin(kind) is Annotated:
        kind, marks = kind.__origin__, kind.__metadata__
    for mark in marks:
        if isinstance(mark, Range):
            yield _within(mark, value), f"{key}={whole}: {each}must be {_numbers(mark, kind)}"
        elif isinstance(mark, Pattern):
            yield re.fullmatch(mark.expression, value) is not None, f"{key}={whole}: {mark.words}"
        elif isinstance(mark, Length):
            yield mark.least <= len(value) <= mark.most, f"{key}={whole}: must hold {_lengths(mark)}"
    if get_origin(kind) is Literal:
        yield value in get_args(kind), f"{key}={whole}: {choices('values', str(value), [str(v) for v in get_args(kind)])}"
    elif isinstance(value, list | dict):
        kinds = get_args(kind) or (Any,)
        for part in value.values() if isinstance(value, dict) else value:
            yield from _fits(key, kinds[-1], part, whole, "each ")
    elif isinstance(value, int | float) and not marks:  # in a mapping that is handed on
        yield abs(value) < 2**64, f"{key}={whole}: its numbers must be finite and below 2**64"


def _within(range_: Range, value: float) -> bool:
    if value == range_.also:
        return True
    low = range_.least < value if range_.open in ("least", "both") else range_.least <= value
    return low and (value < range_.most if range_.open in ("most", "both") else value <= range_.most)


def _numbers(range_: Range, kind: Any) -> str:
    """What a range is in words."""
    low = "above" if range_.open in ("least", "both") else "from"
    high = {"": "to", "most": "to below", "least": "and up to", "both": "and below"}[range_.open]
    also = "" if range_.also is None else f", or {range_.also:g}"
    name = "a whole number" if kind is int else "a number"
    return f"{name} {low} {_figure(range_.least)} {high} {_figure(range_.most)}{also}"


def _figure(number: float) -> str:
    return f"{number:,}" if number < 2**53 else f"2**{math.log2(number + 1):g} - 1"


def _lengths(length: Length) -> str:
    return f"{length.least} values" if length.least == length.most else f"{length.least} to {length.most} values"


def shown(value: Any, quoted: bool = False) -> str:
    """A value in a sentence: without secrets, on one line, and not longer than one reads; a text in quotes if it is `quoted`."""
    try:
        text = " ".join((repr if quoted else str)(masked_values(value)).split())
    except ValueError:  # Python writes no number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 300 else f"{text[:60]}...{text[-20:]}"


def value_of(config: Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def choices(what: str, wrong: str, right: list[str]) -> str:
    """The nearest of the right names, or all of them where none is near."""
    if near := nearest(wrong, right):
        return f"did you mean {near}?"
    listed = ", ".join(right if len(right) <= 16 else [r for r in right if "." not in r]) or "none"
    return f"the {what} are: {listed}"


def nearest(wrong: str, right: list[str]) -> str:
    """The right name that `wrong` was meant to be, "" where none is near."""
    by_last_part = {name.rsplit(".", 1)[-1]: name for name in reversed(right)}
    near = difflib.get_close_matches(wrong, right, n=1, cutoff=0.6)
    near = near or [by_last_part[n] for n in difflib.get_close_matches(wrong.rsplit(".", 1)[-1], by_last_part, n=1, cutoff=0.75)]
    return near[0] if near else ""
