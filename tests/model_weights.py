"""The weights of a loaded model under the names that a checkpoint has for them."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from specserve.models.layers.decoder_layer import DecoderLayer
from specserve.models.layers.linear import Linear
from specserve.models.llama import LlamaModel
from specserve.models.quantization.dense import DenseMethod


def weights_by_name(model: LlamaModel) -> dict[str, Tensor]:
    """Every tensor of a model with float weights; fused linear maps are split."""
    weights = {"model.embed_tokens.weight": _embedding(model)}
    weights["model.norm.weight"] = model.norm.weight
    if not model.shape.tied_head:
        weights["lm_head.weight"] = dense(model.head)
    for index, layer in enumerate(model.layers):
        named = _layer_weights(model, layer)
        weights.update((f"model.layers.{index}.{name}", weight) for name, weight in named)
    return weights


def dense(linear: Linear) -> Tensor:
    """The weight of a linear map that holds floats."""
    assert isinstance(linear.method, DenseMethod)
    return linear.method.weight


def _embedding(model: LlamaModel) -> Tensor:
    return model.embedding.rows(torch.arange(model.shape.vocab_size))


def _layer_weights(model: LlamaModel, layer: DecoderLayer) -> Iterator[tuple[str, Tensor]]:
    shape, attention = model.shape, layer.attention
    yield "input_layernorm.weight", layer.attention_norm.weight
    yield "post_attention_layernorm.weight", layer.mlp_norm.weight
    if attention.q_norm is not None and attention.k_norm is not None:
        yield "self_attn.q_norm.weight", attention.q_norm.weight
        yield "self_attn.k_norm.weight", attention.k_norm.weight
    heads = [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads]
    qkv_sizes = [count * shape.head_dim for count in heads]
    yield from _parts(attention.qkv, [f"self_attn.{part}_proj" for part in "qkv"], qkv_sizes)
    yield from _parts(attention.out, ["self_attn.o_proj"], [shape.hidden_size])
    sizes = [shape.intermediate_size] * 2
    yield from _parts(layer.mlp.gate_up, ["mlp.gate_proj", "mlp.up_proj"], sizes)
    yield from _parts(layer.mlp.down, ["mlp.down_proj"], [shape.hidden_size])


def _parts(
    linear: Linear, names: Sequence[str], sizes: Sequence[int]
) -> Iterator[tuple[str, Tensor]]:
    for kind, whole in (("weight", dense(linear)), ("bias", linear.bias)):
        if whole is not None:
            for name, part in zip(names, torch.split(whole, list(sizes)), strict=True):
                yield f"{name}.{kind}", part
