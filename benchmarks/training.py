"""A step of ours beside a bare PyTorch DDP loop: the same network, global batch, optimizer and thread count, on 1 and 2 processes.

    python benchmarks/training.py --quick                    # the digits network in fp32
    python benchmarks/training.py --full --json rows.json    # three networks, fp32 and bf16
    python benchmarks/training.py --gpu                      # images/s and MFU of the 64x64 network in bf16, on one GPU

The networks are those of configs/digits.yaml and configs/fashion_mnist.yaml, and the latter's at 28x28 and 64 channels: steps of
tenths of a second, and of seconds, so that what a step costs once is told from what grows with it. Images are random; each process
computes with one thread.

The bare loop is Algorithm 1 in fifteen lines: DistributedDataParallel, clipping, the fused AdamW; bf16 by torch.autocast. It has
for free: batches that are decoded and in memory, random numbers in the order of torch's own generator, no average of the weights,
no records, no checkpoints, no guard against a rank that hangs. Ours is `trainer.training.loop.take_step`, everything that a
training does, and between the steps the ranks' agreement.

Both live in the same processes and take turns, block by block. Overhead is the median of the pairs' ratios, with its quartiles: of
the wall time, and of the CPU seconds of rank 0's process (decoding included), which other work on the machine disturbs less. The
shares of a step are CPU seconds of the thread that trains, beside those of all other threads. Checkpoints are timed apart.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from machine import machine
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from freeguide.configs.load import load_config
from freeguide.configs.schema import Config
from freeguide.data_pipeline.manifest import Schema
from freeguide.data_pipeline.shards import Sample, Source, write_shards
from freeguide.data_pipeline.store.open import open_store
from freeguide.data_pipeline.stream import Batch
from freeguide.trainer.diffusion import objective
from freeguide.trainer.networks.build import build_network, count_parameters, forward_flops
from freeguide.trainer.networks.layers import DropoutKey
from freeguide.trainer.training.devices import peak_flops
from freeguide.trainer.training.failures import Agreement
from freeguide.trainer.training.loop import Run, assemble, take_step

ROOT = Path(__file__).parents[1]
_FASHION_28 = ["data.image_size=28", "model.channels=64", "model.channel_mult=[1,2,2]", "model.attention=[14,7]"]
NETWORKS: dict[str, tuple[str, list[str], int, int]] = {  # config, overrides, pairs of blocks, steps of a block
    "digits": ("digits", [], 30, 1),
    "fashion": ("fashion_mnist", [], 30, 1),
    "fashion28": ("fashion_mnist", [*_FASHION_28, "train.global_batch=32"], 10, 1),
    "imagenet64": ("imagenet64", ["train.precision=bf16"], 0, 0),
}
CASES: dict[str, list[tuple[str, str, tuple[int, ...]]]] = {  # network, precision, ZeRO stages; each on 1 and 2 processes
    "quick": [("digits", "fp32", (0, 2))],
    "full": [
        ("digits", "fp32", (0, 2)),
        ("digits", "bf16", (2,)),
        ("fashion", "fp32", (0, 1)),
        ("fashion", "bf16", (1,)),
        ("fashion28", "fp32", (1,)),
        ("fashion28", "bf16", (1,)),
    ],
}
GPU_STEPS = (5, 20)  # steps before the clock starts, steps that it sees


def config_of(network: str, folder: str, *overrides: str) -> Config:
    """The configuration that is measured, on the data of `write_data`, in a run of its own that all ranks share."""
    name, changes, _, _ = NETWORKS[network]
    run = "-".join([network, *(text.split("=")[1] for text in overrides), os.environ.get("WORLD_SIZE", "1")])
    places = [f"data.uri={folder}/{network}", f"run={folder}/runs/{run}"]
    config = load_config(ROOT / "configs" / f"{name}.yaml", [*changes, *places, *overrides])
    config.train.steps, config.train.warmup_steps, config.train.lr, config.train.watchdog_seconds = 1_000_000, 0, 1e-4, 0.0
    return config


def write_data(network: str, folder: str) -> None:
    """2048 images of noise, of the size and with the classes that the network's config speaks of."""
    data = config_of(network, folder).data
    shape = (2048, data.image_size, data.image_size, data.channels)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    schema = Schema(data.image_size, data.channels, data.classes)
    source = Source(schema, len(noise), lambda i: Sample(noise[i], i % data.classes), "uniform noise")
    write_shards(source, open_store(data.uri), shard_samples=256)


