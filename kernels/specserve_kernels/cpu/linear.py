"""Products with quantised weights: rows to 8 bits, then integer products in a fixed order."""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from specserve_kernels.cpu.native import num_threads
from specserve_kernels.packing import GROUP, PANEL, PackedWeight


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Activations as the kernels take them, with what the integer products need beside."""

    values: Tensor  # [num_rows, size] int8
    scales: Tensor  # [num_rows, size / 32] float32
    offsets: Tensor  # [num_rows, size / 32] float32, scale * sum
    sums: Tensor  # [num_rows, size / 32] int32, of a group's integers

    @property
    def addresses(self) -> tuple[int, int, int, int]:
        return (
            self.values.data_ptr(),
            self.scales.data_ptr(),
            self.offsets.data_ptr(),
            self.sums.data_ptr(),
        )


def quantize_rows(library: ctypes.CDLL, x: Tensor) -> QuantizedRows:
    """x [num_rows, size] float32, contiguous; the definition is `torch_ref.linear`."""
    num_rows, size = x.shape
    assert size % GROUP == 0, f"rows of {size} values are no groups of {GROUP}"
    assert x.dtype == torch.float32, f"rows are float32, not {x.dtype}"
    assert x.is_contiguous(), "rows must follow one another in memory"
    scales = torch.empty(num_rows, size // GROUP)
    rows = QuantizedRows(
        torch.empty(num_rows, size, dtype=torch.int8),
        scales,
        torch.empty_like(scales),
        torch.empty_like(scales, dtype=torch.int32),
    )
    library.specserve_quantize(x.data_ptr(), num_rows, size, *rows.addresses, num_threads())
    return rows


def packed_linear(library: ctypes.CDLL, x: Tensor, weight: PackedWeight) -> Tensor:
    """x [num_rows, num_inputs] float32 -> x W^T [num_rows, num_outputs] float32."""
    assert x.shape[1] == weight.num_inputs, f"{x.shape[1]} inputs for {weight.num_inputs}"
    rows = quantize_rows(library, x)
    num_panels = weight.panels.shape[0]
    y = torch.empty(x.shape[0], num_panels * PANEL)
    library.specserve_linear(
        weight.panels.data_ptr(),
        weight.format,
        weight.num_inputs,
        num_panels * PANEL,
        *rows.addresses,
        x.shape[0],
        y.data_ptr(),
        num_threads(),
    )
    return y[:, : weight.num_outputs]
