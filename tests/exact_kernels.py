"""The exact kernel backends of this machine."""

import pytest

from specserve_kernels.cpu import CpuKernels
from specserve_kernels.cpu.native import runnable_builds
from specserve_kernels.ops import Kernels
from specserve_kernels.torch_ref import TorchKernels

EXACT_KERNELS: list[Kernels] = [
    TorchKernels(),
    *(CpuKernels(build) for build in runnable_builds()),
]
each_exact_kernels = pytest.mark.parametrize(
    "kernels", EXACT_KERNELS, ids=[kernels.name for kernels in EXACT_KERNELS]
)
