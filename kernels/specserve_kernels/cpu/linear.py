"""Products with quantized weights: rows are quantized to 8 bits, sums have a fixed order."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from specserve_kernels.cpu.native import num_threads
from specserve_kernels.quantized_weight import GROUP, PANEL, QuantizedWeight


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Quantized activations, the operands of the integer products."""

    values: Tensor  # [num_rows, size] int8
    scales: Tensor  # [num_rows, size / 32] float32
    sums: Tensor  # [num_rows, size / 32] int32, sum of each group's integers


def quantize_rows(library: ctypes.CDLL, x: Tensor) -> QuantizedRows:
    """Quantize x [num_rows, size] float32, contiguous; `torch_ref.linear` is the reference."""
    _check(x)
    num_rows, size = x.shape
    groups = (num_rows, size // GROUP)
    rows = QuantizedRows(
        torch.empty(num_rows, size, dtype=torch.int8),
        torch.empty(groups),
        torch.empty(groups, dtype=torch.int32),
    )
    addresses = (part.data_ptr() for part in (rows.values, rows.scales, rows.sums))
    library.specserve_quantize(x.data_ptr(), num_rows, size, *addresses)
    return rows


def quantized_linear(library: ctypes.CDLL, x: Tensor, weight: QuantizedWeight) -> Tensor:
    """x [num_rows, num_inputs] float32 -> x W^T [num_rows, num_outputs] float32."""
    assert x.shape[1] == weight.num_inputs, f"{x.shape[1]} inputs for {weight.num_inputs}"
    _check(x)
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


def _check(x: Tensor) -> None:
    assert x.shape[1] % GROUP == 0, f"rows of {x.shape[1]} values are no groups of {GROUP}"
    assert x.dtype == torch.float32, f"rows are float32, not {x.dtype}"
    assert x.is_contiguous(), "rows must follow one another in memory"
