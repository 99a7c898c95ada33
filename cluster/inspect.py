"""`freeguide inspect` and `--dry-run`: what a config means and costs, without a cluster."""

import torch

from configs.errors import CheckpointError
from configs.load import screen_images, sweep, to_yaml
from configs.schema import Config, TrainConfig
from data_pipeline import quality
from data_pipeline.data_store import open_data
from data_pipeline.manifest import load_manifest
from data_pipeline.order import Order
from data_pipeline.store import open_store
from trainer import checkpoint
from trainer.diffusion.theory import draw_figure_2
from trainer.networks.build import build_network, count_parameters, forward_flops
from trainer.sampler import sweep_evaluations
from trainer.telemetry import PEAK_FLOPS


def inspect(config: Config) -> None:
    """Print the resolved config, the network's size, and what a step, a checkpoint and an evaluation cost. Raises ConfigError."""
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
    rows = {
        "parameters": f"{parameters:,}",
        "forward cost of an image": f"{flops / 1e9:,.3f} GFLOP (2 per multiply-accumulate)",
        "global batch": f"{train.global_batch} = {workers} workers x {share // micro} accumulation x {micro} micro-batch",
        "cost of a training step": f"{3 * flops * train.global_batch / 1e12:,.3f} TFLOP (forward, and twice that backward)",
        "cost of the training": f"{3 * flops * seen / 1e18:,.4g} EFLOP, {seen:,} images, {_hours(3 * flops * seen)}",
        "ZeRO state per worker": f"{_mib(_state_bytes(parameters, train, workers))} (weights, gradients, moments, average)",
        "checkpoint": f"{_mib(16 * parameters)} (fp32 weights, two moments, average)",
        "evaluation": (f"{len(series)} series x " if len(series) > 1 else "")
        + f"{len(config.evaluate.w)} values of w x {config.evaluate.images} images, {nfe:,} network evaluations, "
        f"{nfe * flops / 1e18:,.4g} EFLOP, {_hours(nfe * flops)}"
        + (f"; less where the screen of {few} images leaves a w out" if few else ""),
    }
    print(to_yaml(config))
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:<{width}}  {value}")


def inspect_run(uri: str) -> None:
    """Print where the run at `uri` stands. Raises UserError if there is none."""
    store = open_store(uri)
    store.check()
    state = checkpoint.describe(store)
    if not state["checkpoints"] and not state["damaged"]:
        raise CheckpointError(f"{uri}: no run stands here; give a config file, or the URI that a config calls `run`")
    width = max(map(len, state))
    for name, value in state.items():
        lines = value if name == "damaged" else [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else [value]
        for i, line in enumerate(lines):
            print(f"{'' if i else name:<{width}}  {line}")


def inspect_order(config: Config) -> None:
    """Print how well this config's order of its data set mixes, beside independent draws. Raises UserError without the data set."""
    store = open_data(config.data)
    store.check(write=False)
    manifest = load_manifest(store)
    batch = config.train.global_batch
    print()
    print(quality.table(manifest, Order.choose(manifest, batch, config.seed), batch))


def inspect_theory(config: Config, path: str) -> None:
    """Draw figure 2 of the paper, and what Algorithm 2 with the config's steps and v really samples, into a PNG."""
    draw_figure_2(path, steps=config.sampling.steps, v=config.sampling.v, seed=config.sampling.seed)
    print(f"\nfigure 2 of the paper, and samples with T={config.sampling.steps}, v={config.sampling.v:g}: {path}")


def _state_bytes(parameters: int, train: TrainConfig, workers: int) -> int:
    """Bytes of weights and gradients in the working precision, fp32 masters, two moments and the average, split as ZeRO does."""
    stage, working = train.zero_stage, 4 if train.precision == "fp32" else 2
    averages = 1 + len(train.ema_half_lives) + len(train.ema_sigma_rel)
    weights = working * parameters // (workers if stage == 3 else 1)
    gradients = working * parameters // (workers if stage >= 2 else 1)
    states = (4 * averages + (8 if train.precision == "fp32" else 12)) * parameters // (workers if stage >= 1 else 1)
    return weights + gradients + states


def _hours(flops: float) -> str:
    return f"{flops / (0.4 * PEAK_FLOPS['H100']) / 3600:,.3g} GPU-hours at 40 % of an H100's bf16 peak"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.1f} GiB"
