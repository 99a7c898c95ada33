"""`${...}` in a config: it is resolved in what the user typed, and nowhere else, as a stored config is data.

What is shown or stored of a text is how it was written, so that a secret that stands in an environment variable stays there;
numbers and words of the schema are resolved, as a run cannot be read without them.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass, replace
from typing import Any, Literal, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from freeguide.configs.checks import shown, value_of
from freeguide.configs.errors import ConfigError
from freeguide.configs.merge import UNREADABLE, type_name
from freeguide.configs.schema import Config, options

_REFERENCE = re.compile(r"(\\*)\$\{")


def resolved(merged: DictConfig, where: str) -> Config:
    """The config in which every `${...}` has its value, and `written` says what stood there. Raises ConfigError."""
    tree = OmegaConf.to_container(merged)
    try:
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{where}: {error.full_key} has no value; set it in the file or as {error.full_key}=...") from error
    except UNREADABLE as error:
        # Neither the error nor the value may be told: they hold what is referred to.
        key = str(getattr(error, "full_key", "") or "a value")
        leaves = [name for name, kind in options().items() if not is_dataclass(kind)]
        known = next((name for name in leaves if key == name or key.startswith((f"{name}.", f"{name}["))), key)
        wanted = f"; {known} takes {type_name(options()[known])}" if known in leaves else ""
        raise ConfigError(
            f"{where}: {key} refers to something that is not there, or that does not fit: {shown(_at(tree, known))}{wanted}"
        ) from None
    assert isinstance(config, Config)
    written = {}
    for key, kind in options().items():
        if not is_dataclass(kind) and _refers(text := _at(tree, key)):
            written[key] = (text, value_of(config, key))
    return replace(config, written=written)


def _at(tree: Any, key: str) -> Any:
    for name in key.split("."):
        tree = tree.get(name) if isinstance(tree, dict) else None
    return tree


def _refers(value: Any) -> bool:
    """Whether there is a `${...}` to resolve in a value; behind a backslash it is text."""
    if isinstance(value, dict | list):
        return any(map(_refers, value.values() if isinstance(value, dict) else value))
    return isinstance(value, str) and any(len(match[1]) % 2 == 0 for match in _REFERENCE.finditer(value))


def _texts(value: Any, change: Callable[[str], str]) -> Any:
    """A tree with every text in it changed, but for the keys of mappings."""
    if isinstance(value, dict):
        return {key: _texts(each, change) for key, each in value.items()}
    if isinstance(value, list):
        return [_texts(each, change) for each in value]
    return change(value) if isinstance(value, str) else value


def literal(value: Any) -> Any:
    """A tree of values, so written that OmegaConf reads every text as it is."""
    return _texts(value, lambda text: _REFERENCE.sub(lambda match: f"{match[1] * 2}\\${{", text))


def frozen(value: Any) -> Any:
    """A tree as somebody wrote it, in which every reference has become the text that it is."""
    return _texts(value, lambda text: _REFERENCE.sub(lambda match: f"{match[1]}{'' if len(match[1]) % 2 else chr(92)}${{", text))


def shown_as(config: Config, key: str, kind: Any) -> Any:
    """The value of an option as OmegaConf would read it, where it still is what was written: with its references."""
    value = value_of(config, key)
    text, was = config.written.get(key, (None, None))
    return _unresolved(text, literal(value), kind) if key in config.written and value == was else literal(value)


def _unresolved(written: Any, value: Any, kind: Any) -> Any:
    """`value`, with what was written in place of every text in it that refers to something."""
    if isinstance(value, dict) and isinstance(written, dict) and len(written) == len(value):
        return {name: _unresolved(text, value[name], Any) for name, text in written.items() if name in value}
    if isinstance(value, list) and isinstance(written, list) and len(written) == len(value):
        return [_unresolved(text, each, Any) for text, each in zip(written, value, strict=True)]
    return written if isinstance(value, str) and get_origin(kind) is not Literal and _refers(written) else value


def as_written(sentence: str, config: Config) -> str:
    """A sentence about values without what they refer to."""
    for text, value in config.written.values():
        for whole, part in _pairs(text, value):
            for told in (part, repr(part)[1:-1], ascii(part)[1:-1], shown(part)):
                sentence = sentence.replace(told, whole) if len(told) > 3 else sentence
    return sentence


def _pairs(written: Any, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict) and isinstance(written, dict):
        for name, text in written.items():
            yield from _pairs(text, value.get(name))
    elif isinstance(value, list) and isinstance(written, list):
        for text, each in zip(written, value, strict=False):
            yield from _pairs(text, each)
    elif isinstance(value, str) and _refers(written):
        yield str(written), value
