"""Guided sampling beside its peers: the same network, batch, levels and number of evaluations, in one process, taking turns.

    python benchmarks/sampling.py --quick                    # the digits network, 8x8
    python benchmarks/sampling.py --full --json rows.json    # the Fashion-MNIST network, 14x14, and one of 32x32 RGB
    python benchmarks/sampling.py --full --peers ENV/bin/python

One w: ours (`trainer.sampler`, noise keyed by the image's number, solver in float32 with float64 coefficients) against

    two forwards   what one writes from the paper: the network with and without the condition, one call each, plain DDIM
    diffusers      its pipelines' loop around DDIMScheduler and DPMSolverMultistepScheduler: one call of 2B rows, then `step`

The sweep: 14 w of the paper by `Sampler.sweep`, with and without a guidance interval, against 14 separate runs of the two-forward
loop, which guides at every level (w = 0 takes one forward there too).

The network has random weights: what it says costs nothing. Its rows are counted on both sides and must agree for one w. Peers draw
their noise from torch's generator, which is cheaper than ours. diffusers is looked for in the environment of `--peers`, whose
packages are put behind our own, so that both sides run on one torch; without it, its lines are left out.
Ratios are the median over pairs; CPU seconds of all threads say more than wall time where a machine is shared.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import machine
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from freeguide.configs.schema import Config, DataConfig, ModelConfig, SamplingConfig  # noqa: E402
from freeguide.trainer.networks.build import build_network, count_parameters  # noqa: E402
from freeguide.trainer.sampler import Sampler, sampling_levels  # noqa: E402

PAPER = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 2.0, 3.0, 4.0]
INTERVAL = [-2.13, 2.55]  # Kynkäänniemi et al. 2024, for EDM2-S: sigma in (0.28, 2.90]
W = 1.0
Sample = Callable[[], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    size: int
    channels: int
    model: ModelConfig
    batch: int
    steps: int
    pairs: int
    sweep: bool = True  # else one w only

    def config(self, **sampling: Any) -> Config:
        data = DataConfig(uri="", image_size=self.size, channels=self.channels, classes=10)
        options: dict[str, Any] = {"sampler": "ddim", "steps": self.steps, "batch": self.batch} | sampling
        return Config(name="benchmark", run="", data=data, model=self.model, sampling=SamplingConfig(**options))


def small(channels: int, attention: int) -> ModelConfig:
    return ModelConfig(channels=channels, channel_mult=[1, 2], res_blocks=1, attention=[attention], head_channels=32, dropout=0.0)


CASES = {
    "quick": [Case("digits 8x8", 8, 1, small(32, 4), 32, 8, 5)],
    "full": [
        Case("Fashion-MNIST 14x14", 14, 1, small(16, 7), 64, 16, 7),
        Case("RGB 32x32", 32, 3, small(64, 16), 16, 8, 5, sweep=False),
    ],
}


class Counted(nn.Module):
    """A network that counts the rows it is asked for."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.rows = network, 0

    def forward(self, z: Tensor, logsnr: Tensor, labels: Tensor) -> Tensor:
        self.rows += len(z)
        output: Tensor = self.network(z, logsnr, labels)
        return output


# --- the peers ---


def two_forwards(network: nn.Module, case: Case, labels: Tensor, w: float) -> Tensor:
    """Algorithm 2's levels, equation 6, DDIM's update and a clamp, in the fewest lines."""
    levels = sampling_levels(case.config()).float()
    alpha, sigma = levels.sigmoid().sqrt(), (-levels).sigmoid().sqrt()
    null = torch.full_like(labels, 10)
    with torch.inference_mode():
        z = torch.randn(len(labels), case.channels, case.size, case.size)
        for t in range(case.steps):
            logsnr = levels[t].expand(len(z))
            eps = network(z, logsnr, labels)
            if w:
                eps = (1 + w) * eps - w * network(z, logsnr, null)
            x = ((z - sigma[t] * eps) / alpha[t]).clamp(-1, 1)
            if t + 1 < case.steps:
                z = alpha[t + 1] * x + sigma[t + 1] * (z - alpha[t] * x) / sigma[t]
    return x


def diffusers_loop(network: nn.Module, case: Case, labels: Tensor, w: float, scheduler: Any) -> Tensor:
    """The loop of diffusers' guided pipelines; guidance_scale = 1 + w."""
    cumulative = scheduler.alphas_cumprod
    logsnrs = (cumulative / (1 - cumulative)).log()
    both = torch.cat((torch.full_like(labels, 10), labels))
    with torch.inference_mode():
        scheduler.set_timesteps(case.steps)
        latents = torch.randn(len(labels), case.channels, case.size, case.size) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            model_input = scheduler.scale_model_input(torch.cat([latents] * 2), t)
            uncond, text = network(model_input, logsnrs[t].expand(len(model_input)), both).chunk(2)
            latents = scheduler.step(uncond + (1 + w) * (text - uncond), t, latents).prev_sample
    return latents


def schedulers(python: str) -> dict[str, tuple[str, Any]]:
    """Our sampler's name -> diffusers' class and an instance of it, if diffusers can be found."""
    if python:
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        sys.path.append(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    try:
        import diffusers
    except ImportError:
        return {}
    cosine = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000}
    name = f"diffusers {diffusers.__version__}"
    return {
        "ddim": (f"{name} DDIMScheduler", diffusers.DDIMScheduler(**cosine)),
        "dpmpp_2m": (f"{name} DPMSolverMultistepScheduler", diffusers.DPMSolverMultistepScheduler(**cosine)),
    }


# --- the comparison ---