class Parts:
    """CPU seconds of this thread, by the part of the step that took them; parts may lie within each other."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        began = time.thread_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.thread_time() - began

    def wrap(self, owner: Any, function: str, name: str) -> None:
        """Measure every call of owner.function."""
        original = getattr(owner, function)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return original(*args, **kwargs)

        setattr(owner, function, timed)


class BareLoop:
    """What a PyTorch user would write: `step()` is one optimizer step on a batch that is already in memory."""

    def __init__(self, config: Config, batches: list[Batch], parts: Parts) -> None:
        data, train = config.data, config.train
        self.config, self.batches, self.at, self.parts = config, batches, 0, parts
        images = {"image_size": data.image_size, "channels": data.channels, "classes": data.classes}
        self.network: nn.Module = build_network(config.model, **images)
        self.ddp = DistributedDataParallel(self.network)
        self.adamw = torch.optim.AdamW(self.ddp.parameters(), lr=train.lr, weight_decay=0.0, fused=True)

    def step(self) -> None:
        batch = self.batches[self.at % len(self.batches)]
        self.at += 1
        x, b = batch.images, len(batch.images)
        with self.parts.part("noise"):
            logsnr = -2 * torch.log(torch.tan(torch.rand(b) * 1.5707 + 4e-5))
            alpha, sigma = (torch.sigmoid(s * logsnr).sqrt()[:, None, None, None] for s in (1, -1))
            eps = torch.randn_like(x)
            z = alpha * x + sigma * eps
            labels = torch.where(torch.rand(b) < 0.1, self.config.data.classes, batch.labels)
        dropout = DropoutKey(0, batch.index) if self.config.model.dropout else None
        with self.parts.part("forward"), torch.autocast("cpu", torch.bfloat16, enabled=self.config.train.precision == "bf16"):
            loss = (self.ddp(z, logsnr, labels, dropout) - eps).square().mean()
        with self.parts.part("backward"):
            loss.backward()
        with self.parts.part("update"):
            nn.utils.clip_grad_norm_(self.ddp.parameters(), self.config.train.grad_clip)
            self.adamw.step()
            self.adamw.zero_grad(set_to_none=True)


def block(step: Callable[[], None], steps: int, settle: Callable[[], None]) -> tuple[float, float, float]:
    """Per step of a block that all ranks begin together: wall seconds, this rank's CPU seconds, those of other threads.

    `settle` waits for what the steps have begun in other threads: its CPU seconds belong to them, its wall seconds to nobody.
    """
    dist.barrier()
    wall, cpu, thread = time.perf_counter(), time.process_time(), time.thread_time()
    for _ in range(steps):
        step()
    dist.barrier()
    wall = time.perf_counter() - wall
    settle()
    thread, cpu = time.thread_time() - thread, time.process_time() - cpu
    return wall / steps, cpu / steps, (cpu - thread) / steps


def our_step(run: Run, parts: Parts) -> tuple[Callable[[], None], Agreement]:
    """A step of `run` with its parts measured, and the agreement to close after the last one."""
    agreement, done = Agreement(3), 0
    for owner, function, name in (
        (objective, "training_loss", "noise and forward"),
        (objective, "noised", "noise"),
        (run.engine, "accumulate", "backward"),
        (run.engine, "step", "update"),
        (run.ema, "update", "averages"),
        (run.telemetry, "record", "records"),
        (agreement, "exchange", "agreement"),
    ):
        parts.wrap(owner, function, name)

    def step() -> None:
        nonlocal done
        take_step(run, done)
        done += 1
        agreement.exchange(0, 0, 0)

    return step, agreement


def measure(network: str, precision: str, stage: int, folder: str) -> dict[str, Any]:
    """One rank's part of one paired measurement; the numbers are rank 0's."""
    _, _, pairs, steps = NETWORKS[network]
    config = config_of(network, folder, f"train.precision={precision}", f"train.zero_stage={stage}")
    run, _ = assemble(config)
    parts = {"ours": Parts(), "bare": Parts()}
    bare = BareLoop(config, [next(run.reader) for _ in range(8)], parts["bare"])
    ours, agreement = our_step(run, parts["ours"])

    def settle() -> None:
        while run.reader.stats()["ready_batches"] < config.data.prefetch_batches:
            time.sleep(0.005)

    for step in (ours, bare.step):
        block(step, 3, settle)
    for each in parts.values():
        each.seconds.clear()
    times: dict[str, list[tuple[float, float, float]]] = {"ours": [], "bare": []}
    for pair in range(pairs):
        for name, step in (("ours", ours), ("bare", bare.step))[:: 1 if pair % 2 else -1]:
            times[name].append(block(step, steps, settle))
    shares = {name: {p: s / (pairs * steps) for p, s in each.seconds.items()} for name, each in parts.items()}
    shares["ours"]["forward"] = shares["ours"].pop("noise and forward") - shares["ours"]["noise"]
    result: dict[str, Any] = {"shares": shares, "stall": checkpoint_stall(run), "parameters": count_parameters(bare.network)}
    for name, blocks in times.items():
        result[name] = dict(zip(("wall", "cpu", "other"), map(statistics.median, zip(*blocks, strict=True)), strict=True))
        shares[name]["other threads"] = statistics.mean(other for _, _, other in blocks)  # they work in bursts
    for i, clock in enumerate(("wall", "cpu")):
        result[f"{clock}_ratios"] = [o[i] / b[i] for o, b in zip(times["ours"], times["bare"], strict=True)]
    agreement.close()
    run.reader.close()
    run.telemetry.close()
    return result


def checkpoint_stall(run: Run) -> float:
    """Median seconds for which a checkpoint stops the steps, when the one before it is complete."""
    stalls = []
    for step in range(1, 6):
        run.writer.finish()
        dist.barrier()
        stalls.append(run.writer.start(step, run.incidents.bad_steps))
    run.writer.finish()
    return statistics.median(stalls)


def throughput(config: Config, warm_up: int, steps: int) -> dict[str, float | None]:
    """Images per second and MFU of one process that trains alone, on its GPU or, to try this out, on the CPU."""
    run, _ = assemble(config)
    with run.reader:
        for step in range(warm_up + steps):
            if step == warm_up:
                _wait_for(run.engine.device)
                began = time.perf_counter()
            take_step(run, step)
        _wait_for(run.engine.device)
        images = steps * config.train.global_batch / (time.perf_counter() - began)
    run.telemetry.close()
    data, peak = config.data, peak_flops(run.engine.device, config.train.precision)
    flops = 3 * forward_flops(config.model, data.image_size, data.channels, data.classes)  # a backward pass costs two forwards
    return {"images_per_second": images, "mfu": images * flops / peak if peak else None}


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def launch(world_size: int, *arguments: str) -> dict[str, Any]:
    """What rank 0 of `world_size` processes of this machine prints, one thread each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": str(world_size), "OMP_NUM_THREADS": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, __file__, "--rank", *arguments]
    ranks = [
        subprocess.Popen(command, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True)
        for r in range(world_size)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"a rank of the benchmark failed:\n{outputs[0]}")
    result: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return result


