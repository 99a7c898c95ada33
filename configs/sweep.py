"""`evaluate.sweep`: one config becomes many."""

import itertools
import math
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf

from freeguide.configs.checks import choices, shown
from freeguide.configs.errors import ConfigError
from freeguide.configs.merge import merge
from freeguide.configs.references import literal
from freeguide.configs.schema import Config, EvaluateConfig, options

SERIES = 10_000  # of one sweep


def sweep(config: Config) -> list[Config]:
    """A config for each combination of the values in `evaluate.sweep`, the last option changing fastest; `[config]` without one.

    Raises ConfigError for options that cannot be swept and for values that do not fit their option.
    """
    axes = config.evaluate.sweep
    # The labels decide what is compared, the batch nothing but memory and rounding.
    known = ["run", *(key for key in options() if key.startswith("sampling."))]
    known = [key for key in known if key not in ("sampling.labels", "sampling.batch")]
    typed: list[list[Any]] = []
    for key, values in axes.items():
        if key not in known:
            raise ConfigError(
                f"evaluate.sweep: {key} cannot be swept, as {{sampling.steps: [8, 16]}} can; {choices('options', str(key), known)}"
            )
        if not isinstance(values, list) or not values or any(values.count(value) > 1 for value in values):
            raise ConfigError(f"evaluate.sweep: {key} is {shown(values, quoted=True)}; give a list of values, each once")
        typed.append([_typed(key, value) for value in values])
    if (count := math.prod(map(len, typed))) > SERIES:
        raise ConfigError(f"evaluate.sweep: its values make {count:,} series; name fewer, {SERIES:,} at most")
    config = replace(config, evaluate=replace(config.evaluate, sweep={}))
    return [_with(config, dict(zip(axes, values, strict=True))) for values in itertools.product(*typed)]


def _typed(key: str, value: Any) -> Any:
    """A value of the sweep as its option takes it."""
    config = OmegaConf.structured(Config)
    merge(config, {key: literal(value)}, None, "evaluate.sweep")
    found = OmegaConf.select(config, key)
    return OmegaConf.to_object(found) if OmegaConf.is_config(found) else found


def _with(config: Config, values: dict[str, Any]) -> Config:
    of_sampling = {key.removeprefix("sampling."): value for key, value in values.items() if key != "run"}
    return replace(config, sampling=replace(config.sampling, **of_sampling), **{k: v for k, v in values.items() if k == "run"})


def screen_images(options: EvaluateConfig) -> int:
    """Images per w of the first look: whole units, so that they are the first of the full run. 0 without one."""
    wanted = options.images / 10 if options.screen < 0 else options.screen
    images = -int(-wanted // options.unit) * options.unit
    return images if 0 < images < options.images else 0
