"""Reading images from S3 for training: ours beside WebDataset, MosaicML Streaming and LitData, same images, same server.

    python -m tests.faults.radosgw_s3 python benchmarks/data.py --quick --peers PEERS/bin/python
    python -m tests.faults.radosgw_s3 python benchmarks/data.py --full --peers PEERS/bin/python --json rows.json

The server is whatever AWS_ENDPOINT_URL names; without one, a moto server of its own. PEERS is an environment with
benchmarks/requirements.txt. Each measurement is a process of its own with cold caches. It delivers one epoch of shuffled batches
as float32 (B, 3, 64, 64) in [-1, 1] with labels, decoded from PNG by Pillow; everyone decodes with the same function but us, who
use our reader's. Since decoding costs everyone the same, another epoch brings the PNGs only ("undecoded"). A third one is shared by
several processes, the ranks of a training, that begin together: their samples over the time of the slowest. CPU seconds include
child processes and threads, not the server. Contenders take turns; medians of the rounds, of ratios too.

torchdata 0.11 has no reader of its own for S3 any more, so it has no row.
"""

import argparse
import importlib.machinery
import io
import itertools
import json
import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine
from PIL import Image

ROOT = Path(__file__).parents[1]
SIZES = {"quick": 6_016, "full": 24_000}  # images
SIDE = 64  # pixels
SHARD = 1500  # images of a shard; about 15 MB, for everyone
BATCH = 64
CONTENDERS = {
    "ours": "freeguide",
    "pipe": "webdataset, pipe:aws s3 cp",
    "local": "webdataset, local tars",
    "mosaic": "mosaicml-streaming",
    "litdata": "litdata",
}
RESUMES = (0.1, 0.5, 0.99)  # of an epoch
PROCESSES = 2  # that share an epoch, where several do

Item = tuple[bytes, int]  # PNG, label
Runs = dict[str, list[dict[str, float]]]  # of each contender, what `together` found in each round
Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


def picture(number: int) -> np.ndarray:
    """Smooth shapes with grain: its PNG has about 10 KB, as a 64x64 photograph has."""
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(coarse) + random.normal(0, 6, (SIDE, SIDE, 3)), 0, 255).astype(np.uint8)


def item(number: int) -> Item:
    Image.fromarray(picture(number)).save(out := io.BytesIO(), "PNG")
    return out.getvalue(), number % 10


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def batched(items: Iterator[Item], decode: bool) -> Batches:
    """What the peers deliver, brought to the batches that a training takes; without `decode`, no images."""
    while block := list(itertools.islice(items, BATCH)):
        labels = torch.tensor([label for _, label in block])
        if decode:
            images = torch.from_numpy(np.stack([decoded(data) for data, _ in block]))
            yield images.permute(0, 3, 1, 2).float().div_(127.5).sub_(1), labels
        else:
            yield torch.empty(0), labels


# ------------------------------------------------------------------------------------------------------------- contenders
# Each starts from nothing at image `first` of the epoch and yields the batches of its rank to the end of it. Each is one process:
# who has threads may use them, and nobody gets worker processes.


def rank_and_world() -> tuple[int, int]:
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def cache() -> Path:
    """An empty folder, at a fixed place since litdata's states name it; the ranks of one machine share it."""
    return Path(os.environ["BENCH_TARS"]) / "cache"


