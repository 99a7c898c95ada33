"""A step of ours beside a bare PyTorch DDP loop: the same network, global batch, optimizer and thread count, on 1 and 2 processes.

    python benchmarks/training.py --quick                    # the digits network, about two minutes
    python benchmarks/training.py --full --json rows.json    # 32x32 RGB, a network of 6 million parameters

The bare loop is Algorithm 1 in fifteen lines: batches already in memory, torch's own random numbers, DistributedDataParallel in
fp32, clipping, the fused AdamW. Ours is `trainer.loop.take_step`, everything that a training does: samples streamed and decoded
from shards, randomness keyed by the sample, ZeRO, the average, the records; and between the steps the ranks' agreement. Both live
in the same processes and take turns, block by block; the median pair counts. Overhead is also given in CPU seconds of all threads,
decoding included, which other work on the machine disturbs less. Checkpoints are timed apart.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from configs.schema import Config, DataConfig, ModelConfig, TrainConfig
from data_pipeline.manifest import Schema
from data_pipeline.shards import Sample, Source, write_shards
from data_pipeline.sources import digits
from data_pipeline.store import open_store
from data_pipeline.stream import Batch
from trainer.failures import Agreement
from trainer.loop import Run, assemble, take_step
from trainer.networks.build import build_network, count_parameters
from trainer.networks.layers import DropoutKey

ROOT = Path(__file__).parents[1]
SIZES = {"quick": (40, 1), "full": (60, 2)}  # pairs of blocks, steps of a block; short blocks meet the same disturbances


def config_of(size: str, stage: int, folder: str) -> Config:
    """The configuration that is measured; fp32, because that is what the bare loop computes in."""
    train = TrainConfig(precision="fp32", zero_stage=stage, lr=1e-4, ema_decay=0.999, steps=1_000_000, watchdog_seconds=0)
    if size == "quick":
        train.global_batch = 128
        data = DataConfig(uri=f"{folder}/digits", image_size=8, channels=1, classes=10, flip=False)
        model = ModelConfig(channels=32, channel_mult=[1, 2], res_blocks=1, attention=[4], head_channels=32, dropout=0.0)
    else:
        train.global_batch = 32
        data = DataConfig(uri=f"{folder}/rgb", image_size=32, channels=3, classes=10)
        model = ModelConfig(channels=64, channel_mult=[1, 2, 2], res_blocks=2, attention=[8], head_channels=32, dropout=0.1)
    return Config(name="benchmark", run=f"{folder}/run-{stage}-{os.environ['WORLD_SIZE']}", data=data, model=model, train=train)


def write_data(size: str, folder: str) -> None:
    if size == "quick":
        write_shards(digits(), open_store(f"{folder}/digits"), shard_samples=256)
        return
    noise = np.random.default_rng(0).integers(0, 256, (2048, 32, 32, 3), dtype=np.uint8)
    source = Source(Schema(32, 3, 10), len(noise), lambda i: Sample(noise[i], i % 10), "uniform noise")
    write_shards(source, open_store(f"{folder}/rgb"), shard_samples=256)


class BareLoop:
    """What a PyTorch user would write: `step()` is one optimizer step on a batch that is already in memory."""

    def __init__(self, config: Config, batches: list[Batch]) -> None:
        data, train = config.data, config.train
        self.config, self.batches, self.at = config, batches, 0
        self.network: nn.Module = build_network(
            config.model, image_size=data.image_size, channels=data.channels, classes=data.classes
        )
        self.ddp = DistributedDataParallel(self.network)
        self.adamw = torch.optim.AdamW(self.ddp.parameters(), lr=train.lr, weight_decay=0.0, fused=True)

    def step(self) -> None:
        batch = self.batches[self.at % len(self.batches)]
        self.at += 1
        x, b = batch.images, len(batch.images)
        u = torch.rand(b)
        logsnr = -2 * torch.log(torch.tan(u * 1.5707 + 4e-5))
        alpha, sigma = (torch.sigmoid(s * logsnr).sqrt()[:, None, None, None] for s in (1, -1))
        eps = torch.randn_like(x)
        labels = torch.where(torch.rand(b) < 0.1, self.config.data.classes, batch.labels)
        dropout = DropoutKey(0, batch.index) if self.config.model.dropout else None
        loss = (self.ddp(alpha * x + sigma * eps, logsnr, labels, dropout) - eps).square().mean()
        self.adamw.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.ddp.parameters(), self.config.train.grad_clip)
        self.adamw.step()


class Parts:
    """Seconds spent in named calls of an object, by wrapping them."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def wrap(self, owner: Any, method: str, name: str) -> None:
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began

        object.__setattr__(owner, method, timed)


def block(step: Callable[[], None], steps: int) -> tuple[float, float]:
    """Seconds per step of a block that all ranks begin together, and CPU seconds per step of all threads of this rank."""
    dist.barrier()
    began, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        step()
    dist.barrier()
    return (time.perf_counter() - began) / steps, (time.process_time() - cpu) / steps


