"""A YAML file and `key=value` overrides become one checked `Config`.

Unknown keys are refused before anything is merged, so that the message can name the file or the argument that holds them and
the nearest key that exists. Values are then merged one by one through OmegaConf, which knows the types.
"""

import difflib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from configs.errors import ConfigError
from configs.schema import Config


def load_config(path: str | Path, overrides: list[str] | None = None, command: str = "train") -> Config:
    """Read `path`, apply overrides such as `train.lr=1e-4`, check the result for `command`, and return it.

    Raises ConfigError, one sentence, for a missing or malformed file, an unknown or ill-typed key, or values that contradict
    each other.
    """
    path = Path(path)
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ConfigError(f"{path}: no such config file; {_choices('files beside it', path.name, near)}")
    merged = OmegaConf.structured(Config)
    try:
        document = OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(document, DictConfig):
        raise ConfigError(f"{path}: a config is a mapping of keys to values, this file holds a {type(document).__name__}")
    _merge(merged, OmegaConf.to_container(document), str(path))
    for override in overrides or []:
        key, equals, _ = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"argument {override!r}: an override has the form key=value, for example train.lr=1e-4")
        try:
            nested = OmegaConf.to_container(OmegaConf.from_dotlist([override]))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"argument {override!r}: not a value in YAML: {' '.join(str(error).split())}") from error
        _merge(merged, nested, f"argument {override!r}")
    try:
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{path}: {error.full_key} has no value; set it in the file or as {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key or 'a value'}: {' '.join(str(error.msg or error).split())}") from error
    assert isinstance(config, Config)
    validate(config, command)
    return config


