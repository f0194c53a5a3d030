"""Decides whether a model is served with float weights or with int4 and int8 weights."""

import torch
from msgspec import Struct

from specserve.models.checkpoint import Checkpoint
from specserve.models.fields import ModelError
from specserve.models.fused_cpu import why_not_fused
from specserve.models.shape import ModelShape
from specserve.types import Quantization
from specserve_kernels.ops import Kernels
from specserve_kernels.quantized_weight import GROUP


class QuantizationChoice(Struct, frozen=True):
    """The decision for one model: its weights are quantised, or served as floats."""

    quantized: bool
    reason: str


def choose_quantization(
    setting: Quantization,
    shape: ModelShape,
    checkpoint: Checkpoint,
    kernels: Kernels,
    device: torch.device,
    kv_dtype: torch.dtype,
) -> QuantizationChoice:
    """Decide without reading weights. `kv_dtype` is the dtype of K and V if they are quantised.

    `auto` quantises only what the checkpoint stores so, and only if a forward pass can be one
    kernel call; otherwise floats are faster. `int8` and `int4` are then served layer by layer.
    Raises `ModelError` if that is not possible either.
    """
    if setting == "none":
        return QuantizationChoice(False, "as set")
    if setting == "auto" and not checkpoint.quantized:
        return QuantizationChoice(False, "the checkpoint's weights are floats")
    layer_by_layer = why_not_fused(shape, kernels, kv_dtype)
    if setting == "auto":
        kept = "the formats of the file are kept"
        return QuantizationChoice(layer_by_layer is None, layer_by_layer or kept)
    if reason := _why_impossible(shape, device):
        raise ModelError(f"quantization: {setting!r} is not possible: {reason}; use 'none'")
    slower = f"; slower, layer by layer: {layer_by_layer}" if layer_by_layer else ""
    return QuantizationChoice(True, f"as set{slower}")


def _why_impossible(shape: ModelShape, device: torch.device) -> str | None:
    """Why `int_groups` cannot hold the weights or multiply with them; None if it can."""
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