def timed(run: Sample, network: Counted) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds of all threads, and rows that the network was asked for."""
    rows, began, cpu = network.rows, time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - began, time.process_time() - cpu, network.rows - rows


def compare(
    case: Case, network: Counted, ours: Sample, theirs: Sample, names: tuple[str, str], same: bool = True
) -> dict[str, Any]:
    """Both in turn; for the `same` rows after one of each to warm up. Ratio > 1: ours is faster."""
    for run in (ours, theirs) if same else ():
        timed(run, network)
    pairs = []
    for number in range(case.pairs):
        order = (0, 1) if number % 2 else (1, 0)
        found = {i: timed((ours, theirs)[i], network) for i in order}
        pairs.append((found[0], found[1]))
    (_, _, mine), (_, _, other) = pairs[0]
    if same and mine != other:
        raise SystemExit(f"{names[0]} asked the network for {mine} rows and {names[1]} for {other}: they do not do the same work")
    wall, cpu = ([p[1][i] / p[0][i] for p in pairs] for i in (0, 1))
    seconds = [statistics.median(p[i][1] for p in pairs) for i in (0, 1)]
    per_image = [nfe / case.batch for nfe in (mine, other)]
    speeds = [case.batch / value for value in seconds]
    print(
        f"{case.name:20} {names[0]:22} {names[1]:46} {per_image[0]:6.0f} {per_image[1]:6.0f} {speeds[0]:9.1f} {speeds[1]:9.1f} "
        f"{statistics.median(cpu):8.2f} ({min(cpu):.2f} to {max(cpu):.2f}) {statistics.median(wall):8.2f}",
        flush=True,
    )
    return {
        "measure": f"{case.name}: {names[0]}",
        "ours": seconds[0] / case.batch,
        "peer": seconds[1] / case.batch,
        "peer_name": names[1],
        "ratio": statistics.median(cpu),
        "wall_ratio": statistics.median(wall),
        "nfe": per_image,
        "unit": "CPU s / image",
    }


def run(case: Case, peers: dict[str, tuple[str, Any]]) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    plain = build_network(case.model, image_size=case.size, channels=case.channels, classes=10).eval().requires_grad_(False)
    network = Counted(plain)
    print(f"{case.name}: {count_parameters(plain):,} parameters, T = {case.steps}, batch {case.batch}, w = {W:g}", flush=True)
    index, labels = torch.arange(case.batch), torch.arange(case.batch) % 10

    def sampler(**sampling: Any) -> Sampler:
        return Sampler(network, case.config(**sampling), torch.device("cpu"))

    rows = []
    for name in ("ddim", "ancestral"):
        ours = sampler(sampler=name)
        rows.append(
            compare(
                case,
                network,
                lambda ours=ours: ours.sample(index, labels, W),  # type: ignore[misc]
                lambda: two_forwards(network, case, labels, W),
                (f"{name}, one w", "two forwards a level, plain DDIM"),
            )
        )
    for name, (peer, scheduler) in peers.items():
        # diffusers' multistep solver does not clamp x, so ours does not either there.
        ours = sampler(sampler=name, clip=name == "ddim", spacing="logsnr" if name == "dpmpp_2m" else "u")
        rows.append(
            compare(
                case,
                network,
                lambda ours=ours: ours.sample(index, labels, W),  # type: ignore[misc]
                lambda scheduler=scheduler: diffusers_loop(network, case, labels, W, scheduler),  # type: ignore[misc]
                (f"{name}, one w", peer),
            )
        )
    return rows + (sweeps(dataclasses.replace(case, pairs=3, batch=8, steps=16), network) if case.sweep else [])


def sweeps(case: Case, network: Counted) -> list[dict[str, Any]]:
    """The paper's 14 w at once, in two spacings of the levels, with and without an interval."""
    index, labels = torch.arange(case.batch), torch.arange(case.batch) % 10
    rows = []
    for spacing, interval in (("u", []), ("u", INTERVAL), ("logsnr", INTERVAL)):
        ours = Sampler(network, case.config(interval=interval, spacing=spacing), torch.device("cpu"))
        if interval and not any(interval[0] <= logsnr < interval[1] for logsnr in sampling_levels(ours.config).tolist()):
            raise SystemExit(f"none of {case.steps} levels lies in the interval {interval}: every w would give the same images")
        name = f"14 w, {spacing}, {'interval' if interval else 'everywhere'}"

        def together(ours: Sampler = ours) -> Tensor:
            return list(ours.sweep(index, labels, PAPER))[-1].images

        def naive() -> Tensor:
            return [two_forwards(network, case, labels, w) for w in PAPER][-1]

        def alone(ours: Sampler = ours) -> Tensor:
            return [ours.sample(index, labels, w) for w in PAPER][-1]

        rows.append(compare(case, network, together, naive, (name, "14 times two forwards a level"), same=False))
        if interval:  # what sharing the beginning alone is worth
            rows.append(compare(case, network, together, alone, (name, "ours, each w by itself"), same=False))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", dest="size", const="quick", default="quick")
    size.add_argument("--full", action="store_const", dest="size", const="full")
    parser.add_argument("--json", metavar="PATH", help="write the rows there")
    parser.add_argument("--peers", metavar="PYTHON", default="", help="Python of an environment with diffusers")
    options = parser.parse_args()
    torch.set_num_threads(1)
    stated = {"size": options.size, "threads": str(torch.get_num_threads()), "precision": "fp32", **machine("torch")}
    print(", ".join(f"{name} {value}" for name, value in stated.items()))
    peers = schedulers(options.peers)
    if not peers:
        print("diffusers is not there; its lines are left out (pip install diffusers, or --peers)")
    print(f"{'':20} {'ours':22} {'peer':46} {'NFE':>6} {'peer':>6} {'img/CPU s':>9} {'peer':>9} ratio by CPU (range)    by wall")
    rows = [row | {"conditions": stated} for case in CASES[options.size] for row in run(case, peers)]
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
