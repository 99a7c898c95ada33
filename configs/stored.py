"""A config as text, to be shown or stored, and back. A stored one is data: nothing in it is resolved, whoever wrote it."""

import functools
import hashlib
from dataclasses import is_dataclass
from typing import Any

from omegaconf import OmegaConf

from freeguide.configs.checks import shown
from freeguide.configs.errors import ConfigError
from freeguide.configs.merge import UNREADABLE
from freeguide.configs.references import frozen, shown_as
from freeguide.configs.schema import RENAMED, Config, options
from freeguide.configs.secrets import masked_values

_SEAL = "# sha256 of what follows: "


def to_yaml(config: Config) -> str:
    """The config as YAML, to be shown or stored: texts as they were written where they refer to something, and without secrets.

    `load_config` reads it back to an equal one, and so does `from_yaml`, where nothing is hidden.
    """
    tree: dict[str, Any] = {}
    for key, kind in options().items():
        *groups, name = key.split(".")
        group = functools.reduce(lambda place, each: place[each], groups, tree)
        group[name] = {} if is_dataclass(kind) else masked_values(shown_as(config, key, kind))
    return OmegaConf.to_yaml(OmegaConf.create(tree))


def sealed(text: str) -> str:
    """A config to be stored: with a checksum in its first line."""
    return f"{_SEAL}{hashlib.sha256(text.encode()).hexdigest()}\n{text}"


def from_yaml(text: str) -> Config:
    """The config that `to_yaml` wrote, without checking it again, and without resolving anything, whoever wrote it.

    Raises ConfigError if another version wrote it, or where the checksum of `sealed` does not fit.
    """
    first, _, rest = text.partition("\n")
    if first.startswith(_SEAL) and f"{first}\n{rest}" != sealed(rest):
        raise ConfigError("a stored config has changed since it was written; undo that, or take out its first line if it is meant")
    try:
        tree = OmegaConf.to_container(OmegaConf.create(text))
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), frozen(_under_new_names(tree))))
    except (*UNREADABLE, RecursionError) as error:
        reason = shown((str(error).splitlines() or [type(error).__name__])[0])
        raise ConfigError(f"a stored config cannot be read ({reason}); use the version that wrote it") from error
    if not isinstance(config, Config):
        raise ConfigError("a stored config cannot be read (it is no mapping of keys to values); use the version that wrote it")
    return config


def _under_new_names(tree: Any) -> Any:
    for old, new in RENAMED.items():
        group, _, name = old.partition(".")
        inside = tree.get(group) if isinstance(tree, dict) else None
        if isinstance(inside, dict) and name in inside:
            inside[new.partition(".")[2]] = inside.pop(name)
    return tree
