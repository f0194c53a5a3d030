"""Which backend runs on which device. The only reader of SPECSERVE_KERNELS."""

import os

import torch

from specserve_kernels.ops import Kernels

VARIABLE = "SPECSERVE_KERNELS"
CHOICES = ("torch", "triton")


def select_kernels(device: torch.device) -> Kernels:
    """triton on CUDA, torch elsewhere; SPECSERVE_KERNELS=torch|triton overrides.

    Raises ValueError for any other value of the variable.
    """
    default = "triton" if device.type == "cuda" else "torch"
    choice = os.environ.get(VARIABLE) or default
    if choice == "torch":
        from specserve_kernels.torch_ref import TorchKernels

        return TorchKernels()
    if choice == "triton":
        from specserve_kernels.triton import TritonKernels  # triton is an optional dependency

        return TritonKernels()
    raise ValueError(f"{VARIABLE}={choice!r} is not a backend; use one of {', '.join(CHOICES)}")
