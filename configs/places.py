"""The locations that a config names: every `Uri` of the schema, and the runs of `evaluate.sweep`."""

from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from freeguide.configs.errors import ConfigError, StoreError
from freeguide.configs.locations import locate
from freeguide.configs.schema import LOCATION, Config


def locations(config: Config) -> Iterator[tuple[str, str]]:
    """Every location that `config` names, with its key: ("data.uri", "s3://bucket/prefix"). Absolute after `load_config`."""
    found: list[tuple[str, str]] = []

    def note(key: str, uri: str) -> str:
        found.append((key, uri))
        return uri

    placed(config, note)
    yield from found


def absolute(key: str, uri: str) -> str:
    try:
        place = locate(uri)
    except StoreError as error:
        raise ConfigError(f"{key}: {error}") from error
    if place.bucket and key == "data.disk_cache":
        raise ConfigError(f"{key}={uri}: the cache is a folder on each node's own disk; give its path")
    return place.uri


def placed(config: Config, change: Callable[[str, str], str]) -> Config:
    """`config` with `change(key, location)` for each of its locations. Raises ConfigError where two of a mapping become one."""
    config = replace(config, **_changed_fields(config, "", change))
    axes = dict(config.evaluate.sweep)
    if isinstance(axes.get("run"), list):  # the only location among the options that can be swept
        axes["run"] = [change("evaluate.sweep", run) if isinstance(run, str) else run for run in axes["run"]]
    return replace(config, evaluate=replace(config.evaluate, sweep=axes))


def _changed_fields(group: Any, prefix: str, change: Callable[[str, str], str]) -> dict[str, Any]:
    types, changed = get_type_hints(type(group), include_extras=True), {}
    for option in fields(group):
        value = getattr(group, option.name)
        if value != "" or option.default != "":  # an optional one that is not given
            changed[option.name] = _changed(value, types[option.name], f"{prefix}{option.name}", change)
    return changed


def _changed(value: Any, kind: Any, key: str, change: Callable[[str, str], str]) -> Any:
    """`value` of the type `kind` with every location in it changed."""
    if is_dataclass(kind):
        return replace(value, **_changed_fields(value, f"{key}.", change))
    if get_origin(kind) is Annotated:
        return change(key, value) if LOCATION in kind.__metadata__ else value
    if get_origin(kind) is list:
        return [_changed(each, get_args(kind)[0], key, change) for each in value]
    if get_origin(kind) is dict:
        names, values = get_args(kind)
        changed = {_changed(name, names, key, change): _changed(each, values, key, change) for name, each in value.items()}
        if len(changed) < len(value):
            raise ConfigError(f"{key}={value}: names one place twice; name each once")
        return changed
    return value
