"""A YAML file and `key=value` overrides become one checked `Config`.

Unknown keys are refused before anything is merged, so that the message can name the file or the argument that holds them and
the nearest key that exists. Values are then merged one by one through OmegaConf, which knows the types. Locations become absolute
here, where the command is typed: the processes of a cluster stand in other folders.
"""

import difflib
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from configs.errors import ConfigError, StoreError
from configs.locations import locate
from configs.schema import LOCATION, Config, EvaluateConfig, TrainConfig

PACKAGED = Path(__file__).parent  # the configs that come with freeguide
SUFFIXES = (".yaml", ".yml")


def load_config(path: str | Path, overrides: list[str] | None = None, command: str = "train") -> Config:
    """Read `path` (see `find_config`), apply overrides such as `train.lr=1e-4`, check the result for `command`, and return it.

    Raises ConfigError, one sentence, for a missing or malformed file, an unknown or ill-typed key, or values that contradict
    each other.
    """
    path = find_config(path)
    merged = OmegaConf.structured(Config)
    try:
        document = OmegaConf.load(path)
    except RecursionError as error:
        raise ConfigError(f"{path}: not a config: it is nested too deeply") from error
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    except OSError as error:  # OmegaConf raises one, too, for a document that is a number
        reason = error.strerror or "a config is a mapping of keys to values, this file holds a single value"
        raise ConfigError(f"{path}: {reason}") from error
    if not isinstance(document, DictConfig):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, this file holds a list")
    _merge(merged, OmegaConf.to_container(document), str(path))
    for override in overrides or []:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"argument {override!r}: an override has the form key=value, for example train.lr=1e-4")
        try:
            nested = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
            raise ConfigError(f"argument {override!r}: not a value in YAML: {' '.join(str(error).split())}") from error
        _merge(merged, nested, f"argument {override!r}")
    try:
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{path}: {error.full_key} has no value; set it in the file or as {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key or 'a value'}: {' '.join(str(error.msg or error).split())}") from error
    assert isinstance(config, Config)
    config = _placed(config, _absolute)
    validate(config, command)
    return config


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
    bare = path.name == str(name) != ""
    tried = [path, *([path.with_name(f"{path.name}.yaml")] if bare and path.suffix not in SUFFIXES else [])]
    found = next((each for each in (*tried, *(PACKAGED / each.name for each in tried if bare)) if each.is_file()), None)
    if found is not None:
        return found
    if path.exists():
        raise ConfigError(f"{path}: not a file; a config is a YAML file")
    near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    packaged = ", ".join(sorted(p.stem for p in PACKAGED.glob("*.yaml")))
    beside = f"{_choices('files beside it', path.name, near)}; " if near else ""
    raise ConfigError(f"{path}: no such config file; {beside}the configs that come with freeguide are: {packaged}")


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str) -> Config:
    """The config that `to_yaml` wrote, without checking it again. Raises ConfigError if another version wrote it."""
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text)))
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"a stored config cannot be read ({reason}); use the version that wrote it") from error
    assert isinstance(config, Config)
    return config


def validate(config: Config, command: str = "train") -> None:
    """Raise ConfigError for the first value that is out of range or that contradicts another one for `command`."""
    for checks in (_name_checks, _range_checks, _data_checks, _train_checks, _sampling_checks):
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
    known = ["run", *(key for key in _schema_keys(Config) if key.startswith("sampling."))]
    known = [key for key in known if key not in ("sampling.labels", "sampling.batch")]
    for key, values in axes.items():
        if key not in known:
            raise ConfigError(
                f"evaluate.sweep: {key} cannot be swept, as {{sampling.steps: [8, 16]}} can; {_choices('options', str(key), known)}"
            )
        if not isinstance(values, list) or not values or any(values.count(value) > 1 for value in values):
            raise ConfigError(f"evaluate.sweep: {key} is {values!r}; give a list of values, each once")
    found = []
    for values in itertools.product(*axes.values()):
        series = OmegaConf.structured(config)
        _merge(series, {"evaluate": {"sweep": {}}, **dict(zip(axes, values, strict=True))}, "evaluate.sweep")
        one = OmegaConf.to_object(series)
        assert isinstance(one, Config)
        found.append(one)
    return found


