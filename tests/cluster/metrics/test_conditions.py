"""Every option of the schema counts, unless it is named harmless with a reason."""

import dataclasses
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from freeguide.cluster.evaluation.conditions import HARMLESS, sampled, trained
from freeguide.configs.load import load_config
from freeguide.configs.schema import Config, options

DIGITS = Path(__file__).parents[3] / "configs" / "digits.yaml"
LEAVES = [key for key, kind in options().items() if not dataclasses.is_dataclass(kind)]


def other(value: Any, kind: Any) -> Any:
    """Another value of the same type."""
    if get_origin(kind) is Literal:
        return next(word for word in get_args(kind) if word != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}x"
    return {**value, "more": "1"} if isinstance(value, dict) else [*value, 1]


def changed(config: Config, key: str) -> Config:
    group, _, name = key.partition(".")
    inner = getattr(config, group)
    return dataclasses.replace(config, **{group: dataclasses.replace(inner, **{name: other(getattr(inner, name), options()[key])})})


def said(config: Config) -> tuple[str, dict[str, Any]]:
    return trained(config), sampled(config)


@pytest.mark.parametrize("key", [key for key in LEAVES if key not in HARMLESS])
def test_an_option_that_is_not_named_harmless_is_a_condition(key: str) -> None:
    """A network of either kind reads it; the training's options count in what was trained, the sampling's in units."""
    counts = []
    for network in ("adm", "dit"):
        config = load_config(DIGITS, [f"model.network={network}"]) if network == "adm" else load_config(DIGITS)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, network=network))
        before, after = said(config), said(changed(config, key))
        counts.append((before[0] != after[0], before[1] != after[1]))
    in_training, in_units = (any(found) for found in zip(*counts, strict=True))
    group = key.split(".")[0]
    assert in_training == (group in ("data", "model", "diffusion", "train", "cluster"))
    assert in_units == (group in ("data", "model", "diffusion", "sampling", "evaluate", "cluster"))


def test_flips_and_what_is_handed_to_deepspeed_are_conditions_and_the_harmless_ones_are_not() -> None:
    config = load_config(DIGITS)
    for key in ("data.flip", "train.deepspeed", "train.compile", "train.bad_steps", "cluster.env"):
        assert trained(changed(config, key)) != trained(config)
    for key in HARMLESS:
        if "." in key:
            assert said(changed(config, key)) == said(config)


def test_what_is_named_harmless_exists_and_has_a_reason() -> None:
    assert set(HARMLESS) <= set(LEAVES)
    assert all(len(reason.split()) >= 3 for reason in HARMLESS.values())


def test_values_of_the_environment_are_in_no_condition_as_they_are() -> None:
    config = load_config(DIGITS, ["cluster.env.TOKEN=hunter2hunter2"])
    assert "hunter2" not in str(sampled(config))


def test_an_option_that_was_renamed_leaves_the_name_of_what_was_trained() -> None:
    assert (trained(load_config("digits")), trained(load_config("imagenet64"))) == ("940cfcea7648", "0ce6148f4547")
