"""Decides whether a model is served with quantised weights, and in which format each tensor is.

`auto` serves a checkpoint of floats as floats. Of a quantised GGUF file it keeps Q4_0, Q4_1 and
Q8_0 matrices as stored and converts the other matrices to int8. Knows no instruction set.
"""

from typing import Final

import torch
from msgspec import Struct

from specserve.models.checkpoint import Checkpoint
from specserve.models.fields import ModelError
from specserve.models.shape import ModelShape
from specserve.types import Quantization
from specserve_kernels.decoder import why_not_quantized
from specserve_kernels.dispatch import fused_models
from specserve_kernels.ops import Kernels
from specserve_kernels.quantized_weight import (
    QuantizedWeight,
    WeightFormat,
    dequantize,
    quantize_int4,
    quantize_int8,
)

_DTYPES: Final = (torch.float32, torch.bfloat16)  # of K and V beside quantised weights


class QuantizationChoice(Struct, frozen=True):
    """The decision for one model. If `quantized` is False, the weights are served as floats."""

    quantized: bool
    reason: str


def choose_quantization(
    setting: Quantization,
    shape: ModelShape,
    checkpoint: Checkpoint,
    kernels: Kernels,
    dtype: torch.dtype,
) -> QuantizationChoice:
    """Decide whether the weights are quantised. `dtype` is that of K and V.

    If that is impossible, `auto` falls back to floats and `int8` or `int4` raise `ModelError`.
    """
    if setting == "none":
        return QuantizationChoice(False, "as set")
    if setting == "auto" and not checkpoint.quantized:
        return QuantizationChoice(False, "the checkpoint's weights are floats")
    reason = _obstacle(shape, kernels, dtype)
    if reason is None:
        kept = "the formats of the file are kept" if setting == "auto" else "as set"
        return QuantizationChoice(True, kept)
    if setting != "auto":
        raise ModelError(f"quantization: {setting!r} is not possible: {reason}; use 'none'")
    return QuantizationChoice(False, reason)


def _obstacle(shape: ModelShape, kernels: Kernels, dtype: torch.dtype) -> str | None:
    if fused_models(kernels) is None:
        return f"the {kernels.name} kernels do not support quantised weights"
    if dtype not in _DTYPES:
        return f"quantised weights need dtype float32 or bfloat16, not {dtype}"
    return why_not_quantized(
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
    )


def read_quantized(
    checkpoint: Checkpoint, name: str, wanted: WeightFormat | None
) -> QuantizedWeight:
    """Read the matrix `name` in the `wanted` format, requantising it if necessary.

    None keeps the stored format, or selects int8 if that is neither Q4_0, Q4_1 nor Q8_0.
    """
    stored = checkpoint.quantized_weight(name)
    if stored is not None and wanted in (None, stored.format):
        return stored
    floats = checkpoint.floats(name) if stored is None else dequantize(stored)
    return quantize_int4(floats) if wanted is WeightFormat.INT4 else quantize_int8(floats)


def layer_format(setting: Quantization) -> WeightFormat | None:
    """The format of the layers' weights; None means as stored."""
    return {"int8": WeightFormat.INT8, "int4": WeightFormat.INT4}.get(setting)


def head_format(setting: Quantization) -> WeightFormat | None:
    """The format of embedding and head; None means as stored.

    The setting `int4` makes them int8, because int4 would cost the most quality there.
    """
    return None if setting == "auto" else WeightFormat.INT8
