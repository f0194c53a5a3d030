"""An EAGLE-3 head (see `head`) with int4 weights, run by the kernels of a backend that has them.

Reading weights takes most of the time of a forward pass over one or two nodes, and int4 weights
have an eighth of the bytes of float32. Owns the mapping from the checkpoint's tensors to the
kernels' weights. EAGLE-3 only, and the head file must have its own LM head rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from specserve.cache.storage import KVStorage
from specserve.models.rope import rotary_table
from specserve_drafts.eagle.checkpoint import HeadCheckpoint
from specserve_drafts.eagle.head import HeadBatch
from specserve_drafts.eagle.head_shape import HeadShape
from specserve_kernels.decoder import (
    DecoderPass,
    DecoderWeights,
    LayerWeights,
    QuantizedLinear,
    why_not_quantized,
)
from specserve_kernels.draft_head import (
    DraftHeadWeights,
    ExpandedTree,
    ExpansionLimits,
    ExpansionTask,
)
from specserve_kernels.fused import FusedModels
from specserve_kernels.quantized_weight import GROUP, QuantizedWeight, quantize_int4

_NO_ROWS = torch.empty(0, dtype=torch.int64)


def can_be_quantized(shape: HeadShape) -> bool:
    """Whether the kernels support an int4 head of this shape."""
    reason = why_not_quantized(
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
    )
    fits_groups = shape.target_hidden_size * len(shape.aux_layers) % GROUP == 0
    return shape.kind == "eagle3" and reason is None and fits_groups


class QuantizedHead:
    """As `head.DraftHead`, and `expand` builds whole trees in one call. `can_be_quantized` of the
    file's shape must be True."""

    def __init__(
        self,
        file: HeadCheckpoint,
        fused: FusedModels,
        num_positions: int,
        embedding: QuantizedWeight,  # the target's, [vocab_size, hidden_size]
    ) -> None:
        self.shape = file.shape
        self._head = fused.draft_head(_read_weights(file, num_positions, embedding))
        self.fuse = self._head.fuse
        self.logits = self._head.logits

    def __call__(self, batch: HeadBatch, hidden_states: Tensor, kv: KVStorage) -> Tensor:
        """See `head.DraftHead`."""
        return self._head(_decoder_pass(batch, hidden_states, kv))

    def write_kv(self, batch: HeadBatch, hidden_states: Tensor, kv: KVStorage) -> None:
        """See `head.DraftHead`."""
        self._head.write_kv(_decoder_pass(batch, hidden_states, kv))

    def expand(
        self, limits: ExpansionLimits, kv: KVStorage, tasks: Sequence[ExpansionTask]
    ) -> list[ExpandedTree]:
        """See `QuantizedDraftHead.expand`."""
        return self._head.expand(limits, kv.data, tasks)


def _decoder_pass(batch: HeadBatch, hidden_states: Tensor, kv: KVStorage) -> DecoderPass:
    return DecoderPass(
        batch.input_ids,
        batch.positions,
        batch.slots,
        batch.segments,
        kv.data,
        _NO_ROWS,
        hidden_in=hidden_states.contiguous(),
    )


def _read_weights(
    file: HeadCheckpoint, num_positions: int, embedding: QuantizedWeight
) -> DraftHeadWeights:
    shape = file.shape

    def norm(name: str) -> Tensor:
        return file.tensor(f"{name}.weight").float()

    def linear(name: str, with_bias: bool) -> QuantizedLinear:
        weight = quantize_int4(file.tensor(f"{name}.weight"))
        return QuantizedLinear(weight, file.tensor(f"{name}.bias").float() if with_bias else None)

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
    aux_norms: list[Tensor] = []
    if shape.aux_norm == "each":
        aux_norms = [norm(f"fc_norm.{index}") for index in range(len(shape.aux_layers))]
    if shape.aux_norm == "joint":
        aux_norms = [norm("input_norm")]
    ids = file.token_ids
    return DraftHeadWeights(
        decoder,
        linear("fc", shape.fc_bias),
        aux_norms,
        shape.norm_output,
        shape.logit_scale,
        torch.arange(shape.draft_vocab_size) if ids is None else ids.to(torch.int64).contiguous(),
    )
