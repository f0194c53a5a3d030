"""Loads a model from a model directory.

Tensors are read one at a time, so memory use peaks at one model plus one tensor, in float32 if it
has to be converted.
"""

import logging
from pathlib import Path

import torch

from specserve.models.checkpoint import read_checkpoint
from specserve.models.fused_cpu import FusedModel, NotFusedError
from specserve.models.llama import LlamaModel
from specserve.models.model import Model
from specserve.models.quantization.choice import choose_quantization
from specserve.models.quantization.dense import DenseScheme
from specserve.models.quantization.panels import PanelScheme
from specserve.models.quantization.scheme import QuantScheme
from specserve.models.shape import ModelShape
from specserve.models.weight_check import check_room, check_weights
from specserve.types import Quantization
from specserve_kernels.ops import Kernels

logger = logging.getLogger(__name__)

_LEAST_BYTES = 0.5  # per int4 weight, without scales


def load_model(
    path: Path,
    *,
    kernels: Kernels,
    dtype: torch.dtype,
    device: torch.device,
    exact: bool,
    quantization: Quantization = "none",
    packed_kv_dtype: torch.dtype | None = None,
) -> Model:
    """Load the model in the directory `path`, ready to run.

    Float weights have at most the width of `dtype`. If they run layer by layer, they have this
    dtype, as K and V, and `exact` applies. With packed weights (see `quantization.choice`), K and V
    have the dtype `packed_kv_dtype`, or `dtype` if that is None. Raises `ModelError` naming the
    file, field or tensors at fault.
    """
    shape, checkpoint = check_weights(path, ModelShape.from_dir(path), read_checkpoint(path))
    kv_dtype = packed_kv_dtype or dtype
    choice = choose_quantization(quantization, shape, checkpoint, kernels, device, dtype, kv_dtype)
    num_bytes = _LEAST_BYTES if choice.quantized else getattr(torch, choice.weights).itemsize
    check_room(shape, num_bytes, device)
    scheme: QuantScheme
    if choice.packed:
        setting = quantization if choice.quantized else "none"
        scheme = PanelScheme(checkpoint, kernels, setting, dtype)
    else:
        kv_dtype = dtype
        scheme = DenseScheme(checkpoint, dtype=dtype, device=device, exact=exact)
    model = LlamaModel(shape, checkpoint, scheme, kernels, kv_dtype=kv_dtype, device=device)
    model.weights = choice.weights
    if not choice.packed:
        return model
    try:
        return FusedModel(model)
    except NotFusedError as reason:
        logger.warning("%s: runs layer by layer, which is slower: %s", path, reason)
        return model
