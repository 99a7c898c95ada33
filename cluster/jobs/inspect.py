"""`freeguide inspect` and `--dry-run`: what a config means and costs, without a cluster."""

import dataclasses
import itertools
import time

import torch

from freeguide.cluster.evaluation.report.figure_2 import draw_figure_2
from freeguide.configs.errors import CheckpointError, UserError
from freeguide.configs.locations import check_target
from freeguide.configs.schema import Config, TrainConfig
from freeguide.configs.stored import to_yaml
from freeguide.configs.sweep import screen_images, sweep
from freeguide.data_pipeline import quality
from freeguide.data_pipeline.order import choose_order
from freeguide.data_pipeline.store.base import Retry
from freeguide.data_pipeline.store.open import open_data, open_store
from freeguide.data_pipeline.stored import load_manifest
from freeguide.trainer.checkpoints import search
from freeguide.trainer.networks.build import build_network, count_parameters, forward_flops
from freeguide.trainer.sampler import sweep_evaluations
from freeguide.trainer.training.devices import REFERENCE, cpu_flops, peak_flops, peak_of
from freeguide.trainer.training.loop import fitted, misfits, misguided

SHARE = 0.4  # of its peak that a large network may be expected to reach
ASSUMED = 1000  # classes, where there are no data yet
_SMALL_PARAMETERS, _SMALL_FLOPS, _TRIAL_FLOPS = 50_000_000, 2 * 10**9, 5 * 10**8  # of a network that is tried within seconds
_TRIALS, _TRIAL_SECONDS = 3, 0.5  # at least; other work on the machine slows single ones a hundredfold
_BRIEFLY = Retry(attempts=1, connect_s=2.0, read_s=2.0, first_s=3.0)


def inspect(config: Config, order: bool = False, theory: str | None = None) -> None:
    """Print the config, the network's size, and what a step, a checkpoint and an evaluation cost. Raises UserError.

    Times are those of the machine at hand, in the precision that the config asks for. With `order`, also how well its order of its
    data set mixes; with `theory`, also draw the paper's figure 2 into that PNG. Both are made first, as they may be refused.
    """
    more = [*([_order(config)] if order else []), *([_theory(config, theory)] if theory else [])]
    print(to_yaml(config))
    _costs(config)
    for text in more:
        print(f"\n{text}")


def _costs(config: Config) -> None:
    config, notes = _with_data(config)
    images = {"image_size": config.data.image_size, "channels": config.data.channels, "classes": config.data.classes}
    with torch.device("meta"):
        parameters = count_parameters(build_network(config.model, **images))
    flops = forward_flops(config.model, **images)
    train, workers = config.train, config.cluster.workers
    share = train.global_batch // workers
    micro = train.micro_batch or share
    seen = train.global_batch * train.steps
    series, few = sweep(config), screen_images(config.evaluate)
    nfe = sum(sweep_evaluations(one, sorted(config.evaluate.w)) for one in series) * config.evaluate.images
    training = _speed(config, train.precision, parameters, flops)
    sampling = _speed(config, config.sampling.precision, parameters, flops)
    rows = {
        "parameters": f"{parameters:,}",
        "forward cost of an image": f"{flops / 1e9:,.3f} GFLOP (2 per multiply-accumulate)",
        "global batch": f"{train.global_batch} = {workers} workers x {share // micro} accumulation x {micro} micro-batch",
        "cost of a training step": f"{3 * flops * train.global_batch / 1e12:,.3f} TFLOP (forward, and twice that backward)",
        "cost of the training": f"{3 * flops * seen / 1e18:,.4g} EFLOP, {seen:,} images, {_hours(3 * flops * seen, training)}",
        "ZeRO state per worker": f"{_mib(_state_bytes(parameters, train, workers))} (weights, gradients, moments, average)",
        "checkpoint": f"{_mib(16 * parameters)} (fp32 weights, two moments, average)",
        "evaluation": (f"{len(series)} series x " if len(series) > 1 else "")
        + f"{len(config.evaluate.w)} values of w x {config.evaluate.images} images, {nfe:,} network evaluations, "
        f"{nfe * flops / 1e18:,.4g} EFLOP, {_hours(nfe * flops, sampling)}"
        + (f"; less where the screen of {few} images leaves a w out" if few else ""),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")
    for note in notes:
        print(f"WARNING: {note}")


def _with_data(config: Config) -> tuple[Config, list[str]]:
    """The config with the number of classes of its data set, and what is absurd for it; without one, what is assumed."""
    try:
        store = open_data(config.data, _BRIEFLY)
        store.check(write=False)
        manifest = load_manifest(store)
    except UserError as error:
        if config.data.classes:
            return config, []
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, classes=ASSUMED))
        return config, [f"the number of classes is not known before the data are there, and taken for {ASSUMED} ({error})"]
    config = fitted(config, manifest)
    return config, [*misfits(config, manifest.samples), *misguided(config, "evaluate")]


