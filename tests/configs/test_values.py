"""What every option may be: refused in one sentence before anything is computed or allocated."""

import math
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest

from freeguide.cluster.runtime.checks import contradictions
from freeguide.configs import load
from freeguide.configs.errors import ConfigError
from freeguide.configs.schema import Config, Length, Range, options

load_config = partial(load.load_config, contradictions=contradictions)  # as the commands ask all rooms

# Mappings that are handed on, or whose values are those of other options.
FREE = {"train.deepspeed", "evaluate.sweep", "cluster.env"}
LEAVES = {key: kind for key, kind in options().items() if not is_dataclass(kind)}
ABSURD = [".nan", ".inf", "-.inf", "1e300", "-1000000000000", "9" * 400]


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.yaml"
    path.write_text("name: a\nrun: /tmp/run\ndata: {uri: /tmp/data}\n")
    return path


def numbers(kind: Any, ranges: tuple[Range, ...] = ()) -> Iterator[tuple[type, tuple[Range, ...]]]:
    """Every number in a type, with the ranges that stand at it."""
    if get_origin(kind) is Annotated:
        yield from numbers(kind.__origin__, tuple(mark for mark in kind.__metadata__ if isinstance(mark, Range)))
    elif kind in (int, float):
        yield kind, ranges
    elif get_origin(kind) is not Literal:
        for part in get_args(kind):
            yield from numbers(part)


NUMERIC = {key: next(found) for key, kind in LEAVES.items() if (found := list(numbers(kind))) and (found := iter(found))}


def test_every_number_of_the_schema_has_its_range() -> None:
    without = [key for key, kind in LEAVES.items() for _, ranges in numbers(kind) if len(ranges) != 1]
    assert without == []
    assert len(NUMERIC) > 60


def test_every_default_lies_in_its_range_and_every_range_is_finite() -> None:
    for _, (range_,) in NUMERIC.values():
        assert math.isfinite(range_.least)
        assert range_.least < range_.most < math.inf


def written(key: str, number: str) -> str:
    """`number` where a number of the option stands."""
    kind = LEAVES[key].__origin__ if get_origin(LEAVES[key]) is Annotated else LEAVES[key]
    lengths = [mark for mark in getattr(LEAVES[key], "__metadata__", ()) if isinstance(mark, Length)]
    if get_origin(kind) is list:
        return f"{key}=[{', '.join([number] * max(1, *(length.least for length in lengths)))}]"
    return f"{key}={{a: {number}}}" if get_origin(kind) is dict else f"{key}={number}"


@pytest.mark.parametrize("key", NUMERIC)
def test_no_number_may_be_absurd(minimal: Path, key: str) -> None:
    kind, (range_,) = NUMERIC[key]
    # The ends that do not belong, and what lies just beyond those that do.
    step = 1 if kind is int else max(abs(range_.most), 1) * 1e-9
    low = range_.least if range_.open in ("least", "both") else range_.least - step
    high = range_.most if range_.open in ("most", "both") else range_.most + step
    beyond = [repr(kind(end)) for end in (low, high) if end != range_.also]
    for number in [*ABSURD, *beyond]:
        with pytest.raises(ConfigError) as caught:
            load_config(minimal, [written(key, number)])
        sentence = str(caught.value)
        assert key in sentence, sentence
        assert "\n" not in sentence
        assert len(sentence) < 500


@pytest.mark.parametrize(
    "key", [key for key, kind in LEAVES.items() if any(isinstance(m, Length) for m in getattr(kind, "__metadata__", ()))]
)
def test_no_list_may_be_too_long_or_too_short(minimal: Path, key: str) -> None:
    (length,) = [mark for mark in LEAVES[key].__metadata__ if isinstance(mark, Length)]
    for count in {max(0, length.least - 1), length.most + 1} - {length.least}:
        with pytest.raises(ConfigError, match=rf"{key}=.*: must hold {length.least}"):
            load_config(minimal, [f"{key}=[{', '.join(['1'] * count)}]"])


@pytest.mark.parametrize("key", FREE - {"cluster.env", "evaluate.sweep"})
def test_numbers_of_free_mappings_are_finite(minimal: Path, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key}=.*: its numbers must be finite"):
        load_config(minimal, [f"{key}={{a: {{b: [1, .inf]}}}}"])


@pytest.mark.parametrize(
    "sweep",
    [
        "sampling.steps: [8, 0]",
        "sampling.steps: [1000000000000]",
        "sampling.v: [.nan]",
        "sampling.v: [0.1, 2]",
        "sampling.interval: [[-.inf, 3]]",
        "sampling.seed: [-1]",
        "sampling.sampler: [dddim]",
        "sampling.ema: [best]",
        "sampling.checkpoint: [many]",
        "run: ['s3:/x']",
        "sampling.seed: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], sampling.steps: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], "
        "sampling.v: [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1], sampling.checkpoint: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]",
    ],
)
def test_values_of_a_sweep_are_refused_like_those_of_their_options(minimal: Path, sweep: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(minimal, [f"evaluate.sweep={{{sweep}}}"], "evaluate")
    assert "\n" not in str(caught.value)


def test_a_number_that_python_does_not_write_is_refused(minimal: Path) -> None:
    for override in (f"seed={'9' * 5000}", f"train.lr={'9' * 5000}", "train.deepspeed={a: 0x" + "f" * 5000 + "}"):
        with pytest.raises(ConfigError) as caught:
            load_config(minimal, [override])
        assert len(str(caught.value)) < 500
    minimal.write_text(minimal.read_text() + f"seed: {'9' * 5000}\n")
    with pytest.raises(ConfigError, match=r"minimal\.yaml"):
        load_config(minimal)


@pytest.mark.parametrize(("group", "images"), [("evaluate", 10**7), ("generate", 10**8)])
def test_a_job_has_no_more_units_than_a_driver_can_hold(minimal: Path, group: str, images: int) -> None:
    with pytest.raises(ConfigError, match=rf"{group}\.images={images} in units of {group}\.unit=1 are .* work units"):
        load_config(minimal, [f"{group}.images={images}", f"{group}.unit=1"])


def test_words_stand_in_the_schema_and_nowhere_else(minimal: Path) -> None:
    words = {key: get_args(kind) for key, kind in LEAVES.items() if get_origin(kind) is Literal}
    assert len(words) > 12
    for key, right in words.items():
        with pytest.raises(ConfigError, match=f"{key}=nonsense: the values are: {', '.join(map(str, right))}$"):
            load_config(minimal, [f"{key}=nonsense"])


def test_zero_keeps_its_meaning_where_it_has_one(minimal: Path) -> None:
    zero = [
        "micro_batch",
        "warmup_steps",
        "weight_decay",
        "grad_clip",
        "sample_every",
        "keep_every",
        "bad_steps",
        "watchdog_seconds",
    ]
    config = load_config(minimal, [*(f"train.{name}=0" for name in zero), "evaluate.screen=-1", "cluster.max_failures=-1"])
    assert isinstance(config, Config)