def measure(size: str, stage: int, folder: str) -> dict[str, Any]:
    """One rank's part of one paired measurement; the numbers are rank 0's."""
    pairs, steps = SIZES[size]
    config = config_of(size, stage, folder)
    run, _ = assemble(config)
    bare = BareLoop(config, [next(run.reader) for _ in range(8)])
    agreement, done = Agreement(3), 0

    def ours() -> None:
        nonlocal done
        take_step(run, done)
        done += 1
        agreement.exchange(0, 0, 0)

    parts = Parts()
    parts.wrap(run.ema, "update", "averages")
    parts.wrap(run.engine, "step", "AdamW, ZeRO")
    for step in (ours, bare.step):
        block(step, 3)
    parts.seconds.clear()
    times: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}
    for pair in range(pairs):
        for name, step in (("ours", ours), ("bare", bare.step))[:: 1 if pair % 2 else -1]:
            times[name].append(block(step, steps))
    shares = {name: seconds / (pairs * steps) for name, seconds in parts.seconds.items()}
    result = {
        "ours": statistics.median(wall for wall, _ in times["ours"]),
        "bare": statistics.median(wall for wall, _ in times["bare"]),
        "ratios": [o / b for (o, _), (b, _) in zip(times["ours"], times["bare"], strict=True)],
        "cpu_ratios": [o / b for (_, o), (_, b) in zip(times["ours"], times["bare"], strict=True)],
        "shares": shares,
        "stall": checkpoint_stall(run),
        "parameters": count_parameters(bare.network),
    }
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
        stalls.append(run.writer.start(step, []))
    run.writer.finish()
    return statistics.median(stalls)


def launch(size: str, stage: int, world_size: int, folder: str) -> dict[str, Any]:
    """The measurement on `world_size` processes of this machine, which share its cores."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = os.environ | {
        "PYTHONPATH": str(ROOT),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // world_size)),
    }
    command = [sys.executable, __file__, f"--{size}", "--rank", str(stage), folder]
    ranks = [
        subprocess.Popen(command, env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, text=True)
        for r in range(world_size)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit(f"a rank of the benchmark failed:\n{outputs[0]}")
    result: dict[str, Any] = json.loads(outputs[0].splitlines()[-1])
    return result


def report(world_size: int, stage: int, r: dict[str, Any]) -> None:
    """One line of the table. The overhead is the median over pairs of blocks; in brackets its quartiles."""
    low, middle, high = (100 * (ratio - 1) for ratio in statistics.quantiles(r["ratios"], n=4))
    share = {name: 100 * seconds / r["ours"] for name, seconds in r["shares"].items()}
    cpu = 100 * (statistics.median(r["cpu_ratios"]) - 1)
    print(
        f"{world_size:>7}  {stage:>4}  {1000 * r['ours']:7.1f}  {1000 * r['bare']:7.1f}  {middle:10.1f} ({low:5.1f}, {high:5.1f})  "
        f"{cpu:8.1f}  {share['AdamW, ZeRO']:11.1f}  {share['averages']:10.2f}  {1000 * r['stall']:8.1f}  "
        f"{r['stall'] / r['ours']:10.2f}",
        flush=True,
    )


def rows(size: str, world_size: int, stage: int, r: dict[str, Any]) -> list[dict[str, Any]]:
    """The same as rows of the common format; ratio > 1 means that ours is better."""
    conditions = {"workers": world_size, "zero_stage": stage, "size": size, "parameters": r["parameters"], "precision": "fp32"}
    step = (r["ours"], "one step of ours")
    measured = [
        ("training step", r["ours"], (r["bare"], "bare DDP loop"), 1 / statistics.median(r["ratios"])),
        ("checkpoint stall", r["stall"], step, r["ours"] / r["stall"]),
        ("averages of a step", r["shares"]["averages"], step, r["ours"] / r["shares"]["averages"]),
    ]
    return [
        {"measure": m, "ours": ours, "peer": peer, "peer_name": name, "ratio": ratio, "unit": "s", "conditions": conditions}
        for m, ours, (peer, name), ratio in measured
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_const", dest="size", const="quick", default="quick")
    size.add_argument("--full", action="store_const", dest="size", const="full")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there")
    parser.add_argument("--rank", nargs=2, metavar=("STAGE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        print(json.dumps(measure(options.size, int(options.rank[0]), options.rank[1])))
        return
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="freeguide-benchmark-") as folder:
        write_data(options.size, folder)
        print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, fp32, {options.size}; ms per step")
        print(
            "workers  ZeRO     ours  bare DDP  overhead % (quartiles)     of CPU %  AdamW+ZeRO %  averages %  stall ms  stall/step"
        )
        for world_size in (1, 2):
            for stage in (0, 2):
                result = launch(options.size, stage, world_size, folder)
                report(world_size, stage, result)
                found += rows(options.size, world_size, stage, result)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
