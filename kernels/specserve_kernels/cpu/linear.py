"""Products with packed weights: sums have a fixed order."""

import ctypes

import torch
from torch import Tensor

from specserve_kernels.cpu.native import num_threads
from specserve_kernels.packed_weight import PANEL, PackedWeight


def packed_linear(library: ctypes.CDLL, x: Tensor, weight: PackedWeight) -> Tensor:
    """x [num_rows, num_inputs] float32 -> x W^T [num_rows, num_outputs] float32."""
    assert x.shape[1] == weight.num_inputs, f"{x.shape[1]} inputs for {weight.num_inputs}"
    assert x.dtype == torch.float32, f"rows are float32, not {x.dtype}"
    assert x.is_contiguous(), "rows must follow one another in memory"
    num_panels = weight.panels.shape[0]
    y = torch.empty(x.shape[0], num_panels * PANEL)
    library.specserve_linear(
        weight.panels.data_ptr(),
        weight.format,
        weight.num_inputs,
        num_panels * PANEL,
        x.data_ptr(),
        x.shape[0],
        y.data_ptr(),
        num_threads(),
    )
    return y[:, : weight.num_outputs]
