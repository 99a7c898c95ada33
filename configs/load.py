"""A YAML file and `key=value` overrides become one checked `Config`.

Unknown keys are refused before anything is merged, so that the message can name the file or the argument that holds them and
the nearest key that exists. Values are then merged one by one through OmegaConf, which knows the types. Locations become absolute
here, where the command is typed: the processes of a cluster stand in other folders.

`${...}` is resolved in what the user typed, and nowhere else: a stored config is data. What is shown or stored of a text is how it
was written, so that a secret that stands in an environment variable stays there; numbers and words of the schema are resolved, as
a run cannot be read without them.
"""

import functools
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from freeguide.configs.checks import checks, choices, nearest, shown, value_of
from freeguide.configs.errors import ConfigError, StoreError
from freeguide.configs.locations import locate
from freeguide.configs.schema import LOCATION, Config, EvaluateConfig, options
from freeguide.configs.secrets import masked_values

PACKAGED = Path(__file__).parent  # the configs that come with freeguide
SUFFIXES = (".yaml", ".yml")
SERIES = 10_000  # of one sweep
_REFERENCE = re.compile(r"(\\*)\$\{")
_SEAL = "# sha256 of what follows: "
# What reading, converting and resolving values raise; ValueError and OverflowError come of numbers with thousands of digits.
_UNREADABLE = (yaml.YAMLError, OmegaConfBaseException, ValueError, OverflowError)


def load_config(
    path: str | Path,
    overrides: list[str] | None = None,
    command: str = "train",
    place: Callable[[str, str], str] | None = None,
) -> Config:
    """Read `path` (see `find_config`), apply overrides such as `train.lr=1e-4`, check the result for `command`, and return it.

    `place(key, location)` says what each location means, given as it was typed; by default, it is made absolute here. Raises
    ConfigError, one sentence, for a missing or malformed file, an unknown or ill-typed key, a location that means no place, or
    values that are out of range or contradict each other.
    """
    path = find_config(path)
    merged = OmegaConf.structured(Config)
    _merge(merged, *_document(path), str(path))
    for override in overrides or []:
        _override(merged, override)
    config = _resolved(merged, str(path))
    try:
        config = _placed(config, place or _absolute)
        validate(config, command)
    except ConfigError as error:
        raise ConfigError(_as_written(str(error), config)) from None
    return replace(config, written={key: (text, value_of(config, key)) for key, (text, _) in config.written.items()})


def locations(config: Config) -> Iterator[tuple[str, str]]:
    """Every location that `config` names, with its key: ("data.uri", "s3://bucket/prefix"). Absolute after `load_config`."""
    found: list[tuple[str, str]] = []

    def note(key: str, uri: str) -> str:
        found.append((key, uri))
        return uri

    _placed(config, note)
    yield from found


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


def to_yaml(config: Config) -> str:
    """The config as YAML, to be shown or stored: texts as they were written where they refer to something, and without secrets.

    `load_config` reads it back to an equal one, and so does `from_yaml`, where nothing is hidden.
    """
    tree: dict[str, Any] = {}
    for key, kind in options().items():
        *groups, name = key.split(".")
        group = functools.reduce(lambda place, each: place[each], groups, tree)
        group[name] = {} if is_dataclass(kind) else masked_values(_shown_as(config, key, kind))
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
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), _frozen(tree)))
    except (*_UNREADABLE, RecursionError) as error:
        reason = shown((str(error).splitlines() or [type(error).__name__])[0])
        raise ConfigError(f"a stored config cannot be read ({reason}); use the version that wrote it") from error
    if not isinstance(config, Config):
        raise ConfigError("a stored config cannot be read (it is no mapping of keys to values); use the version that wrote it")
    return config


def overridden(config: Config, group: str, overrides: Sequence[str], command: str) -> Config:
    """`config` with overrides of the options of `group`, which names no locations; checked for `command`.

    It may come from anybody (`from_yaml`): nothing in it is resolved. Raises ConfigError as `load_config` does.
    """
    tree = {option.name: getattr(config, option.name) for option in fields(config) if option.name != "written"}
    tree = {name: asdict(value) if is_dataclass(value) else value for name, value in tree.items()}  # type: ignore[arg-type]
    merged = OmegaConf.merge(OmegaConf.structured(Config), _literal(tree))
    assert isinstance(merged, DictConfig)
    for override in overrides:
        key = override.partition("=")[0].strip()
        _override(merged, override)
        if key.partition(".")[0] != group:
            raise ConfigError(f"argument {shown(override, quoted=True)}: {key} is settled here; give options of {group} only")
    config = _resolved(merged, "arguments")
    validate(config, command)
    return config


def validate(config: Config, command: str = "train") -> None:
    """Raise ConfigError for the first value that is out of range or that contradicts another one for `command`."""
    for holds, sentence in checks(config, command):
        if not holds:
            raise ConfigError(sentence)
    if config.evaluate.sweep:
        for series in sweep(config):
            validate(series, command)


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
    one = OmegaConf.structured(Config)
    _merge(one, {key: _literal(value)}, None, "evaluate.sweep")
    found = OmegaConf.select(one, key)
    return OmegaConf.to_object(found) if OmegaConf.is_config(found) else found


def _with(config: Config, values: dict[str, Any]) -> Config:
    of_sampling = {key.removeprefix("sampling."): value for key, value in values.items() if key != "run"}
    return replace(config, sampling=replace(config.sampling, **of_sampling), **{k: v for k, v in values.items() if k == "run"})


