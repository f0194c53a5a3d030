"""A forward pass of a `LlamaModel` with packed weights as one native call on the CPU."""

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from specserve.batch import ForwardBatch, ModelOutput
from specserve.cache.storage import KVStorage
from specserve.models.layers.decoder_layer import DecoderLayer
from specserve.models.layers.linear import Linear
from specserve.models.layers.norm import RMSNorm
from specserve.models.llama import LlamaModel
from specserve.models.quantization.method import QuantMethod
from specserve.models.quantization.panels import PanelMethod
from specserve.models.shape import ModelShape
from specserve_kernels.decoder import (
    DecoderPass,
    DecoderWeights,
    LayerWeights,
    PackedLinear,
    why_not_packed,
)
from specserve_kernels.dispatch import fused_models
from specserve_kernels.ops import Kernels
from specserve_kernels.packed_weight import PackedWeight

_KV_DTYPES: Final = (torch.float32, torch.bfloat16)


class NotFusedError(Exception):
    """The reason why a model has to run layer by layer."""


class FusedModel:
    """A `Model` that runs the forward pass of `model` in one native call, with the same weights.

    Raises `NotFusedError` if the kernels do not support the model, one of its layers or K and V.
    """

    exact = True
    row_multiple = 1

    def __init__(self, model: LlamaModel) -> None:
        reason = why_not_fused(model.shape, model.kernels, model.dtype)
        fused = fused_models(model.kernels)
        if reason is not None or fused is None:
            raise NotFusedError(reason)
        self.shape = model.shape
        self.dtype = model.dtype
        self.kv_spec = model.kv_spec
        self.num_bytes, self.weights = model.num_bytes, model.weights
        self.embed, self.final_norm = model.embed, model.final_norm
        weights = _decoder_weights(model)
        if len({linear.weight.format.quantized for linear in _layer_linears(weights)}) > 1:
            raise NotFusedError("some weights of its layers are quantised and others are floats")
        self.packed_embedding: PackedWeight | None = weights.embed
        self._decoder = fused.decoder(weights)
        self.logits, self.unembed = self._decoder.head, self._decoder.unembed

    def __call__(
        self,
        batch: ForwardBatch,
        kv: KVStorage,
        *,
        aux_layers: tuple[int, ...] = (),
        num_top: int = 0,
    ) -> ModelOutput:
        """See `Model`."""
        rows = batch.input_ids, batch.positions, batch.slots, batch.segments
        out = self._decoder(DecoderPass(*rows, kv.data, batch.logit_rows, num_top, aux_layers))
        aux = out.aux_hidden_states.flatten(1) if aux_layers else None
        return ModelOutput(out.logits, out.top if num_top else None, aux)


def why_not_fused(shape: ModelShape, kernels: Kernels, kv_dtype: torch.dtype) -> str | None:
    """The reason why no model of this shape can run in one native call; None if it can."""
    if fused_models(kernels) is None:
        return f"the {kernels.name} kernels have no forward pass in one call"
    if kv_dtype not in _KV_DTYPES:
        return f"its K and V need dtype float32 or bfloat16, not {kv_dtype}"
    heads = shape.num_heads, shape.num_kv_heads, shape.head_dim
    return why_not_packed(shape.hidden_size, shape.intermediate_size, *heads)


def _decoder_weights(model: LlamaModel) -> DecoderWeights:
    shape = model.shape
    (head,) = _linears(model.head, "lm_head")
    return DecoderWeights(
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.rms_norm_eps,
        model.rotary.cos,
        model.rotary.sin,
        _weights(model.embedding, "embed_tokens")[0],
        [_layer_weights(layer, f"layers.{i}") for i, layer in enumerate(model.layers)],
        model.norm.weight,
        head,
    )


def _layer_weights(layer: DecoderLayer, name: str) -> LayerWeights:
    attention, mlp = layer.attention, layer.mlp
    q, k, v = _linears(attention.qkv, f"{name}.qkv")
    (out,) = _linears(attention.out, f"{name}.out")
    gate, up = _linears(mlp.gate_up, f"{name}.gate_up")
    (down,) = _linears(mlp.down, f"{name}.down")
    return LayerWeights(
        layer.attention_norm.weight,
        layer.mlp_norm.weight,
        *(q, k, v, out, gate, up, down),
        _norm_weight(attention.q_norm),
        _norm_weight(attention.k_norm),
        attention.window,
    )


def _norm_weight(norm: RMSNorm | None) -> Tensor | None:
    return None if norm is None else norm.weight


def _linears(linear: Linear, name: str) -> list[PackedLinear]:
    """The linear maps that `linear` consists of, such as q, k and v."""
    parts = _weights(linear.method, name)
    if linear.bias is None:
        return [PackedLinear(part) for part in parts]
    biases = torch.split(linear.bias, [part.num_outputs for part in parts])
    return [PackedLinear(part, bias) for part, bias in zip(parts, biases, strict=True)]


def _weights(method: QuantMethod, name: str) -> tuple[PackedWeight, ...]:
    if not isinstance(method, PanelMethod):
        raise NotFusedError(f"the weight of {name} is not packed in panels")
    return method.parts


def _layer_linears(weights: DecoderWeights) -> Iterator[PackedLinear]:
    for layer in weights.layers:
        yield from (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)