def to_yaml(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def from_yaml(text: str) -> Config:
    """The config that `to_yaml` wrote, without checking it again."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(text)))
    assert isinstance(config, Config)
    return config


def validate(config: Config, command: str = "train") -> None:
    """Raise ConfigError for the first value that is out of range or that contradicts another one for `command`."""
    data, diffusion, train, sampling, cluster = config.data, config.diffusion, config.train, config.sampling, config.cluster
    world_size, share = cluster.workers, train.global_batch // max(cluster.workers, 1)
    weights = {"evaluate": config.evaluate.w, "generate": [config.generate.w]}.get(command, [])
    checks: list[tuple[bool, str]] = [
        (
            config.name != "" and "/" not in config.name and not config.name.startswith("."),
            f"name={config.name!r}: must name a folder under runs/",
        ),
        *(_one_of(key, value, names) for key, value, names in _choices_of(config)),
        *_at_least_one(config),
        (0.0 <= data.bad_images <= 1.0, f"data.bad_images={data.bad_images}: a share lies in [0, 1]"),
        (0.0 <= data.bad_samples <= 1.0, f"data.bad_samples={data.bad_samples}: a share lies in [0, 1]"),
        (data.channels in (1, 3), f"data.channels={data.channels}: 1 (grey) or 3 (RGB)"),
        (
            data.source == "digits" or command != "prepare" or data.path != "",
            "data.path is empty: name the folder of images to prepare",
        ),
        (0.0 <= diffusion.p_uncond <= 1.0, f"diffusion.p_uncond={diffusion.p_uncond}: a probability lies in [0, 1]"),
        (
            diffusion.logsnr_min < diffusion.logsnr_max,
            f"diffusion.logsnr_min={diffusion.logsnr_min} is not below diffusion.logsnr_max={diffusion.logsnr_max}: swap them",
        ),
        (
            diffusion.p_uncond > 0 or not any(weights),
            f"diffusion.p_uncond=0 leaves the network without an unconditional mode, so {command}.w={_first_nonzero(weights)} cannot be sampled: "
            f"train with p_uncond > 0 or ask for w=0",
        ),
        (
            train.global_batch % world_size == 0,
            f"train.global_batch={train.global_batch} is not divisible by cluster.workers={world_size}: every worker takes an equal share",
        ),
        (
            train.micro_batch == 0 or (0 < train.micro_batch <= share and share % train.micro_batch == 0),
            f"train.micro_batch={train.micro_batch} does not divide a worker's share of {share} images "
            f"(train.global_batch={train.global_batch} over cluster.workers={world_size})",
        ),
        (train.lr > 0, f"train.lr={train.lr}: a learning rate is positive"),
        (len(train.betas) == 2 and all(0 <= b < 1 for b in train.betas), f"train.betas={train.betas}: two decays in [0, 1)"),
        (0 <= train.ema_decay < 1, f"train.ema_decay={train.ema_decay}: a decay lies in [0, 1)"),
        (train.grad_clip >= 0, f"train.grad_clip={train.grad_clip}: a norm is not negative; 0 turns clipping off"),
        (
            train.precision != "bf16" or train.zero_stage >= 1,
            "train.precision=bf16 with train.zero_stage=0: DeepSpeed keeps fp32 masters for bf16 from stage 1 on; use stage 1 or fp32",
        ),
        (0.0 <= sampling.v <= 1.0, f"sampling.v={sampling.v}: the interpolation lies in [0, 1]"),
        (
            len(sampling.interval) in (0, 2) and sampling.interval == sorted(set(sampling.interval)),
            f"sampling.interval={sampling.interval}: two log-SNRs, the lower one first, or an empty list",
        ),
        (all(w >= 0 for w in config.evaluate.w), f"evaluate.w={config.evaluate.w}: guidance weights are not negative"),
        (
            len(set(config.evaluate.w)) == len(config.evaluate.w) > 0,
            f"evaluate.w={config.evaluate.w}: at least one weight, each once",
        ),
        (config.generate.w >= 0, f"generate.w={config.generate.w}: a guidance weight is not negative"),
        (cluster.cpus_per_worker > 0, f"cluster.cpus_per_worker={cluster.cpus_per_worker}: a worker needs a share of a core"),
        (
            cluster.gpus_per_worker == -1 or cluster.gpus_per_worker >= 0,
            f"cluster.gpus_per_worker={cluster.gpus_per_worker}: a number of GPUs, or -1 for one where the cluster has them",
        ),
    ]
    for holds, sentence in checks:
        if not holds:
            raise ConfigError(sentence)


def _choices_of(config: Config) -> list[tuple[str, object, list[str | int]]]:
    return [
        ("data.source", config.data.source, ["digits", "folder", "idx"]),
        ("train.schedule", config.train.schedule, ["constant", "cosine"]),
        ("train.precision", config.train.precision, ["fp32", "bf16"]),
        ("train.zero_stage", config.train.zero_stage, [0, 1, 2, 3]),
        ("diffusion.schedule", config.diffusion.schedule, ["cosine", "uniform", "normal", "flow"]),
        ("diffusion.prediction", config.diffusion.prediction, ["eps", "x", "v", "edm"]),
        ("diffusion.loss_weight", config.diffusion.loss_weight, ["paper", "v", "min_snr", "edm", "elbo"]),
        ("sampling.sampler", config.sampling.sampler, ["ancestral", "ddim", "dpmpp_2m", "heun"]),
        ("sampling.spacing", config.sampling.spacing, ["u", "logsnr", "karras"]),
        ("sampling.labels", config.sampling.labels, ["balanced", "random"]),
    ]


def _one_of(key: str, value: object, names: list[str | int]) -> tuple[bool, str]:
    return value in names, f"{key}={value}: {_choices('values', str(value), [str(n) for n in names])}"


def _at_least_one(config: Config) -> Iterator[tuple[bool, str]]:
    positive = {
        "data": ["image_size", "classes", "shard_samples", "fetch_threads", "decode_threads", "prefetch_batches", "cache_mib"],
        "train": ["steps", "global_batch", "log_every", "checkpoint_every", "keep_checkpoints"],
        "sampling": ["steps", "batch"],
        "generate": ["images", "unit"],
        "evaluate": ["images", "unit", "evaluator_epochs", "grid"],
        "cluster": ["workers", "actors"],
    }
    for group, names in positive.items():
        for name in names:
            value = getattr(getattr(config, group), name)
            yield value >= 1, f"{group}.{name}={value}: must be at least 1"


def _first_nonzero(weights: list[float]) -> float | None:
    return next((w for w in weights if w), None)


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
        "dict[str, str]": "a mapping of names to texts",
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
