"""Reference products: quantize the rows if the weights are quantized, multiply in float64."""

import torch
from torch import Tensor

from specserve_kernels.packed_weight import GROUP, PackedWeight, unpack

_LEAST = 1e-30  # groups with no larger magnitude become zero: 127 / magnitude might be infinite


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[num_rows, size] float32 -> integers [num_rows, size] int8, scales [num_rows, size / 32].

    Symmetric per group of 32: scale = max |x| / 127; rounds to nearest, ties to even. A group with
    a value that is not finite has a NaN scale.
    """
    groups = torch.unflatten(x, -1, (-1, GROUP))
    most = groups.abs().amax(-1)
    finite = groups.isfinite().all(-1)
    inverse = torch.where(finite & (most > _LEAST), 127 / most, 0.0)
    values = torch.where(finite[..., None], groups * inverse[..., None], 0.0).round()
    scales = torch.where(finite, most / 127, torch.nan)
    return values.to(torch.int8).flatten(-2), scales


def packed_linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """x [num_rows, num_inputs] float32 -> x W^T [num_rows, num_outputs] float32."""
    rows = x.double()
    if weight.format.quantized:
        values, scales = quantize_rows(x)
        groups = torch.unflatten(values.double(), -1, (-1, GROUP)) * scales.double()[..., None]
        rows = groups.flatten(1)
    # One row at a time, so that a row's bits do not depend on the other rows.
    columns = unpack(weight).double()
    products = [columns @ row for row in rows]
    return torch.stack(products).float() if products else x.new_empty(0, weight.num_outputs)
