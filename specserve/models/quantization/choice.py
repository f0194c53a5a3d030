"""Decides how a model's weights are held: quantised or as floats, packed in panels or not."""

from typing import Final

import torch
from msgspec import Struct

from specserve.models.checkpoint import Checkpoint
from specserve.models.fields import ModelError
from specserve.models.fused_cpu import why_not_fused
from specserve.models.shape import ModelShape
from specserve.models.tensor_sizes import EMBEDDING
from specserve.types import Quantization
from specserve_kernels.ops import Kernels
from specserve_kernels.packed_weight import GROUP

_STORED: Final = {"BF16": torch.bfloat16, "F16": torch.float16}


class QuantizationChoice(Struct, frozen=True):
    """The decision for one model."""

    quantized: bool  # int4 and int8 weights, else floats
    packed: bool  # in panels for the native kernels of the CPU, as all quantised weights are
    weights: str  # what the weights are held as, such as bfloat16 or int8
    reason: str


def choose_quantization(
    setting: Quantization,
    shape: ModelShape,
    checkpoint: Checkpoint,
    kernels: Kernels,
    device: torch.device,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
) -> QuantizationChoice:
    """Decide without reading weights. `kv_dtype` is the dtype of K and V of packed weights.

    `auto` quantises only what the checkpoint stores so, and only if a forward pass can be one
    kernel call; otherwise floats are faster. `int8` and `int4` are then served layer by layer.
    Raises `ModelError` if that is not possible either. Floats are packed if a forward pass can be
    one kernel call: in their stored dtype, or in `dtype` if they are wider. Others have `dtype`.
    """
    layer_by_layer = why_not_fused(shape, kernels, kv_dtype)
    packed = layer_by_layer is None
    floats = str(_float_dtype(checkpoint, dtype) if packed else dtype).removeprefix("torch.")
    if setting == "none":
        return QuantizationChoice(False, packed, floats, "as set")
    if setting == "auto" and not checkpoint.quantized:
        why = "the checkpoint's weights are floats"
        return QuantizationChoice(False, packed, floats, why)
    if setting == "auto":
        why = layer_by_layer or "the formats of the file are kept"
        return QuantizationChoice(packed, packed, "quantised" if packed else floats, why)
    if reason := _why_impossible(shape, device):
        raise ModelError(f"quantization: {setting!r} is not possible: {reason}; use 'none'")
    slower = f"; slower, layer by layer: {layer_by_layer}" if layer_by_layer else ""
    return QuantizationChoice(True, True, setting, f"as set{slower}")


def _float_dtype(checkpoint: Checkpoint, dtype: torch.dtype) -> torch.dtype:
    """The dtype of packed float weights, most of which have that of the embedding."""
    stored = _STORED.get(checkpoint.entries[EMBEDDING].dtype, torch.float32)
    return stored if stored.itemsize <= dtype.itemsize else dtype


def _why_impossible(shape: ModelShape, device: torch.device) -> str | None:
    """Why `panels` cannot hold the weights or multiply with them; None if it can."""
    if device.type != "cpu":
        return f"int8 and int4 weights need device cpu, not {device.type}"
    for name, size in (
        ("hidden_size", shape.hidden_size),
        ("intermediate_size", shape.intermediate_size),
        ("num_attention_heads x head_dim", shape.num_heads * shape.head_dim),
    ):
        if size % GROUP:
            return f"{name} {size} is no multiple of {GROUP}"
    return None
