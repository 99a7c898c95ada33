"""A YAML file and `key=value` overrides become one checked `Config`.

Values are merged one by one (`configs.merge`) and `${...}` is resolved in them (`configs.references`). Locations become absolute
here, where the command is typed: the processes of a cluster stand in other folders (`configs.places`).
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from freeguide.configs.checks import Contradictions, checks, nearest, no_contradictions, shown, value_of
from freeguide.configs.errors import ConfigError
from freeguide.configs.merge import document, merge, override_with
from freeguide.configs.places import absolute, placed
from freeguide.configs.references import as_written, literal, resolved
from freeguide.configs.schema import Config
from freeguide.configs.sweep import sweep

PACKAGED = Path(__file__).parent  # the configs that come with freeguide
SUFFIXES = (".yaml", ".yml")


def load_config(
    path: str | Path,
    overrides: list[str] | None = None,
    command: str = "train",
    place: Callable[[str, str], str] | None = None,
    contradictions: Contradictions = no_contradictions,
) -> Config:
    """Read `path` (see `find_config`), apply overrides such as `train.lr=1e-4`, check the result for `command`, and return it.

    `place(key, location)` says what each location means, given as it was typed; by default, it is made absolute here.
    `contradictions(config, command)` are the checks of the rooms that read the config; by default, options are checked one by one.
    Raises ConfigError, one sentence, for a missing or malformed file, an unknown or ill-typed key, a location that means no place,
    or values that are out of range or contradict each other.
    """
    path = find_config(path)
    merged = OmegaConf.structured(Config)
    merge(merged, *document(path), str(path))
    for override in overrides or []:
        override_with(merged, override)
    config = resolved(merged, str(path))
    try:
        config = placed(config, place or absolute)
        validate(config, command, contradictions)
    except ConfigError as error:
        raise ConfigError(as_written(str(error), config)) from None
    return replace(config, written={key: (text, value_of(config, key)) for key, (text, _) in config.written.items()})


def find_config(name: str | Path) -> Path:
    """The file that `name` means: a path, or the name of a config that comes with freeguide, `digits` or `digits.yaml`.

    A file in the working folder wins. Raises ConfigError, naming what there is.
    """
    path = Path(name)
    if re.match(r"[A-Za-z][\w+.-]*:/", str(name)):
        raise ConfigError(f"{name}: a config is a file of this machine; copy it here, and give its path")
    bare = path.name == str(name) != ""
    tried = [path, *([path.with_name(f"{path.name}.yaml")] if bare and path.suffix not in SUFFIXES else [])]
    found = next((each for each in (*tried, *(PACKAGED / each.name for each in tried if bare)) if each.is_file()), None)
    if found is not None:
        return found
    if path.exists() and str(name):
        of_run = f", such as that of a run, {path / 'config.yaml'}" if (path / "config.yaml").is_file() else ""
        raise ConfigError(f"{path}: not a file; a config is a YAML file{of_run}")
    packaged = {p.stem: p.stem for p in sorted(PACKAGED.glob("*.yaml"))}
    beside = {p.stem: p.name for p in sorted(path.parent.glob("*.y*ml")) if p.is_file()}
    those = f"those that come with freeguide are: {', '.join(packaged)}"
    if near := nearest(path.stem, [*packaged, *beside]):
        raise ConfigError(f"{path}: no such config file; did you mean {(packaged | beside)[near]}? ({those})")
    raise ConfigError(f"{str(name).strip() or 'the name of the config is empty'}: no such config file; {those}")


def overridden(
    config: Config, group: str, overrides: Sequence[str], command: str, contradictions: Contradictions = no_contradictions
) -> Config:
    """`config` with overrides of the options of `group`, which names no locations; checked for `command`.

    It may come from anybody (`from_yaml`): nothing in it is resolved. Raises ConfigError as `load_config` does.
    """
    tree = {option.name: getattr(config, option.name) for option in fields(config) if option.name != "written"}
    tree = {name: asdict(value) if is_dataclass(value) else value for name, value in tree.items()}  # type: ignore[arg-type]
    merged = OmegaConf.merge(OmegaConf.structured(Config), literal(tree))
    assert isinstance(merged, DictConfig)
    for override in overrides:
        key = override.partition("=")[0].strip()
        override_with(merged, override)
        if key.partition(".")[0] != group:
            raise ConfigError(f"argument {shown(override, quoted=True)}: {key} is settled here; give options of {group} only")
    config = resolved(merged, "arguments")
    validate(config, command, contradictions)
    return config


def validate(config: Config, command: str, contradictions: Contradictions) -> None:
    """Raise ConfigError for the first value that is out of range or that contradicts another one for `command`."""
    for holds, sentence in itertools.chain(checks(config), contradictions(config, command)):
        if not holds:
            raise ConfigError(sentence)
    if config.evaluate.sweep:
        for series in sweep(config):
            validate(series, command, contradictions)
