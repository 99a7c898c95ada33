"""How fast a device can be: GPUs by their makers' data sheets, a CPU by what it just did.

Names are those that `torch.cuda.get_device_name` reports, compared whole: an L40 is no L4, an H100 NVL no H100 SXM. A device that
is not in the table is not known; nothing is guessed from a part of its name.
"""

import functools
import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Peak:
    """Dense FLOP/s, without sparsity, with fp32 sums: of the tensor cores in half precision, of the plain cores in fp32.

    fp32 is meant without TF32, which `choose_kernels` turns off. None: the device has no such arithmetic.
    """

    fp32: float
    fp16: float
    bf16: float | None

    def of(self, precision: str) -> float | None:
        return {"fp32": self.fp32, "fp16": self.fp16, "bf16": self.bf16}[precision]


def _ampere(fp32: float, half: float) -> Peak:
    """Since Ampere, bf16 is as fast as fp16. In TFLOP/s."""
    return Peak(fp32 * 1e12, half * 1e12, half * 1e12)


_A100, _H100, _NVL = _ampere(19.5, 312), _ampere(67, 989.5), _ampere(60, 835.5)
# NVIDIA's data sheets: B200 and GB200 (Blackwell, 2024/2025, a GPU of HGX B200 and of GB200 NVL72), H200, H100 and GH200 (Hopper),
# A100, A10, A30, A40, A10G, L4, L40, L40S, T4, V100, RTX A6000 and RTX 6000 Ada; and its white papers on GA102 and AD102 (GeForce).
# Where a sheet gives a figure with sparsity, it is halved.
PEAKS = {
    "NVIDIA B200": _ampere(75, 2250),
    "NVIDIA GB200": _ampere(80, 2500),
    "NVIDIA H200": _H100,
    "NVIDIA H200 NVL": _NVL,
    "NVIDIA GH200 480GB": _H100,
    "NVIDIA H100 80GB HBM3": _H100,
    "NVIDIA H100 PCIe": _ampere(51, 756),
    "NVIDIA H100 NVL": _NVL,
    "NVIDIA A100-SXM4-40GB": _A100,
    "NVIDIA A100-SXM4-80GB": _A100,
    "NVIDIA A100-PCIE-40GB": _A100,
    "NVIDIA A100 80GB PCIe": _A100,
    "NVIDIA A10": _ampere(31.2, 125),
    "NVIDIA A10G": _ampere(31.5, 70),
    "NVIDIA A30": _ampere(10.3, 165),
    "NVIDIA A40": _ampere(37.4, 149.7),
    "NVIDIA L4": _ampere(30.3, 121),
    "NVIDIA L40": _ampere(90.5, 181),
    "NVIDIA L40S": _ampere(91.6, 362),
    "NVIDIA RTX A6000": _ampere(38.7, 154.8),
    "NVIDIA RTX 6000 Ada Generation": _ampere(91.1, 364.2),
    "NVIDIA GeForce RTX 3090": _ampere(35.6, 71.2),
    "NVIDIA GeForce RTX 4090": _ampere(82.6, 165.2),
    "Tesla T4": Peak(8.1e12, 65e12, None),
    "Tesla V100-SXM2-16GB": Peak(15.7e12, 125e12, None),
    "Tesla V100-SXM2-32GB": Peak(15.7e12, 125e12, None),
    "Tesla V100-PCIE-16GB": Peak(14e12, 112e12, None),
    "Tesla V100-PCIE-32GB": Peak(14e12, 112e12, None),
}
REFERENCE = "NVIDIA H100 80GB HBM3"
_SIZE = 768  # of the matrices: 0.9 GFLOP, 7 MiB in fp32
_SECONDS = 0.15


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Dense FLOP/s of a GPU in fp32, bf16 or fp16 by its maker's data sheet; None for a CPU, and where it is not known."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device), precision)


def peak_of(name: str, precision: str) -> float | None:
    """The same by the name of the GPU; older drivers leave the maker out."""
    peak = PEAKS.get(name) or PEAKS.get(f"NVIDIA {name}")
    return peak.of(precision) if peak else None


@functools.cache
def cpu_flops(precision: str) -> float:
    """FLOP/s of matrix products on this machine's CPU with all of torch's threads: the best of what fits into a sixth of a second.

    One product at least is made, on matrices small enough that a CPU without bf16, which computes it slowly, takes no minute.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    size = _SIZE if precision == "fp32" else _SIZE // 3
    a, b = (torch.randn(size, size, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in (0, 1))
    best, began = float("inf"), time.perf_counter()
    while True:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - began > _SECONDS:
            return 2 * size**3 / best
