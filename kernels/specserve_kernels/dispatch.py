"""Selects the kernel backend of a device."""

import torch

from specserve_kernels.cpu import CpuKernels
from specserve_kernels.cpu.native import runnable_builds
from specserve_kernels.fused import FusedModels
from specserve_kernels.ops import Kernels
from specserve_kernels.setting import VARIABLE, kernels_setting
from specserve_kernels.torch_ref import TorchKernels

CHOICES = ("torch", "cpu", "cpu-portable", "cpu-avx2", "cpu-avx512", "cpu-avx512bf16", "triton")


def select_kernels(device: torch.device) -> Kernels:
    """triton on CUDA, native kernels on a CPU that can run a fast build, otherwise torch.

    SPECSERVE_KERNELS overrides this with a name of `CHOICES`. Raises ValueError for any other
    value, and for native kernels that cannot run on this machine.
    """
    if choice := kernels_setting():
        return named_kernels(choice)
    if device.type == "cuda":
        return named_kernels("triton")
    return named_kernels("cpu" if device.type == "cpu" and _fast_builds() else "torch")


def fused_models(kernels: Kernels) -> FusedModels | None:
    """Whole models as one kernel, on the backend of `kernels`; None: it has none."""
    return kernels if isinstance(kernels, CpuKernels) else None


def named_kernels(name: str) -> Kernels:
    """The backend of that name; `cpu` is the best native build.

    Raises ValueError for an unknown name and for a native build that cannot run here.
    """
    if name not in CHOICES:
        raise ValueError(f"{VARIABLE}={name!r} is not a backend; use one of {', '.join(CHOICES)}")
    if name == "torch":
        return TorchKernels()
    if name == "triton":
        from specserve_kernels.triton import TritonKernels  # triton is an optional dependency

        return TritonKernels()
    return _native(name)


def _native(name: str) -> Kernels:
    builds = runnable_builds()
    wanted = _fast_builds()[-1:] if name == "cpu" else (name.removeprefix("cpu-"),)
    if wanted and wanted[0] in builds:
        return CpuKernels(wanted[0])
    raise ValueError(
        f"{VARIABLE}={name!r} cannot run here: native kernels that were built and that this CPU "
        f"can run: {', '.join(builds) or 'none'}; use torch, or reinstall with a C++ compiler"
    )


def _fast_builds() -> tuple[str, ...]:
    """All but `portable`, which is slower than torch and exists for comparison only."""
    return tuple(build for build in runnable_builds() if build != "portable")
