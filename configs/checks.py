"""What a config has to hold: of each option what the schema says of it, and what options ask of each other.

A check is whether something holds, and the sentence for when it does not. Nothing is computed or allocated here.
"""

import difflib
import functools
import math
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Annotated, Any, Literal, get_args, get_origin

from freeguide.configs.schema import Config, Length, Pattern, Range, TrainConfig, options
from freeguide.configs.secrets import masked_values

UNITS = 10**7  # of work in one job
Checks = Iterator[tuple[bool, str]]  # what has to hold, and the sentence for when it does not; later ones rely on earlier ones


def checks(config: Config, command: str) -> Checks:
    """Everything that has to hold of `config` for `command`, the values of single options first."""
    for key, kind in options().items():
        if not is_dataclass(kind):
            value = value_of(config, key)
            yield from _fits(key, kind, value, shown(config.written[key][0] if key in config.written else value))
    for contradictions in (_data_checks, _train_checks, _average_checks, _sampling_checks, _unit_checks):
        yield from contradictions(config, command)


def _fits(key: str, kind: Any, value: Any, whole: str, each: str = "") -> Checks:
    """Whether the value of an option, shown as `whole`, is what the schema says of its type; or `each` of the values in it."""
    marks: tuple[Any, ...] = ()
    if get_origin(kind) is Annotated:
        kind, marks = kind.__origin__, kind.__metadata__
    for mark in marks:
        if isinstance(mark, Range):
            yield _within(mark, value), f"{key}={whole}: {each}must be {_numbers(mark, kind)}"
        elif isinstance(mark, Pattern):
            yield re.fullmatch(mark.expression, value) is not None, f"{key}={whole}: {mark.words}"
        elif isinstance(mark, Length):
            yield mark.least <= len(value) <= mark.most, f"{key}={whole}: must hold {_lengths(mark)}"
    if get_origin(kind) is Literal:
        yield value in get_args(kind), f"{key}={whole}: {choices('values', str(value), [str(v) for v in get_args(kind)])}"
    elif isinstance(value, list | dict):
        kinds = get_args(kind) or (Any,)
        for part in value.values() if isinstance(value, dict) else value:
            yield from _fits(key, kinds[-1], part, whole, "each ")
    elif isinstance(value, int | float) and not marks:  # in a mapping that is handed on
        yield abs(value) < 2**64, f"{key}={whole}: its numbers must be finite and below 2**64"


def _within(range_: Range, value: float) -> bool:
    if value == range_.also:
        return True
    low = range_.least < value if range_.open in ("least", "both") else range_.least <= value
    return low and (value < range_.most if range_.open in ("most", "both") else value <= range_.most)


def _numbers(range_: Range, kind: Any) -> str:
    """What a range is in words."""
    low = "above" if range_.open in ("least", "both") else "from"
    high = {"": "to", "most": "to below", "least": "and up to", "both": "and below"}[range_.open]
    also = "" if range_.also is None else f", or {range_.also:g}"
    name = "a whole number" if kind is int else "a number"
    return f"{name} {low} {_figure(range_.least)} {high} {_figure(range_.most)}{also}"


def _figure(number: float) -> str:
    return f"{number:,}" if number < 2**53 else f"2**{math.log2(number + 1):g} - 1"


def _lengths(length: Length) -> str:
    return f"{length.least} values" if length.least == length.most else f"{length.least} to {length.most} values"


def shown(value: Any, quoted: bool = False) -> str:
    """A value in a sentence: without secrets, on one line, and not longer than one reads; a text in quotes if it is `quoted`."""
    try:
        text = " ".join((repr if quoted else str)(masked_values(value)).split())
    except ValueError:  # Python writes no number of thousands of digits
        return "a number of thousands of digits"
    return text if len(text) <= 300 else f"{text[:60]}...{text[-20:]}"


def value_of(config: Config, key: str) -> Any:
    return functools.reduce(getattr, key.split("."), config)