@dataclasses.dataclass(frozen=True)
class _Speed:
    """FLOP/s that a network may be expected to reach, on what, and why. None: not known."""

    here: float | None
    machine: str
    precision: str


def _speed(config: Config, precision: str, parameters: int, flops: int) -> _Speed:
    if torch.cuda.is_available() and config.cluster.gpus_per_worker:
        name, peak = torch.cuda.get_device_name(), peak_flops(torch.device("cuda"), precision)
        return _Speed(peak and SHARE * peak, f"GPU-hours at {SHARE:.0%} of the {precision} peak of {name}", precision)
    if parameters <= _SMALL_PARAMETERS and flops <= _SMALL_FLOPS:
        return _Speed(_measured(config, precision, flops), f"hours on this CPU in {precision}, as this network ran", precision)
    return _Speed(
        SHARE * cpu_flops(precision), f"hours on this CPU at {SHARE:.0%} of its matrix products in {precision}", precision
    )


def _measured(config: Config, precision: str, flops: int) -> float:
    """FLOP/s of forwards of the network itself on the CPU: small ones are far from what matrix products reach."""
    data = config.data
    network = build_network(config.model, image_size=data.image_size, channels=data.channels, classes=data.classes).eval()
    count = max(1, min(config.sampling.batch, _TRIAL_FLOPS // flops))
    z = torch.zeros(count, data.channels, data.image_size, data.image_size)
    best, end = float("inf"), time.perf_counter() + _TRIAL_SECONDS
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=precision != "fp32"):
        for trial in itertools.count():
            began = time.perf_counter()
            if trial >= _TRIALS and began > end:
                break
            network(z, torch.zeros(count), torch.zeros(count, dtype=torch.int64))
            best = min(best, time.perf_counter() - began)
    return count * flops / best


def inspect_run(uri: str) -> None:
    """Print where the run at `uri` stands. Raises UserError if there is none."""
    store = open_store(uri)
    store.check(write=False)
    state = search.describe(store)
    if not state["checkpoints"] and not state["damaged"]:
        raise CheckpointError(f"{uri}: no run stands here; give a config file, or the URI that a config calls `run`")
    width = max(map(len, state))
    for name, value in state.items():
        lines = value if name == "damaged" else [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else [value]
        for i, line in enumerate(lines):
            print(f"{'' if i else name:<{width}}  {line}")


def _order(config: Config) -> str:
    """How well this config's order of its data set mixes, beside independent draws. Raises UserError without the data set."""
    store = open_data(config.data)
    store.check(write=False)
    manifest = load_manifest(store)
    batch = config.train.global_batch
    return quality.table(manifest, choose_order(manifest, batch, config.seed), batch)


def _theory(config: Config, path: str) -> str:
    """Draw figure 2 of the paper, and what Algorithm 2 with the config's steps and v really samples, into a PNG."""
    check_target("--theory", path)
    draw_figure_2(path, steps=config.sampling.steps, v=config.sampling.v, seed=config.sampling.seed)
    return f"figure 2 of the paper, and samples with T={config.sampling.steps}, v={config.sampling.v:g}: {path}"


def _state_bytes(parameters: int, train: TrainConfig, workers: int) -> int:
    """Bytes of weights and gradients in the working precision, fp32 masters, two moments and the average, split as ZeRO does."""
    stage, working = train.zero_stage, 4 if train.precision == "fp32" else 2
    averages = 1 + len(train.ema_half_lives) + len(train.ema_sigma_rel)
    weights = working * parameters // (workers if stage == 3 else 1)
    gradients = working * parameters // (workers if stage >= 2 else 1)
    states = (4 * averages + (8 if train.precision == "fp32" else 12)) * parameters // (workers if stage >= 1 else 1)
    return weights + gradients + states


def _hours(flops: float, speed: _Speed) -> str:
    there = peak_of(REFERENCE, speed.precision)
    assert there is not None
    here = f"{flops / speed.here / 3600:,.3g} {speed.machine}" if speed.here else f"not known: {speed.machine} (it has no entry)"
    return f"{here}; {flops / (SHARE * there) / 3600:,.3g} GPU-hours on an H100 SXM ({speed.precision}, {SHARE:.0%})"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"
