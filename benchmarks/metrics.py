"""Features to FID and IS: our time and numbers beside the peers', on the same features in one run.

    python benchmarks/metrics.py --quick                     # 5 000 x 512, seconds
    python benchmarks/metrics.py --full --json rows.json     # 50 000 x 2048, the paper's protocol
    python benchmarks/metrics.py --full --peers ENV/bin/python

torchmetrics imports torch-fidelity where that is installed, and so torchvision, which often does not fit the torch at hand. So it
is measured in an environment of its own (torch and torchmetrics only): `--peers` names that environment's Python, which runs this
file as a server that holds the same features and times itself. Without it, torchmetrics is left out.
Ours and each peer take turns, and the median of the repeats counts.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine

REPEATS = {"quick": 5, "full": 3}
SIZES = {"quick": (5_000, 512), "full": (50_000, 2048)}
CLASSES = 1008


def inception_like(n: int, d: int, seed: int, shift: float) -> np.ndarray:
    """Features (n, d) float32 with the traits of Inception's: positive, mean near 0.4, spectrum falling by four decades."""
    generator = np.random.default_rng(seed)
    basis = np.random.default_rng(0).normal(size=(d, d)) / np.sqrt(d)
    scales = np.logspace(0, -2, d)
    out = np.empty((n, d), np.float32)
    for start in range(0, n, 5000):
        block = generator.normal(size=(min(5000, n - start), d)) * scales
        out[start : start + len(block)] = np.abs(block @ basis + 0.4 + shift)
    return out


def probabilities(n: int, seed: int) -> np.ndarray:
    """Class probabilities (n, 1008), most of them sure of one class."""
    logits = np.random.default_rng(seed).gumbel(size=(n, CLASSES)) * 4.0
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (shifted / shifted.sum(axis=1, keepdims=True)).astype(np.float32)


# --- the peers' ways ---


