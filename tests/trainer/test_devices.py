"""What devices can do: by their whole names, in the precision that is used."""

import math

import pytest
import torch

from freeguide.trainer.training.devices import PEAKS, cpu_flops, peak_flops, peak_of

# As torch reports them, with their makers' dense TFLOP/s in bf16 (fp16 for those without) and in fp32.
SHEETS = [
    ("NVIDIA H100 80GB HBM3", 989.5, 67),
    ("NVIDIA H100 PCIe", 756, 51),
    ("NVIDIA H100 NVL", 835.5, 60),
    ("NVIDIA H200", 989.5, 67),
    ("NVIDIA A100-SXM4-40GB", 312, 19.5),
    ("NVIDIA A100-SXM4-80GB", 312, 19.5),
    ("A100-SXM4-40GB", 312, 19.5),
    ("NVIDIA A100-PCIE-40GB", 312, 19.5),
    ("NVIDIA A100 80GB PCIe", 312, 19.5),
    ("NVIDIA L4", 121, 30.3),
    ("NVIDIA L40", 181, 90.5),
    ("NVIDIA L40S", 362, 91.6),
    ("NVIDIA A10", 125, 31.2),
    ("NVIDIA A10G", 70, 31.5),
    ("Tesla T4", None, 8.1),
    ("Tesla V100-SXM2-16GB", None, 15.7),
    ("NVIDIA B200", 2250, 75),
    ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
]


@pytest.mark.parametrize(("name", "bf16", "fp32"), SHEETS)
def test_a_gpu_is_known_by_its_whole_name(name: str, bf16: float | None, fp32: float) -> None:
    assert peak_of(name, "bf16") == (None if bf16 is None else pytest.approx(bf16 * 1e12))
    assert peak_of(name, "fp32") == pytest.approx(fp32 * 1e12)
    assert peak_of(name, "fp16") > 3.9 * peak_of(name, "fp32") or name in (
        "NVIDIA L40",
        "NVIDIA L40S",
        "NVIDIA A10G",
        "NVIDIA GeForce RTX 4090",
    )


@pytest.mark.parametrize(
    "name",
    ["NVIDIA L400", "NVIDIA H100", "NVIDIA H20", "NVIDIA A100X", "NVIDIA L4 Ada", "NVIDIA B2000", "AMD Instinct MI300X", "L", ""],
)
def test_a_gpu_that_is_not_in_the_table_is_not_known(name: str) -> None:
    assert [peak_of(name, precision) for precision in ("fp32", "bf16", "fp16")] == [None] * 3


def test_no_name_of_the_table_has_the_peaks_of_another_by_a_part_of_it() -> None:
    assert len({peak_of(name, "bf16") for name in ("NVIDIA L4", "NVIDIA L40", "NVIDIA L40S")}) == 3
    assert len({peak_of(name, "bf16") for name in PEAKS if "H100" in name}) == 3


def test_a_cpu_is_measured() -> None:
    assert peak_flops(torch.device("cpu"), "fp32") is None
    rate = cpu_flops("fp32")
    assert math.isfinite(rate)
    assert rate > 0
    assert cpu_flops("fp32") == rate, "once in a process"
