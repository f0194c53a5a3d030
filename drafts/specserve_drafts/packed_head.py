"""The EAGLE-3 head of `heads` with int4 weights, run by the kernels of a backend that has them.

Reading weights takes most of the time of a forward pass over one or two nodes, and int4 weights
have an eighth of the bytes of float32. Owns the mapping from the checkpoint's tensors to the
kernels' weights. EAGLE-3 only, and the head file must have its own LM head rows.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from specserve.cache.storage import KVStorage
from specserve.models.rope import rotary_table
from specserve_drafts.formats import HeadFile
from specserve_drafts.head_shape import HeadShape
from specserve_drafts.heads import HeadBatch
from specserve_kernels.decoder import (
    DecoderPass,
    DecoderWeights,
    LayerWeights,
    PackedLinear,
    why_not_packed,
)
from specserve_kernels.draft_head import (
    DraftHeadWeights,
    Growing,
    Grown,
    GrowShape,
    PackedDraftHead,
)
from specserve_kernels.packing import GROUP, PackedWeight, quantize_int4

_NO_ROWS = torch.empty(0, dtype=torch.int64)


def can_be_packed(shape: HeadShape) -> bool:
    """Whether the kernels support an int4 head of this shape."""
    reason = why_not_packed(
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_heads,
        shape.num_kv_heads,
        shape.head_dim,
    )
    is_whole = shape.target_hidden_size * len(shape.taps) % GROUP == 0
    return shape.kind == "eagle3" and reason is None and is_whole


class PackedHead:
    """As `heads.DraftHead`, and `grow` expands whole trees in one call. `can_be_packed` of the
    file's shape must be True."""

    def __init__(
        self,
        file: HeadFile,
        make: Callable[[DraftHeadWeights], PackedDraftHead],
        num_positions: int,
        embedding: PackedWeight,  # the target's, [vocab_size, hidden_size]
    ) -> None:
        self.shape = file.shape
        self._head = make(_read(file, num_positions, embedding))
        self.fuse = self._head.fuse
        self.logits = self._head.logits

    def __call__(self, batch: HeadBatch, rows: Tensor, kv: KVStorage) -> Tensor:
        """See `heads.DraftHead`."""
        return self._head(_pass_over(batch, rows, kv))

    def take_in(self, batch: HeadBatch, rows: Tensor, kv: KVStorage) -> None:
        """See `heads.DraftHead`."""
        self._head.take_in(_pass_over(batch, rows, kv))

    def grow(self, shape: GrowShape, kv: KVStorage, trees: Sequence[Growing]) -> list[Grown]:
        """See `PackedDraftHead.grow`."""
        return self._head.grow(shape, kv.data, trees)


def _pass_over(batch: HeadBatch, rows: Tensor, kv: KVStorage) -> DecoderPass:
    return DecoderPass(
        batch.input_ids,
        batch.positions,
        batch.slots,
        batch.segments,
        kv.data,
        _NO_ROWS,
        rows=rows.contiguous(),
    )


def _read(file: HeadFile, num_positions: int, embedding: PackedWeight) -> DraftHeadWeights:
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
        row_norm=norm("layers.0.hidden_norm"),
        normed_residual=shape.norm_before_residual,
    )
    tap_norms: list[Tensor] = []
    if shape.tap_norm == "each":
        tap_norms = [norm(f"fc_norm.{index}") for index in range(len(shape.taps))]
    if shape.tap_norm == "joint":
        tap_norms = [norm("input_norm")]
    ids = file.token_ids
    return DraftHeadWeights(
        decoder,
        linear("fc", shape.fc_bias),
        tap_norms,
        shape.norm_output,
        shape.logit_scale,
        torch.arange(shape.draft_vocab_size) if ids is None else ids.to(torch.int64).contiguous(),
    )