HEAD = (
    "| network | precision | workers | ZeRO | ours, ms | bare, ms | overhead, wall % | CPU % | stall, ms | stall, steps |\n"
    "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
)
SHARES = ("noise", "forward", "backward", "update", "averages", "records", "agreement", "other threads")


def spread(ratios: list[float]) -> str:
    """An overhead in percent: the median over pairs of blocks; in brackets its quartiles."""
    low, middle, high = (100 * (ratio - 1) for ratio in statistics.quantiles(ratios, n=4))
    return f"{middle:.1f} ({low:.1f}, {high:.1f})"


def line(case: tuple[str, str, int, int], r: dict[str, Any]) -> str:
    cells = [
        *map(str, case),
        *(f"{1000 * r[name]['wall']:.1f}" for name in ("ours", "bare")),
        *(spread(r[f"{clock}_ratios"]) for clock in ("wall", "cpu")),
        f"{1000 * r['stall']:.1f}",
        f"{r['stall'] / r['ours']['wall']:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def share_lines(case: tuple[str, str, int, int], r: dict[str, Any]) -> str:
    """CPU milliseconds of a step by part, ours and the bare loop's; the averages also in percent of our step."""
    lines = []
    for name in ("ours", "bare"):
        shares = r["shares"][name]
        cells = [f"{1000 * shares[part]:.2f}" if part in shares else "" for part in SHARES]
        percent = f"{100 * shares['averages'] / r[name]['cpu']:.2f}" if "averages" in shares else ""
        lines.append(f"| {' '.join(map(str, case))} | {name} | {1000 * r[name]['cpu']:.1f} | {' | '.join(cells)} | {percent} |")
    return "\n".join(lines)


def rows(case: tuple[str, str, int, int], r: dict[str, Any], stated: dict[str, str]) -> list[dict[str, Any]]:
    """The same as rows of the common format, with what is `stated` of all; ratio > 1 means that ours is better."""
    network, precision, workers, stage = case
    conditions = {
        "network": network,
        "precision": precision,
        "workers": workers,
        "zero_stage": stage,
        "parameters": r["parameters"],
        **stated,
    }
    ours, bare, averages = r["ours"], r["bare"], r["shares"]["ours"]["averages"]
    measured = [
        ("training step", ours["wall"], bare["wall"], "bare DDP loop", 1 / statistics.median(r["wall_ratios"])),
        ("training step, CPU", ours["cpu"], bare["cpu"], "bare DDP loop", 1 / statistics.median(r["cpu_ratios"])),
        ("checkpoint stall", r["stall"], ours["wall"], "one step of ours", ours["wall"] / r["stall"]),
        ("averages of a step, CPU", averages, ours["cpu"], "one step of ours", ours["cpu"] / averages),
    ]
    return [
        {"measure": m, "ours": us, "peer": peer, "peer_name": name, "ratio": ratio, "unit": "s", "conditions": conditions}
        for m, us, peer, name, ratio in measured
    ]


def compare(size: str, only: str, folder: str) -> list[dict[str, Any]]:
    """Measure the cases of a size, of all its networks or `only` one, and print their tables."""
    stated = {"threads": "1 per worker", **machine("torch", "deepspeed")}
    print(", ".join(f"{name} {value}" for name, value in stated.items()) + f"\n{HEAD}")
    found: list[dict[str, Any]] = []
    shares = []
    for network, precision, stages in (case for case in CASES[size] if only in ("", case[0])):
        write_data(network, folder)
        for case in [(network, precision, workers, stage) for workers in (1, 2) for stage in stages]:
            result = launch(case[2], network, precision, str(case[3]), folder)
            print(line(case, result), flush=True)
            shares.append(share_lines(case, result))
            found += rows(case, result, stated)
    print(f"\nCPU ms of a step\n| case | | all | {' | '.join(SHARES)} | averages, % |\n|---|---|{'---:|' * (len(SHARES) + 2)}")
    print("\n".join(shares))
    return found


def gpu(folder: str, micro_batch: int) -> list[dict[str, Any]]:
    """Images/s and MFU of the paper's 64x64 network, plain and compiled; each in a process of its own."""
    if not torch.cuda.is_available():
        raise SystemExit("--gpu measures a GPU, and torch sees none here; run it on a machine that has one")
    write_data("imagenet64", folder)
    device = torch.cuda.get_device_name()
    found: list[dict[str, Any]] = []
    for compiled in ("false", "true"):
        r = launch(1, "imagenet64", compiled, str(micro_batch), folder)
        images, mfu = r["images_per_second"], r["mfu"]
        known = f"MFU {100 * mfu:.1f} %" if mfu else "no MFU, as no peak of this device is known"
        print(f"{device}, bf16, batch {micro_batch}, compile={compiled}: {images:.1f} images/s, {known}", flush=True)
        conditions = {
            **machine("torch", "deepspeed"),
            "device": device,
            "precision": "bf16",
            "compile": compiled,
            "batch": micro_batch,
            "mfu": mfu,
        }
        row = {"measure": "training on a GPU", "ours": images, "peer": None, "peer_name": None, "ratio": None, "unit": "images/s"}
        found.append({**row, "conditions": conditions})
    return found


def rank(arguments: list[str]) -> dict[str, Any]:
    """One process of a measurement."""
    network, first, second, folder = arguments
    if network != "imagenet64":
        return measure(network, first, int(second), folder)
    batch = [f"train.compile={first}", f"train.global_batch={second}", "train.micro_batch=0", "train.zero_stage=1"]
    return throughput(config_of(network, folder, *batch), *GPU_STEPS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    for name in ("quick", "full", "gpu"):
        size.add_argument(f"--{name}", action="store_const", dest="size", const=name, default="quick")
    parser.add_argument("--network", default="", choices=[n for n in NETWORKS if n != "imagenet64"], help="only it")
    parser.add_argument("--micro-batch", type=int, default=32, help="images of a step with --gpu")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there")
    parser.add_argument("--rank", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        print(json.dumps(rank(options.rank)))
        return
    with tempfile.TemporaryDirectory(prefix="freeguide-benchmark-") as folder:
        found = gpu(folder, options.micro_batch) if options.size == "gpu" else compare(options.size, options.network, folder)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
