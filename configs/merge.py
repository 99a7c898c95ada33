"""What a YAML file and `key=value` say is set in a config, value by value, as the schema's types take it.

Unknown keys are refused before anything is merged, so that the message can name the file or the argument that holds them and
the nearest key that exists.
"""

import functools
import re
import warnings
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from freeguide.configs.checks import choices, shown
from freeguide.configs.errors import ConfigError
from freeguide.configs.schema import RENAMED, options

# What reading, converting and resolving values raise; ValueError and OverflowError come of numbers with thousands of digits.
UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError, OverflowError)


def document(path: Path) -> tuple[Any, Any]:
    """What a YAML file says, and the same with every value as the text that it is. Raises ConfigError."""
    try:
        document = OmegaConf.load(path)
        plain = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    except RecursionError as error:
        raise ConfigError(f"{path}: not a config: it is nested too deeply") from error
    except UNREADABLE as error:
        raise ConfigError(f"{path}: not valid YAML: {_why(error)}") from error
    except OSError as error:  # OmegaConf raises one, too, for a document that is a number
        reason = error.strerror or "a config is a mapping of keys to values, this file holds a single value"
        raise ConfigError(f"{path}: {reason}") from error
    if isinstance(plain, str) and plain:  # which OmegaConf takes for a key
        raise ConfigError(
            f"{path}: a config is a mapping of keys to values, this file holds a text: {shown(plain[:40], quoted=True)}"
        )
    if not isinstance(document, DictConfig):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, this file holds a list")
    return OmegaConf.to_container(document), plain


def _why(error: Exception) -> str:
    """What is wrong with a text that is no YAML, and where."""
    if isinstance(error, UnicodeDecodeError):
        return f"its byte {error.start} is no text in UTF-8"
    mark = getattr(error, "problem_mark", None)
    return (
        shown(error)
        if mark is None
        else f"line {mark.line + 1}, column {mark.column + 1}: {shown(getattr(error, 'problem', error))}"
    )


def override_with(merged: DictConfig, override: str) -> None:
    """Set what `key=value` says. Raises ConfigError."""
    key, equals, text = override.partition("=")
    where = f"argument {shown(override, quoted=True)}"
    if not equals or not key.strip():
        raise ConfigError(f"{where}: an override has the form key=value, without spaces, for example train.lr=1e-4")
    try:
        nested = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        plain = yaml.load(text, yaml.BaseLoader)
    except (*UNREADABLE, RecursionError) as error:
        raise ConfigError(f"{where}: not a value in YAML ({_why(error)}); quote one with spaces: 'evaluate.w=[0, 1]'") from error
    plain = functools.reduce(lambda inside, name: {name: inside}, reversed(key.split(".")), plain)
    merge(merged, nested, plain, where, into=key not in options())


def merge(config: DictConfig, nested: Any, plain: Any, where: str, into: bool = False) -> None:
    """Set every leaf of `nested` in `config`, refusing keys and values that the schema does not know.

    `plain` is the same tree, whose values are the texts that were written. With `into`, mappings are added to, not replaced.
    """
    known = options()
    for key, value, text in _leaves(nested, plain, known):
        if key in RENAMED:
            warnings.warn(f"{where}: {key} is now called {RENAMED[key]}", stacklevel=2)
            key = RENAMED[key]
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key}; {choices('keys', key, list(known))}")
        kind = known[key]
        if is_dataclass(kind):
            raise ConfigError(f"{where}: {key} is a group of options, not a value; set for example {_example(key, known)}")
        try:
            OmegaConf.update(config, key, _meant(kind, value, text), merge=into)
        except UNREADABLE as error:
            if value is None:
                raise ConfigError(f"{where}: {key} has no value; it takes {type_name(kind)}") from error
            if get_origin(kind) is Literal:
                right = [str(word) for word in get_args(kind)]
                raise ConfigError(f"{where}: {key}={shown(value)}: {choices('values', str(value), right)}") from error
            said = text if isinstance(text, str) and not isinstance(value, str) else value
            write = f"; write {key}=[{shown(said)}]" if _is_list(kind) and not isinstance(value, dict | list) else ""
            quoted = isinstance(value, str)
            raise ConfigError(f"{where}: {key} takes {type_name(kind)}, not {shown(said, quoted)}{write}") from error


def _leaves(nested: Any, plain: Any, known: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name, value in nested.items():
        key, text = f"{prefix}{name}", plain.get(str(name)) if isinstance(plain, dict) else None
        if isinstance(value, dict) and (key not in known or is_dataclass(known[key])):
            yield from _leaves(value, text, known, f"{key}.")
        elif value is not None or not is_dataclass(known.get(key)):  # `data:` with nothing under it is an empty group
            yield key, value, text


def _meant(kind: Any, value: Any, text: Any) -> Any:
    """A value for an option of the type `kind`, by what stands there as `text`: YAML would have `on` be true, 1e3 1000.0, 010 8.

    Raises ValueError for what nobody means.
    """
    kind = _bare(kind)
    if get_origin(kind) in (list, dict):
        inner = get_args(kind)[-1]
        if isinstance(value, list) and isinstance(text, list) and len(value) == len(text):
            return [_meant(inner, each, one) for each, one in zip(value, text, strict=True)]
        if isinstance(value, dict) and isinstance(text, dict):
            return {name: _meant(inner, each, text.get(str(name))) for name, each in value.items()}
    elif kind is str and not isinstance(value, str | dict | list):
        return "" if value is None else text if isinstance(text, str) else value
    elif (kind is bool and type(value) is int and value not in (0, 1)) or (
        kind in (int, float) and isinstance(text, str) and re.fullmatch(r"[-+]?0\d+|[^{}]*:[^{}]*", text)
    ):
        raise ValueError
    return value


def _is_list(kind: Any) -> bool:
    return get_origin(_bare(kind)) is list


def _example(group: str, known: dict[str, Any]) -> str:
    return next(key for key in known if key.startswith(f"{group}.")) + "=..."


def type_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    many = {int: "whole numbers", float: "numbers", str: "texts"}
    kind = _bare(kind)
    inner = [many.get(_bare(part), "values") for part in get_args(kind)]
    if get_origin(kind) is list:
        return f"a list of {inner[0]}"
    if get_origin(kind) is dict and _bare(get_args(kind)[1]) in many:
        return f"a mapping of names to {inner[1]}"
    return names.get(kind, "a mapping of keys to values")


def _bare(kind: Any) -> Any:
    return kind.__origin__ if get_origin(kind) is Annotated else kind