def ours(uri: str, images: int, first: int, decode: bool) -> Batches:
    from freeguide.configs.schema import DataConfig
    from freeguide.data_pipeline.order import choose_order
    from freeguide.data_pipeline.store.open import open_store
    from freeguide.data_pipeline.stored import load_manifest
    from freeguide.data_pipeline.stream import Reader

    store = open_store(f"{uri}/ours")
    manifest = load_manifest(store)
    rank, world = rank_and_world()
    order = choose_order(manifest, world * BATCH, 0)
    data = DataConfig(uri="", image_size=SIDE, classes=10)
    place = {"global_batch": world * BATCH, "rank": rank, "world_size": world, "start_step": first // BATCH // world}
    with Reader(store, manifest, order, data=data, **place) as reader:
        if not decode:
            samples = itertools.islice(reader.samples(), images // BATCH * BATCH - first)  # of one rank
            yield from batched(((sample["png"], int(sample["cls"])) for sample in samples), decode)
            return
        for _ in range(first // BATCH // world, images // BATCH // world):
            batch = next(reader)
            yield batch.images, batch.labels


def webdataset_over(urls: list[str], first: int, decode: bool) -> Batches:
    import webdataset

    rank, world = rank_and_world()

    # The pipeline of its documentation: shards and a buffer of samples shuffled. It cannot start elsewhere than at the beginning.
    urls = urls[rank::world]
    data = webdataset.WebDataset(urls, nodesplitter=None, shardshuffle=100, seed=0, empty_check=False)
    data = data.shuffle(1000).to_tuple("png", "cls")
    samples = ((png, int(label)) for png, label in data)
    return batched(itertools.islice(samples, first, None), decode)


def pipe(uri: str, images: int, first: int, decode: bool) -> Batches:
    aws = Path(sys.executable).parent / "aws"
    return webdataset_over([f"pipe:{aws} s3 cp {url} -" for url in _shards(f"{uri}/ours", images)], first, decode)


def local(uri: str, images: int, first: int, decode: bool) -> Batches:
    return webdataset_over(_shards(os.environ["BENCH_TARS"], images), first, decode)


def _shards(prefix: str, images: int) -> list[str]:
    return [f"{prefix}/shards/{number:06d}.tar" for number in range(-(-images // SHARD))]


def import_streaming() -> Any:
    """mosaicml-streaming imports torchvision for data sets that are not used here; PyPI's build fails beside a CPU torch."""
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("", ".datasets", ".transforms", ".transforms.functional"):
            module = sys.modules[f"torchvision{name}"] = types.ModuleType(f"torchvision{name}")
            module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
        sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
    import streaming

    return streaming


def mosaic(uri: str, images: int, first: int, decode: bool) -> Batches:
    streaming = import_streaming()
    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    data = streaming.StreamingDataset(
        remote=f"{uri}/mosaic", local=str(cache()), shuffle=True, shuffle_seed=0, batch_size=BATCH, num_canonical_nodes=1
    )
    if first:
        state = {"epoch": 0, "sample_in_epoch": first, "num_canonical_nodes": 1, "shuffle_seed": 0, "initial_physical_nodes": 1}
        data.load_state_dict(state)
    return batched(((sample["x"], int(sample["y"])) for sample in data), decode)


def litdata(uri: str, images: int, first: int, decode: bool) -> Batches:
    loader = litdata_loader(uri)
    if first:
        loader.load_state_dict(json.loads((Path(os.environ["BENCH_TARS"]) / f"litdata-{first}.json").read_text()))
    for block in loader:
        yield from batched(iter(block), decode)


def litdata_loader(uri: str) -> Any:
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # its fast client insists on https, and has no option for it
    endpoint = {"endpoint_url": os.environ["AWS_ENDPOINT_URL"]}
    rank, world = rank_and_world()
    place = cache() / str(rank) if world > 1 else cache()  # ranks that begin with one empty cache trip over each other's index
    data = StreamingDataset(f"{uri}/litdata", cache_dir=str(place), shuffle=True, seed=0, storage_options=endpoint)
    return StreamingDataLoader(data, batch_size=BATCH, num_workers=0, collate_fn=list)


CONTEND: dict[str, Callable[[str, int, int, bool], Batches]] = {
    "ours": ours,
    "pipe": pipe,
    "local": local,
    "mosaic": mosaic,
    "litdata": litdata,
}


def contend(name: str, uri: str, images: int, first: int, batches: int, decode: int) -> dict[str, float]:
    """One measurement, in this process: seconds to the first batch, and to the end of the epoch (or after `batches`)."""
    torch.set_num_threads(1)
    torch.zeros(2, 2).float().div_(2)
    if name == "mosaic":
        import_streaming()
    else:
        __import__(
            {"litdata": "litdata", "ours": "freeguide.data_pipeline.stream"}.get(name, "webdataset")
        )  # importing is not reading
    if rank_and_world()[1] > 1:  # two of the peers ask torch.distributed which rank they are
        torch.distributed.init_process_group("gloo")
        torch.distributed.barrier()
    before, used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, _cpu()
    began = time.perf_counter()
    stream = CONTEND[name](uri, images, first, bool(decode))
    count = len(next(stream)[1])
    started = time.perf_counter()
    for _, labels in itertools.islice(stream, batches - 1 if batches else None):
        count += len(labels)
    ended = time.perf_counter()
    stream.close()  # type: ignore[attr-defined]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "samples": count,
        "first_s": started - began,
        "wall_s": ended - began,
        "cpu_s": _cpu() - used,
        "memory_mib": (peak - before) / 1024,
    }


def _cpu() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


# ---------------------------------------------------------------------------------------------------------------- writing


def write_ours(uri: str, images: int) -> None:
    from freeguide.data_pipeline.manifest import Schema
    from freeguide.data_pipeline.shards import Sample, Source, write_shards
    from freeguide.data_pipeline.store.open import create_bucket, open_store

    create_bucket("s3://" + uri.split("/")[2])
    source = Source(Schema(SIDE, 3, 10), images, lambda number: Sample(picture(number), number % 10), f"benchmark {images}")
    store = open_store(f"{uri}/ours")
    manifest = write_shards(source, store, shard_samples=SHARD)
    for shard in manifest.shards:
        path = Path(os.environ["BENCH_TARS"]) / shard.key
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(store.get(shard.key))


def write_mosaic(uri: str, images: int) -> None:
    MDSWriter = import_streaming().MDSWriter
    os.environ["S3_ENDPOINT_URL"] = os.environ["AWS_ENDPOINT_URL"]
    bytes_ = SHARD * len(item(0)[0])
    with MDSWriter(out=f"{uri}/mosaic", columns={"x": "bytes", "y": "int"}, size_limit=bytes_, progress_bar=False) as writer:
        for number in range(images):
            x, y = item(number)
            writer.write({"x": x, "y": y})


def write_litdata(uri: str, images: int) -> None:
    """Its chunks, and its states after the parts of an epoch: they come from a loader that has read so far."""
    import boto3
    from litdata import optimize

    place = Path(os.environ["BENCH_TARS"]) / "litdata"
    optimize(
        fn=item,
        inputs=list(range(images)),
        output_dir=str(place),
        chunk_bytes=SHARD * len(item(0)[0]),
        num_workers=1,
        verbose=False,
    )
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    for file in sorted(place.iterdir()):
        client.upload_file(str(file), bucket, f"{prefix}/litdata/{file.name}")
    loader = litdata_loader(uri)
    wanted = {_resume_at(images, part) for part in RESUMES}
    for done, _ in enumerate(loader, 1):
        if done * BATCH in wanted:
            (place.parent / f"litdata-{done * BATCH}.json").write_text(json.dumps(loader.state_dict()))


WRITE: dict[str, Callable[[str, int], None]] = {"ours": write_ours, "mosaic": write_mosaic, "litdata": write_litdata}


# ---------------------------------------------------------------------------------------------------------------- the run


@contextmanager
def server() -> Iterator[str]:
    """The name of the S3 server; sets the environment for it."""
    if os.environ.get("AWS_ENDPOINT_URL"):
        yield "radosgw on loopback" if os.environ.get("FREEGUIDE_TEST_S3") else os.environ["AWS_ENDPOINT_URL"]
        return
    with subprocess.Popen(
        [sys.executable, "-c", "from moto.server import *\ns = ThreadedMotoServer('127.0.0.1', 0, verbose=False); s.start()\n"
         "print(s.get_host_and_port()[1], flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
        os.environ.update(keys, AWS_ENDPOINT_URL=f"http://127.0.0.1:{process.stdout.readline().strip()}")
        yield "moto on loopback"
        process.terminate()


def _resume_at(images: int, part: float) -> int:
    return int(images * part) // BATCH * BATCH


def together(
    peers: str, name: str, uri: str, images: int, first: int, batches: int, decode: int, world: int = 1
) -> dict[str, float]:
    """One measurement of `contend`, with an empty cache, over `world` processes that begin together."""
    shutil.rmtree(cache(), ignore_errors=True)
    cache().mkdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    shared |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    arguments = ("--contend", name, uri, images, first, batches, decode)

    def one(rank: int) -> dict[str, float]:
        return child(peers, name, *arguments, **shared, RANK=str(rank), LOCAL_RANK=str(rank))

    with ThreadPoolExecutor(world) as pool:
        found = list(pool.map(one, range(world)))
    total = {key: sum(part[key] for part in found) for key in ("samples", "cpu_s")}
    return total | {key: max(part[key] for part in found) for key in ("first_s", "wall_s", "memory_mib")}


def child(peers: str, name: str, *arguments: object, **variables: str) -> dict[str, float]:
    """Runs this file in the environment of the contender, and returns what it prints."""
    python = sys.executable if name == "ours" else peers
    environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [python, __file__, *map(str, arguments)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    if ended.returncode:
        raise RuntimeError(f"{name}: {ended.stderr[-2000:]}")
    lines = [line for line in ended.stdout.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


def run(size: str, peers: str, rounds: int) -> list[dict[str, Any]]:
    images = SIZES[size]
    names = [name for name in CONTENDERS if peers or name == "ours"]
    with server() as where, tempfile.TemporaryDirectory(prefix="freeguide-bench-") as folder:
        os.environ["BENCH_TARS"] = folder
        uri = f"s3://bench/{size}-{time.time_ns()}"
        for name in names:
            if name in WRITE:
                child(peers, name, "--write", name, uri, images)
        epochs, plain, several = (Runs((name, []) for name in names) for _ in range(3))
        resumes: dict[tuple[str, float], list[float]] = {(name, part): [] for name in names for part in RESUMES}
        for number in range(rounds):
            for name in names:
                epochs[name].append(together(peers, name, uri, images, 0, 0, 1))
                plain[name].append(together(peers, name, uri, images, 0, 0, 0))
                several[name].append(together(peers, name, uri, images, 0, 0, 1, PROCESSES))
                for found in (epochs, plain, several):
                    print(f"round {number + 1}/{rounds}  {CONTENDERS[name]:28} {found[name][-1]}", flush=True)
                for part in RESUMES:
                    resumes[name, part].append(together(peers, name, uri, images, _resume_at(images, part), 1, 1)["first_s"])
        return rows(names, epochs, plain, several, resumes, conditions(size, where, images, rounds))


def rows(
    names: list[str],
    epochs: Runs,
    plain: Runs,
    several: Runs,
    resumes: dict[tuple[str, float], list[float]],
    shared: dict[str, Any],
) -> list[dict[str, Any]]:
    """Every measure against every peer. Ratios above 1 mean that ours is better, whatever the unit."""

    def rate(runs: Runs, seconds: str) -> tuple[str, bool, Callable[[str], list[float]]]:
        return "1/s", True, lambda name: [run["samples"] / run[seconds] for run in runs[name]]

    measures: dict[str, tuple[str, bool, Callable[[str], list[float]]]] = {
        "samples per CPU-second": rate(epochs, "cpu_s"),
        "samples per second": rate(epochs, "wall_s"),
        "undecoded samples per CPU-second": rate(plain, "cpu_s"),
        "undecoded samples per second": rate(plain, "wall_s"),
        f"samples per CPU-second, {PROCESSES} processes": rate(several, "cpu_s"),
        f"samples per second, {PROCESSES} processes": rate(several, "wall_s"),
        "cold start to the first batch": ("s", False, lambda name: [run["first_s"] for run in epochs[name]]),
        "memory over the imports": ("MiB", False, lambda name: [run["memory_mib"] for run in epochs[name]]),
    }
    for part in RESUMES:
        measures[f"resume at {part:.0%} of an epoch"] = ("s", False, lambda name, part=part: resumes[name, part])  # type: ignore[misc]
    found = []
    for measure, (unit, larger, values) in measures.items():
        mine = values("ours")
        for name in names[1:] or ["ours"]:
            theirs = values(name)
            ratios = [a / b if larger else b / a for a, b in zip(mine, theirs, strict=True)]
            found.append(
                {
                    "measure": measure,
                    "ours": statistics.median(mine),
                    "peer": statistics.median(theirs),
                    "peer_name": CONTENDERS[name],
                    "ratio": statistics.median(ratios),
                    "unit": unit,
                    "conditions": shared,
                }
            )
    return found


def conditions(size: str, where: str, images: int, rounds: int) -> dict[str, Any]:
    return {
        "size": size,
        "images": f"{images} of {SIDE}x{SIDE} RGB as PNG, {len(item(0)[0]) / 1000:.1f} KB, {SHARD} in a shard, batch {BATCH}",
        "server": where,
        "rounds": rounds,
        **machine("torch", "pillow"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Reading images from S3 for training: ours and the peers'.")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--quick", action="store_const", dest="size", const="quick", default="quick", help="6 016 images (the default)"
    )
    sizes.add_argument("--full", action="store_const", dest="size", const="full", help="24 000 images")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which the contenders take turns (default: 3)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there")
    parser.add_argument("--peers", metavar="PYTHON", default="", help="Python of an environment with benchmarks/requirements.txt")
    parser.add_argument("--write", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--contend", nargs=6, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        name, uri, images = options.write
        return WRITE[name](uri, int(images))
    if options.contend:
        name, uri, *numbers = options.contend
        return print(json.dumps(contend(name, uri, *map(int, numbers))), flush=True)
    found = run(options.size, options.peers, options.rounds)
    print("\n" + "\n".join(f"{name}: {value}" for name, value in found[0]["conditions"].items()))
    print(f"\n{'':40} {'':28} {'ours':>10} {'peer':>10} {'':4} {'ratio':>7}")
    for row in found:
        print(
            f"{row['measure']:40} {row['peer_name']:28} {row['ours']:10.2f} {row['peer']:10.2f} {row['unit']:4} {row['ratio']:7.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