def screen_images(options: EvaluateConfig) -> int:
    """Images per w of the first look: whole units, so that they are the first of the full run. 0 without one."""
    wanted = options.images / 10 if options.screen < 0 else options.screen
    images = -int(-wanted // options.unit) * options.unit
    return images if 0 < images < options.images else 0


Checks = Iterator[tuple[bool, str]]  # what has to hold, and the sentence for when it does not; later ones rely on earlier ones


def _name_checks(config: Config, command: str) -> Checks:
    yield re.fullmatch(r"[\w-][\w.-]*", config.name) is not None, f"name={config.name!r}: must name a folder under runs/"
    names: dict[str, list[Any]] = {
        "data.source": ["digits", "folder", "idx", "parquet", "webdataset"],
        "data.resize": ["adm", "area", "box"],
        "data.dtype": ["uint8", "float16", "float32"],
        "diffusion.schedule": ["cosine", "uniform", "normal", "flow"],
        "diffusion.prediction": ["eps", "x", "v", "edm"],
        "diffusion.loss_weight": ["paper", "v", "min_snr", "edm", "elbo"],
        "model.network": ["adm", "dit"],
        "train.schedule": ["constant", "cosine", "inverse_sqrt"],
        "train.precision": ["fp32", "bf16", "fp16"],
        "train.zero_stage": [0, 1, 2, 3],
        "sampling.sampler": ["ancestral", "ddim", "dpmpp_2m", "heun"],
        "sampling.spacing": ["u", "logsnr", "karras"],
        "sampling.labels": ["balanced", "random"],
        "sampling.precision": ["fp32", "bf16"],
    }
    for key, valid in names.items():
        value = _value(config, key)
        yield value in valid, f"{key}={value}: {_choices('values', str(value), [str(v) for v in valid])}"


def _range_checks(config: Config, command: str) -> Checks:
    at_least_one = {
        "data": ["image_size", "classes", "shard_samples", "fetch_threads", "decode_threads", "prefetch_batches", "cache_mib"],
        "train": ["steps", "global_batch", "decay_steps", "log_every", "checkpoint_every", "keep_checkpoints"],
        "sampling": ["steps", "batch"],
        "generate": ["images", "unit"],
        "evaluate": ["unit", "evaluator_epochs", "grid"],
        "cluster": ["workers", "actors"],
    }
    for group, names in at_least_one.items():
        for name in names:
            value = getattr(getattr(config, group), name)
            yield value >= 1, f"{group}.{name}={value}: must be at least 1"
    for key in ("data.bad_images", "data.bad_samples", "diffusion.p_uncond", "sampling.v"):
        value = _value(config, key)
        yield 0 <= value <= 1, f"{key}={value}: must lie in [0, 1]"
    for key in (
        "train.warmup_steps",
        "train.micro_batch",
        "train.weight_decay",
        "train.grad_clip",
        "train.sample_every",
        "train.keep_every",
        "train.bad_steps",
        "train.watchdog_seconds",
    ):
        value = _value(config, key)
        yield value >= 0, f"{key}={value}: must not be negative"
    for key in ("data.latent_scale", "data.disk_cache_gib", "train.lr", "train.adam_eps", "cluster.cpus_per_worker"):
        value = _value(config, key)
        yield value > 0, f"{key}={value}: must be positive"
    gpus = config.cluster.gpus_per_worker
    yield gpus == -1 or gpus >= 0, f"cluster.gpus_per_worker={gpus}: a number of GPUs, or -1 for one where the cluster has them"


def _data_checks(config: Config, command: str) -> Checks:
    data, diffusion = config.data, config.diffusion
    if data.dtype == "uint8":
        yield data.channels in (1, 3), f"data.channels={data.channels}: 1 (grey) or 3 (RGB)"
    else:
        yield from _latent_checks(config, command)
    if command == "prepare":
        yield data.source == "digits" or data.path != "", f"data.path is empty: name what data.source={data.source} reads"
    yield min(data.mixture.values(), default=1) >= 1, f"data.mixture={data.mixture}: weights are whole numbers from 1"
    yield (
        diffusion.p_uncond < 1 or command not in ("evaluate", "generate"),
        f"diffusion.p_uncond=1 trains no class at all, so {command} cannot sample one at any w: train with p_uncond < 1",
    )
    low, high = diffusion.logsnr_min, diffusion.logsnr_max
    yield low < high, f"diffusion.logsnr_min={low} is not below diffusion.logsnr_max={high}: swap them"
    asked = {"evaluate": config.evaluate.w, "generate": [config.generate.w]}.get(command, [])
    guided = next((w for w in asked if w), None)
    yield (
        diffusion.p_uncond > 0 or guided is None,
        f"diffusion.p_uncond=0 leaves the network without an unconditional mode, so {command}.w={guided} cannot be sampled: "
        f"train with p_uncond > 0 or ask for w=0",
    )


def _latent_checks(config: Config, command: str) -> Checks:
    dtype = f"data.dtype={config.data.dtype}"
    yield config.data.channels >= 1, f"data.channels={config.data.channels}: must be at least 1"
    yield (
        command != "train" or not config.data.flip,
        f"data.flip=true with {dtype}: a mirrored latent is not the latent of the mirrored image; set data.flip=false",
    )
    yield (
        command != "train" or config.train.sample_every == 0,
        f"train.sample_every={config.train.sample_every} with {dtype}: latents are no pictures without their decoder; set it to 0",
    )
    yield (
        command != "generate" or not config.sampling.clip,
        f"sampling.clip=true with {dtype} would clamp latents to [-1, 1]; set sampling.clip=false",
    )
    yield (
        command != "evaluate",
        f"{dtype}: evaluate measures images, and there is no decoder here; generate the latents, decode them, and use score",
    )


def _train_checks(config: Config, command: str) -> Checks:
    train, workers = config.train, config.cluster.workers
    batch, micro = train.global_batch, train.micro_batch
    yield from share_checks(train, workers, "cluster.workers")
    yield len(train.betas) == 2 and all(0 <= b < 1 for b in train.betas), f"train.betas={train.betas}: two decays in [0, 1)"
    yield from _average_checks(config, command)
    yield (
        train.precision == "fp32" or train.zero_stage >= 1,
        f"train.precision={train.precision} with train.zero_stage=0: DeepSpeed keeps fp32 masters from stage 1 on; "
        f"use stage 1 or fp32",
    )
    yield (
        command != "train" or not config.model.learn_sigma,
        "model.learn_sigma=true cannot be trained: the objective fixes the variance with v (sampling.v); set it to false",
    )
    fewest = config.cluster.min_workers
    yield 0 <= fewest <= workers, f"cluster.min_workers={fewest}: must lie between 0 and cluster.workers={workers}"
    for count in range(fewest, workers) if fewest else ():
        yield (
            batch % count == 0 and (micro == 0 or batch // count % micro == 0),
            f"train.global_batch={batch} cannot be shared by {count} workers, which cluster.min_workers={fewest} allows: "
            f"every number of workers from there to cluster.workers={workers} must divide it (in micro-batches, where set)",
        )


def share_checks(train: TrainConfig, workers: int, whose: str) -> Checks:
    """Whether so many workers can share the batch; `whose` says what their number is."""
    batch, micro, share = train.global_batch, train.micro_batch, train.global_batch // workers
    yield batch % workers == 0, f"train.global_batch={batch} is not divisible by {whose}={workers}: workers take equal shares"
    yield (
        micro == 0 or (micro <= share and share % micro == 0),
        f"train.micro_batch={micro} does not divide a worker's share of {share} images "
        f"(train.global_batch={batch} over {whose}={workers})",
    )
    yield (
        train.precision == "fp32" or train.zero_stage != 1 or micro in (0, share),
        f"train.micro_batch={micro} with train.precision={train.precision} at train.zero_stage=1 would add gradients up in "
        f"{train.precision}; use stage 2 or 3, where they are added up in fp32",
    )


def _average_checks(config: Config, command: str) -> Checks:
    train = config.train
    yield 0 <= train.ema_decay < 1, f"train.ema_decay={train.ema_decay}: a decay lies in [0, 1)"
    for name in ("ema_half_lives", "ema_sigma_rel"):
        values = getattr(train, name)
        yield len(set(values)) == len(values) and all(v > 0 for v in values), f"train.{name}={values}: positive values, each once"
    # 0.2886751 = 12^-1/2 belongs to the plain mean of all steps, the widest profile of EDM2's family.
    widest = max(train.ema_sigma_rel, default=0.0)
    yield widest < 0.2886, f"train.ema_sigma_rel={train.ema_sigma_rel}: relative widths lie below 0.2886"
    sampled = config.sampling.ema
    yield (
        re.fullmatch(r"ema|master|half_life_\d+|sigma_rel_0?\.\d+", sampled) is not None,
        f"sampling.ema={sampled}: one of ema, master, half_life_N (train.ema_half_lives), sigma_rel_X such as sigma_rel_0.1",
    )
    kept = ["ema", "master", *(f"half_life_{n}" for n in train.ema_half_lives)]
    yield (
        command != "train" or sampled in kept or (sampled.startswith("sigma_rel_") and bool(train.ema_sigma_rel)),
        f"sampling.ema={sampled} is not kept by this training, whose sample grids need it: "
        f"add it to train.ema_half_lives or train.ema_sigma_rel",
    )


def _sampling_checks(config: Config, command: str) -> Checks:
    interval, weights = config.sampling.interval, config.evaluate.w
    yield (
        len(interval) in (0, 2) and interval == sorted(set(interval)),
        f"sampling.interval={interval}: two log-SNRs, the lower one first, or an empty list",
    )
    options = config.evaluate
    for name in ("dinov2_reference", "dinov2_hash"):
        given = getattr(options, name)
        yield (
            options.dinov2 != "" or given == "",
            f"evaluate.{name}={given} needs DINOv2's weights: set evaluate.dinov2 to their path",
        )
    for name in ("extractor_hash", "dinov2_hash"):
        given = getattr(options, name)
        yield (
            re.fullmatch(r"|[0-9a-f]{64}", given) is not None,
            f"evaluate.{name}={given}: a sha256 has 64 hexadecimal digits, in lower case",
        )
    yield (
        command != "fit-evaluator" or options.extractor == "",
        f"evaluate.extractor={options.extractor} names weights that are there already: leave it out to fit an evaluator",
    )
    yield (
        len({f"{w:g}" for w in weights}) == len(weights) > 0,
        f"evaluate.w={weights}: at least one weight, each once to six digits",
    )
    asked = [*weights, config.generate.w]
    yield all(0 <= w < math.inf for w in asked), f"evaluate.w={weights}, generate.w={asked[-1]}: must be numbers, and not negative"
    images = config.evaluate.images
    yield images >= 10, f"evaluate.images={images}: at least 10, one for each split of the Inception score"
    for name, seed in (("seed", config.seed), ("sampling.seed", config.sampling.seed)):
        yield 0 <= seed < 1 << 64, f"{name}={seed}: a whole number from 0 to 2**64 - 1"
    yield config.evaluate.screen >= -1, f"evaluate.screen={config.evaluate.screen}: a number of images, 0 for none, -1 for a tenth"


def _absolute(key: str, uri: str) -> str:
    try:
        place = locate(uri)
    except StoreError as error:
        raise ConfigError(f"{key}: {str(error).rstrip('.')}") from error
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


def _value(config: Config, key: str) -> Any:
    group, name = key.split(".")
    return getattr(getattr(config, group), name)


def _merge(config: DictConfig, nested: Any, where: str) -> None:
    """Set every leaf of `nested` in `config`, refusing keys and values that the schema does not know."""
    known = _schema_keys(Config)
    for key, value in _leaves(nested, known):
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key}; {_choices('keys', key, list(known))}")
        if known[key] is not None and is_dataclass(known[key]):
            raise ConfigError(f"{where}: {key} is a group of options, not a value; set for example {_example(key, known)}")
        try:
            OmegaConf.update(config, key, value, merge=False)
        except OmegaConfBaseException as error:
            wanted = _type_name(known[key])
            raise ConfigError(f"{where}: {key} takes {wanted}, not {value!r}") from error


def _leaves(nested: Any, known: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in nested.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and (key not in known or is_dataclass(known[key])):
            yield from _leaves(value, known, f"{key}.")
        elif value is not None or not is_dataclass(known.get(key)):  # `data:` with nothing under it is an empty group
            yield key, value


def _schema_keys(schema: Any, prefix: str = "") -> dict[str, Any]:
    """Every dotted key of the schema with its type; groups are listed too."""
    types, keys = get_type_hints(schema), {}
    for field in fields(schema):
        keys[f"{prefix}{field.name}"] = types[field.name]
        if is_dataclass(types[field.name]):
            keys.update(_schema_keys(types[field.name], f"{prefix}{field.name}."))
    return keys


def _example(group: str, known: dict[str, Any]) -> str:
    return next(key for key in known if key.startswith(f"{group}.")) + "=..."


def _type_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    text = str(kind).replace("typing.", "")
    plain = {
        "list[int]": "a list of whole numbers",
        "list[float]": "a list of numbers",
        "list[str]": "a list of texts",
        "dict[str, str]": "a mapping of names to texts",
        "dict[str, int]": "a mapping of names to whole numbers",
    }
    return names.get(kind) or plain.get(text) or "a mapping of keys to values"


def _choices(what: str, wrong: str, right: list[str]) -> str:
    """The nearest of the right names, or all of them where none is near."""
    by_last_part = {name.rsplit(".", 1)[-1]: name for name in reversed(right)}
    near = difflib.get_close_matches(wrong, right, n=1, cutoff=0.6)
    near = near or [by_last_part[n] for n in difflib.get_close_matches(wrong.rsplit(".", 1)[-1], by_last_part, n=1, cutoff=0.75)]
    if near:
        return f"did you mean {near[0]}?"
    listed = ", ".join(right if len(right) <= 12 else [r for r in right if "." not in r]) or "none"
    return f"the {what} are: {listed}"