def numpy_statistics(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return features.mean(axis=0, dtype=np.float64), np.cov(features, rowvar=False)


def by_sqrtm(features: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> float:
    """The formula of pytorch-fid, ADM's evaluator and EDM: a general matrix square root."""
    from scipy import linalg

    mean1, cov1 = numpy_statistics(features)
    root = np.asarray(linalg.sqrtm(cov1 @ cov)).real
    return float(((mean1 - mean) ** 2).sum() + np.trace(cov1) + np.trace(cov) - 2.0 * np.trace(root))


def by_eigvals(features: np.ndarray, mean: np.ndarray, cov: np.ndarray) -> float:
    """The formula of torch-fidelity 0.4: eigenvalues of the product, which is not symmetric."""
    mean1, cov1 = numpy_statistics(features)
    values = np.linalg.eigvals(cov1 @ cov).astype(np.complex128)
    return float(((mean1 - mean) ** 2).sum() + np.trace(cov1) + np.trace(cov) - 2.0 * np.sqrt(values).real.sum())


def serve(folder: Path) -> None:
    """In the peers' environment: answer each line "fid" or "is" on standard input with torchmetrics' seconds and value."""
    import torch
    import torchmetrics
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore

    class Given(torch.nn.Module):
        """An extractor for features that are there already."""

        def __init__(self, width: int) -> None:
            super().__init__()
            self.num_features = width

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    generated, real = (torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("generated", "real"))
    logits = torch.from_numpy(np.load(folder / "probabilities.npy")).double().log()
    distance = FrechetInceptionDistance(Given(generated.shape[1]), reset_real_features=False)
    distance.set_dtype(torch.float64)
    for block in real.split(4096):
        distance.update(block, real=True)
    print(json.dumps({"name": f"torchmetrics {torchmetrics.__version__}"}), flush=True)
    for line in sys.stdin:
        began = time.perf_counter()
        if line.strip() == "fid":
            distance.reset()
            for block in generated.split(4096):
                distance.update(block.double(), real=False)
            value = float(distance.compute())
        else:
            score = InceptionScore(Given(CLASSES), splits=1)  # its splits are shuffled without a seed; one split needs none
            score.update(logits)
            value = float(score.compute()[0])
        print(json.dumps({"seconds": time.perf_counter() - began, "value": value}), flush=True)


class Peers:
    """torchmetrics in another environment, kept alive between questions."""

    def __init__(self, python: str, folder: Path) -> None:
        command = [python, __file__, "--serve", str(folder)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.name = self._read()["name"]

    def ask(self, what: str) -> tuple[float, float]:
        """Seconds and value."""
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer = self._read()
        return answer["seconds"], answer["value"]

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the peers' Python did not answer; install torch and torchmetrics there, without torchvision")
        return json.loads(line)


# --- the comparison ---


def timed(run: Callable[[], float]) -> Callable[[], tuple[float, float]]:
    def once() -> tuple[float, float]:
        began = time.perf_counter()
        value = run()
        return time.perf_counter() - began, value

    return once


def compare(
    measure: str, ours: Callable[[], tuple[float, float]], theirs: Callable[[], tuple[float, float]], name: str, repeats: int
) -> dict[str, Any]:
    """Both in turn, `repeats` times; ratio > 1 means that ours is faster. `values` are the numbers that they computed."""
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    mine, other = (statistics.median(pair[i][0] for pair in pairs) for i in (0, 1))
    values = [pairs[0][0][1], pairs[0][1][1]]
    row = {"measure": measure, "ours": mine, "peer": other, "peer_name": name, "ratio": other / mine, "unit": "s"}
    agreement = abs(values[0] - values[1]) / abs(values[1])
    print(
        f"{measure:34} {mine:9.3f} {other:9.3f} {other / mine:7.2f}  {name:34} {values[0]:.9g} {values[1]:.9g} ({agreement:.1e})",
        flush=True,
    )
    return row | {"values": values, "relative_difference": agreement}


def run(size: str, peers_python: str) -> list[dict[str, Any]]:
    from freeguide.cluster.evaluation.reference import Statistics
    from freeguide.cluster.evaluation.statistics.fid import fid
    from freeguide.cluster.evaluation.statistics.inception_score import inception_score
    from freeguide.cluster.evaluation.statistics.moments import from_features

    (n, d), repeats = SIZES[size], REPEATS[size]
    generated, real = inception_like(n, d, 1, 0.0), inception_like(n, d, 2, 0.02)
    p = probabilities(n, 3)
    known = from_features(real)
    mean, cov = known.mean, known.covariance
    reference = Statistics(mean, cov, n)
    print(f"{'':34} {'ours, s':>9} {'peer, s':>9} {'ratio':>7}  {'peer':34} values (relative difference)")
    ours = timed(lambda: fid(from_features(generated), reference))
    rows = [
        compare(f"{n} x {d} features to FID", ours, timed(partial(by, generated, mean, cov)), name, repeats)
        for by, name in ((by_sqrtm, "scipy sqrtm (pytorch-fid, ADM)"), (by_eigvals, "numpy eigvals (torch-fidelity)"))
    ]
    if peers_python:
        with tempfile.TemporaryDirectory(prefix="freeguide-metrics-") as folder:
            for name, array in (("generated", generated), ("real", real), ("probabilities", p)):
                np.save(Path(folder) / f"{name}.npy", array)
            peers = Peers(peers_python, Path(folder))
            rows.append(compare(f"{n} x {d} features to FID", ours, lambda: peers.ask("fid"), peers.name, repeats))
            ours = timed(lambda: inception_score(p, splits=1).mean)
            rows.append(compare(f"{n} x {CLASSES} probabilities to IS", ours, lambda: peers.ask("is"), peers.name, repeats))
            assert peers.process.stdin is not None
            peers.process.stdin.close()
            peers.process.wait()
    return rows


def conditions(size: str) -> dict[str, str]:
    return {"size": size, "threads": os.environ.get("OMP_NUM_THREADS", "library default"), **machine("numpy")}


def main() -> None:
    parser = argparse.ArgumentParser(description="FID and IS from features: ours and the peers'.")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="5 000 x 512 (the default)")
    sizes.add_argument("--full", action="store_true", help="50 000 x 2048")
    parser.add_argument("--json", metavar="PATH", help="write the rows there")
    parser.add_argument("--peers", metavar="PYTHON", default="", help="Python of an environment with torch and torchmetrics")
    parser.add_argument("--serve", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(Path(options.serve))
        return
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    stated = conditions("full" if options.full else "quick")
    print(", ".join(f"{name} {value}" for name, value in stated.items()))
    rows = [row | {"conditions": stated} for row in run(stated["size"], options.peers)]
    if options.json:
        Path(options.json).write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
