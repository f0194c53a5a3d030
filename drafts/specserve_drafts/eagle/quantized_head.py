"""The int4 weights of an EAGLE-3 head, for backends with kernels for them.

Reading weights takes most of the time of a forward pass over one or two nodes, and int4 weights
have an eighth of the bytes of float32.
"""

import torch
from torch import Tensor

from specserve.models.rope import rotary_table
from specserve_drafts.eagle.checkpoint import HeadCheckpoint
from specserve_drafts.eagle.head_shape import HeadShape, aux_norm_names
from specserve_kernels.decoder import (
    DecoderWeights,
    LayerWeights,
    PackedLinear,
    why_not_packed,
)
from specserve_kernels.draft_head import DraftHeadWeights
from specserve_kernels.packed_weight import GROUP, PackedWeight, quantize_int4


def can_be_quantized(shape: HeadShape) -> bool:
    """Whether the kernels support an int4 head of this shape."""
    reason = why_not_packed(
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
    )
    fits_groups = shape.target_hidden_size * len(shape.aux_layers) % GROUP == 0
    return shape.kind == "eagle3" and reason is None and fits_groups


def read_weights(
    file: HeadCheckpoint,
    num_positions: int,
    embedding: PackedWeight,  # the target's, [vocab_size, hidden_size]
) -> DraftHeadWeights:
    """The weights of a head as int4. `can_be_quantized` of its shape must be True, and it must have
    LM head rows."""
    shape = file.shape

    def norm(name: str) -> Tensor:
        return file.tensor(f"{name}.weight").float()

    def linear(name: str, with_bias: bool) -> PackedLinear:
        weight = quantize_int4(file.tensor(f"{name}.weight"))
        return PackedLinear(weight, file.tensor(f"{name}.bias").float() if with_bias else None)

    def layer(index: int) -> LayerWeights:
        prefix = f"layers.{index}"
        attention, mlp = f"{prefix}.self_attn", f"{prefix}.mlp"
        return LayerWeights(
            norm(f"{prefix}.input_layernorm"),
            norm(f"{prefix}.post_attention_layernorm"),
            linear(f"{attention}.q_proj", shape.qkv_bias),
            linear(f"{attention}.k_proj", shape.qkv_bias),
            linear(f"{attention}.v_proj", shape.qkv_bias),
            linear(f"{attention}.o_proj", shape.o_bias),
            linear(f"{mlp}.gate_proj", shape.mlp_bias),
            linear(f"{mlp}.up_proj", shape.mlp_bias),
            linear(f"{mlp}.down_proj", shape.mlp_bias),
            norm(f"{attention}.q_norm") if shape.qk_norm else None,
            norm(f"{attention}.k_norm") if shape.qk_norm else None,
        )

    if shape.own_embedding:
        embedding = quantize_int4(file.tensor("embed_tokens.weight"))
    cos, sin = rotary_table(shape.rope, shape.head_dim, num_positions)
    decoder = DecoderWeights(
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
        shape.rms_norm_eps,
        cos,
        sin,
        embedding,
        [layer(index) for index in range(shape.num_layers)],
        norm("norm"),
        linear("lm_head", False),
        hidden_norm=norm("layers.0.hidden_norm"),
        normed_residual=shape.norm_before_residual,
    )
    ids = file.token_ids
    return DraftHeadWeights(
        decoder,
        linear("fc", shape.fc_bias),
        [norm(name) for name in aux_norm_names(shape)],
        shape.norm_output,
        shape.logit_scale,
        torch.arange(shape.draft_vocab_size) if ids is None else ids.to(torch.int64).contiguous(),
    )