def screen_images(options: EvaluateConfig) -> int:
    """Images per w of the first look: whole units, so that they are the first of the full run. 0 without one."""
    wanted = options.images / 10 if options.screen < 0 else options.screen
    images = -int(-wanted // options.unit) * options.unit
    return images if 0 < images < options.images else 0


# --- merging ---


def _document(path: Path) -> tuple[Any, Any]:
    """What a YAML file says, and the same with every value as the text that it is. Raises ConfigError."""
    try:
        document = OmegaConf.load(path)
        plain = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    except RecursionError as error:
        raise ConfigError(f"{path}: not a config: it is nested too deeply") from error
    except _UNREADABLE as error:
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


def _override(merged: DictConfig, override: str) -> None:
    """Set what `key=value` says. Raises ConfigError."""
    key, equals, text = override.partition("=")
    where = f"argument {shown(override, quoted=True)}"
    if not equals or not key.strip():
        raise ConfigError(f"{where}: an override has the form key=value, without spaces, for example train.lr=1e-4")
    try:
        nested = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        plain = yaml.load(text, yaml.BaseLoader)
    except (*_UNREADABLE, RecursionError) as error:
        raise ConfigError(f"{where}: not a value in YAML ({_why(error)}); quote one with spaces: 'evaluate.w=[0, 1]'") from error
    plain = functools.reduce(lambda inside, name: {name: inside}, reversed(key.split(".")), plain)
    _merge(merged, nested, plain, where, into=key not in options())


def _merge(config: DictConfig, nested: Any, plain: Any, where: str, into: bool = False) -> None:
    """Set every leaf of `nested` in `config`, refusing keys and values that the schema does not know.

    `plain` is the same tree, whose values are the texts that were written. With `into`, mappings are added to, not replaced.
    """
    known = options()
    for key, value, text in _leaves(nested, plain, known):
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key}; {choices('keys', key, list(known))}")
        kind = known[key]
        if is_dataclass(kind):
            raise ConfigError(f"{where}: {key} is a group of options, not a value; set for example {_example(key, known)}")
        try:
            OmegaConf.update(config, key, _meant(kind, value, text), merge=into)
        except _UNREADABLE as error:
            if value is None:
                raise ConfigError(f"{where}: {key} has no value; it takes {_type_name(kind)}") from error
            if get_origin(kind) is Literal:
                right = [str(word) for word in get_args(kind)]
                raise ConfigError(f"{where}: {key}={shown(value)}: {choices('values', str(value), right)}") from error
            said = text if isinstance(text, str) and not isinstance(value, str) else value
            write = f"; write {key}=[{shown(said)}]" if _is_list(kind) and not isinstance(value, dict | list) else ""
            quoted = isinstance(value, str)
            raise ConfigError(f"{where}: {key} takes {_type_name(kind)}, not {shown(said, quoted)}{write}") from error


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


def _type_name(kind: Any) -> str:
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


# --- references ---


def _resolved(merged: DictConfig, where: str) -> Config:
    """The config in which every `${...}` has its value, and `written` says what stood there. Raises ConfigError."""
    tree = OmegaConf.to_container(merged)
    try:
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{where}: {error.full_key} has no value; set it in the file or as {error.full_key}=...") from error
    except _UNREADABLE as error:
        # Neither the error nor the value may be told: they hold what is referred to.
        key = str(getattr(error, "full_key", "") or "a value")
        leaves = [name for name, kind in options().items() if not is_dataclass(kind)]
        known = next((name for name in leaves if key == name or key.startswith((f"{name}.", f"{name}["))), key)
        wanted = f"; {known} takes {_type_name(options()[known])}" if known in leaves else ""
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


def _literal(value: Any) -> Any:
    """A tree of values, so written that OmegaConf reads every text as it is."""
    return _texts(value, lambda text: _REFERENCE.sub(lambda match: f"{match[1] * 2}\\${{", text))


def _frozen(value: Any) -> Any:
    """A tree as somebody wrote it, in which every reference has become the text that it is."""
    return _texts(value, lambda text: _REFERENCE.sub(lambda match: f"{match[1]}{'' if len(match[1]) % 2 else chr(92)}${{", text))


def _shown_as(config: Config, key: str, kind: Any) -> Any:
    """The value of an option as OmegaConf would read it, where it still is what was written: with its references."""
    value = value_of(config, key)
    text, was = config.written.get(key, (None, None))
    return _unresolved(text, _literal(value), kind) if key in config.written and value == was else _literal(value)


def _unresolved(written: Any, value: Any, kind: Any) -> Any:
    """`value`, with what was written in place of every text in it that refers to something."""
    if isinstance(value, dict) and isinstance(written, dict) and len(written) == len(value):
        return {name: _unresolved(text, value[name], Any) for name, text in written.items() if name in value}
    if isinstance(value, list) and isinstance(written, list) and len(written) == len(value):
        return [_unresolved(text, each, Any) for text, each in zip(written, value, strict=True)]
    return written if isinstance(value, str) and get_origin(kind) is not Literal and _refers(written) else value


def _as_written(sentence: str, config: Config) -> str:
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


# --- locations ---


def _absolute(key: str, uri: str) -> str:
    try:
        place = locate(uri)
    except StoreError as error:
        raise ConfigError(f"{key}: {error}") from error
    if place.bucket and key == "data.disk_cache":
        raise ConfigError(f"{key}={uri}: the cache is a folder on each node's own disk; give its path")
    return place.uri


def _placed(config: Config, change: Callable[[str, str], str]) -> Config:
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