def _data_checks(config: Config, command: str) -> Checks:
    data, diffusion = config.data, config.diffusion
    if data.dtype == "uint8":
        yield data.channels in (1, 3), f"data.channels={data.channels}: 1 (grey) or 3 (RGB)"
    else:
        yield from _latent_checks(config, command)
    if command == "prepare":
        yield data.source == "digits" or data.path != "", f"data.path is empty: name what data.source={data.source} reads"
    yield (
        diffusion.p_uncond < 1 or command not in ("evaluate", "generate"),
        f"diffusion.p_uncond=1 trains no class at all, so {command} cannot sample one at any w: train with p_uncond < 1",
    )
    low, high = diffusion.logsnr_min, diffusion.logsnr_max
    yield low < high, f"diffusion.logsnr_min={low} is not below diffusion.logsnr_max={high}: swap them"
    asked = {
        "evaluate": ("evaluate.w", config.evaluate.w),
        "generate": ("generate.w", [config.generate.w]),
        "train": ("train.sample_w", [config.train.sample_w]),
    }
    key, weights = asked.get(command, ("", []))
    guided = next((w for w in weights if w), None)
    yield (
        diffusion.p_uncond > 0 or guided is None,
        f"diffusion.p_uncond=0 leaves the network without an unconditional mode, so {key}={guided} cannot be sampled: "
        f"train with p_uncond > 0 or ask for w=0",
    )


def _latent_checks(config: Config, command: str) -> Checks:
    dtype = f"data.dtype={config.data.dtype}"
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
    yield (
        train.precision == "fp32" or train.zero_stage >= 1,
        f"train.precision={train.precision} with train.zero_stage=0: DeepSpeed keeps fp32 masters from stage 1 on; "
        f"use stage 1 or fp32",
    )
    yield (
        command != "train" or not config.model.learn_sigma,
        "model.learn_sigma=true cannot be trained: the objective fixes the variance with v (sampling.v); set it to false",
    )
    yield (
        command != "train" or config.cluster.engine != "local" or workers == 1,
        f"cluster.engine=local trains in one process and cluster.workers={workers}; set cluster.workers=1, or cluster.engine=ray",
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
    for name in ("ema_half_lives", "ema_sigma_rel"):
        values = getattr(train, name)
        yield len(set(values)) == len(values), f"train.{name}={values}: each value once"
    sampled = config.sampling.ema
    kept = ["ema", "master", *(f"half_life_{n}" for n in train.ema_half_lives)]
    yield (
        command != "train" or sampled in kept or (sampled.startswith("sigma_rel_") and bool(train.ema_sigma_rel)),
        f"sampling.ema={sampled} is not kept by this training, whose sample grids need it: "
        f"add it to train.ema_half_lives or train.ema_sigma_rel",
    )


def _unit_checks(config: Config, command: str) -> Checks:
    evaluate, generate = config.evaluate, config.generate
    for group, images, unit, curves in (
        ("evaluate", evaluate.images, evaluate.unit, len(evaluate.w)),
        ("generate", generate.images, generate.unit, 1),
    ):
        count = -(-images // unit) * curves
        yield (
            count <= UNITS,
            f"{group}.images={images} in units of {group}.unit={unit} are {count:,} work units, and {UNITS:,} are the most that a "
            f"driver can hold: raise {group}.unit",
        )


def _sampling_checks(config: Config, command: str) -> Checks:
    interval, weights = config.sampling.interval, config.evaluate.w
    yield (
        len(interval) in (0, 2) and interval == sorted(set(interval)),
        f"sampling.interval={interval}: two log-SNRs, the lower one first, or an empty list",
    )
    evaluate = config.evaluate
    for name in ("dinov2_reference", "dinov2_hash"):
        given = getattr(evaluate, name)
        yield (
            evaluate.dinov2 != "" or given == "",
            f"evaluate.{name}={given} needs DINOv2's weights: set evaluate.dinov2 to their path",
        )
    yield (
        command != "fit-evaluator" or evaluate.extractor == "",
        f"evaluate.extractor={evaluate.extractor} names weights that are there already: leave it out to fit an evaluator",
    )
    yield (
        len({f"{w:g}" for w in weights}) == len(weights),
        f"evaluate.w={weights}: weights, each once to six digits",
    )


def choices(what: str, wrong: str, right: list[str]) -> str:
    """The nearest of the right names, or all of them where none is near."""
    if near := nearest(wrong, right):
        return f"did you mean {near}?"
    listed = ", ".join(right if len(right) <= 16 else [r for r in right if "." not in r]) or "none"
    return f"the {what} are: {listed}"


def nearest(wrong: str, right: list[str]) -> str:
    """The right name that `wrong` was meant to be, "" where none is near."""
    by_last_part = {name.rsplit(".", 1)[-1]: name for name in reversed(right)}
    near = difflib.get_close_matches(wrong, right, n=1, cutoff=0.6)
    near = near or [by_last_part[n] for n in difflib.get_close_matches(wrong.rsplit(".", 1)[-1], by_last_part, n=1, cutoff=0.75)]
    return near[0] if near else ""
