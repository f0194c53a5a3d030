"""Decides whether a model is served with float weights or with int4 and int8 weights.

`auto` serves a checkpoint of floats as floats, and a quantised GGUF file as it is stored where the
whole forward pass can be one kernel call. Reads no weights.
"""

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
    """The decision for one model. If `quantized` is False, the weights are served as floats."""

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
    """Decide whether the weights are quantised. `kv_dtype` is the dtype of K and V if they are.

    Where the forward pass cannot be one kernel call, `auto` selects floats, which are faster then,
    and `int8` and `int4` are served layer by layer. Raises `ModelError` if that is not possible.
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
