"""Which kernels of torch a network is computed with: what decides its rounding, and whether it repeats."""

import os

import torch


def choose_kernels(deterministic: bool = False) -> None:
    """Convolutions in fp32 are in fp32; with `deterministic`, only kernels that repeat to the bit.

    For the whole process, and to be called before it uses its GPU. torch raises RuntimeError for an operation that has no kernel
    that repeats.
    """
    torch.backends.cudnn.allow_tf32 = False  # on by default, it leaves fp32 inputs 10 of their 23 bits
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats only with a workspace of fixed size
    torch.use_deterministic_algorithms(deterministic)
