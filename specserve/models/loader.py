"""Loads a model from a model directory.

Tensors are read one at a time, so memory use peaks at one model plus one tensor; that tensor is
float32 if it has to be converted to another format. Names, shapes and dtypes are checked before
the weights are loaded; values that are NaN or infinite are found while loading.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from specserve.models.checkpoint import Checkpoint, read_checkpoint
from specserve.models.llama import LlamaModel
from specserve.models.model import Model
from specserve.models.quantization import (
    choose_quantization,
    head_format,
    layer_format,
    read_quantized,
)
from specserve.models.quantized_llama import QuantizedLlama
from specserve.models.registry import BUILDERS
from specserve.models.shape import ModelShape
from specserve.models.weight_check import check_room, check_weights
from specserve.types import Quantization
from specserve_kernels.huge_pages import Arena
from specserve_kernels.ops import Kernels
from specserve_kernels.quantized_weight import QuantizedWeight, WeightFormat


def load_model(
    path: Path,
    *,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    exact: bool,
    quantization: Quantization = "none",
    quantized_kv_dtype: torch.dtype | None = None,
) -> Model:
    """Load the model in the directory `path`, ready to run.

    `dtype` and `exact` apply to a model with float weights. With quantised weights, K and V have
    the dtype `quantized_kv_dtype`, or `dtype` if that is None. Raises `ModelError` naming the file,
    field or tensors at fault.
    """
    shape, checkpoint = _read(path)
    kv_dtype = quantized_kv_dtype or dtype
    if choose_quantization(quantization, shape, checkpoint, kernels, kv_dtype).quantized:
        return _quantized_llama(shape, checkpoint, kernels, kv_dtype, quantization)
    return _llama(shape, checkpoint, kernels, dtype, device, exact)


def load_llama(
    path: Path, *, kernels: Kernels, dtype: torch.dtype, device: torch.device, exact: bool
) -> LlamaModel:
    """Load the model in the directory `path` with float weights. Raises `ModelError`."""
    shape, checkpoint = _read(path)
    return _llama(shape, checkpoint, kernels, dtype, device, exact)


def _read(path: Path) -> tuple[ModelShape, Checkpoint]:
    return check_weights(path, ModelShape.from_dir(path), read_checkpoint(path))


def _llama(
    shape: ModelShape,
    checkpoint: Checkpoint,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    exact: bool,
) -> LlamaModel:
    check_room(shape, dtype.itemsize, device)
    build = BUILDERS[shape.architecture]
    model = build(shape, kernels, dtype=dtype, device=device, exact=exact)
    for name, slot in model.weight_slots().items():
        slot.copy_(checkpoint.floats(name))
    model.freeze()
    return model


def _quantized_llama(
    shape: ModelShape,
    checkpoint: Checkpoint,
    kernels: Kernels,
    dtype: torch.dtype,
    quantization: Quantization,
) -> QuantizedLlama:
    check_room(shape, 0.5, torch.device("cpu"))
    arena = Arena()

    def read(wanted: WeightFormat | None, name: str) -> QuantizedWeight:
        weight = read_quantized(checkpoint, name, wanted)
        return replace(weight, panels=arena.copy(weight.panels))

    return QuantizedLlama(
        shape,
        checkpoint,
        kernels,
        read=partial(read, layer_format(quantization)),
        read_head=partial(read, head_format(quantization)),
        dtype=dtype,
    )
