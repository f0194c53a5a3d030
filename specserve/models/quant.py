"""Whether a model is served with quantised weights, and in which format each tensor is.

`auto` keeps what a GGUF file holds as it is and quantises nothing else. Knows formats and no
instruction set.
"""

from typing import Final

import torch
from msgspec import Struct

from specserve.models.checkpoint import Checkpoint
from specserve.models.fields import ModelError
from specserve.models.shape import ModelShape
from specserve.types import Quantization
from specserve_kernels.decoder import why_not_packed
from specserve_kernels.ops import Kernels
from specserve_kernels.packing import (
    PackedWeight,
    WeightFormat,
    quantize_int4,
    quantize_int8,
    unpack,
)

_DTYPES: Final = (torch.float32, torch.bfloat16)  # of K and V beside packed weights


class Choice(Struct, frozen=True):
    """What a setting comes to for one model. `packed` is False: weights are floats."""

    packed: bool
    reason: str


def choose(
    setting: Quantization,
    shape: ModelShape,
    checkpoint: Checkpoint,
    kernels: Kernels,
    dtype: torch.dtype,
) -> Choice:
    """Raises `ModelError` if the setting asks for what this model or backend cannot do."""
    if setting == "none":
        return Choice(False, "as set")
    if setting == "auto" and not checkpoint.quantized:
        return Choice(False, "the checkpoint's weights are floats")
    reason = _obstacle(shape, kernels, dtype)
    if reason is None:
        kept = "the formats of the file are kept" if setting == "auto" else "as set"
        return Choice(True, kept)
    if setting != "auto":
        raise ModelError(f"quantization: {setting!r} is not possible: {reason}; use 'none'")
    return Choice(False, reason)


def _obstacle(shape: ModelShape, kernels: Kernels, dtype: torch.dtype) -> str | None:
    if kernels.packed_decoder is None:
        return f"the {kernels.name} kernels have no packed weights"
    if dtype not in _DTYPES:
        return f"packed weights go with dtype float32 or bfloat16, not {dtype}"
    return why_not_packed(
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
    )


def pack_tensor(checkpoint: Checkpoint, name: str, wanted: WeightFormat | None) -> PackedWeight:
    """One weight in the `wanted` format; None: as the file has it, int8 if that is no format."""
    packed = checkpoint.packed(name)
    if packed is not None and wanted in (None, packed.format):
        return packed
    floats = checkpoint.floats(name) if packed is None else unpack(packed)
    return quantize_int4(floats) if wanted is WeightFormat.INT4 else quantize_int8(floats)


def layer_format(setting: Quantization) -> WeightFormat | None:
    """What the layers' weights become."""
    return {"int8": WeightFormat.INT8, "int4": WeightFormat.INT4}.get(setting)


def head_format(setting: Quantization) -> WeightFormat | None:
    """What embedding and head become: never int4, which would cost the most just there."""
    return None if setting == "auto" else WeightFormat.INT8
