"""A whole forward pass of a decoder-only transformer as one kernel.

Defines the kernel's inputs and outputs; `torch_ref.decoder` defines what it computes. Knows no
checkpoint and no model names. Activations are float32; before a product with quantized weights they
are quantized to 8 bits in groups of 32. K and V have the dtype of the cache.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from torch import Tensor

from specserve_kernels.packed_weight import GROUP, PackedWeight
from specserve_kernels.segments import Segments

MAX_TOP: Final = 64  # largest `DecoderPass.num_top`


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """The map x -> x W^T + b."""

    weight: PackedWeight
    bias: Tensor | None = None  # [num_outputs] float32


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Attention and a SwiGLU MLP, each preceded by an RMSNorm. Norm weights are float32."""

    attention_norm: Tensor  # [hidden_size]
    mlp_norm: Tensor  # [hidden_size]
    q: PackedLinear
    k: PackedLinear
    v: PackedLinear
    o: PackedLinear
    gate: PackedLinear
    up: PackedLinear
    down: PackedLinear
    q_norm: Tensor | None = None  # [head_dim], as k_norm
    k_norm: Tensor | None = None
    window: int = 0  # sliding window in positions, 0: none


@dataclass(frozen=True, slots=True)
class DecoderWeights:
    """The weights of one model, and its shape."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    cos: Tensor  # [num_positions, head_dim / 2] float32
    sin: Tensor
    embed: PackedWeight  # [vocab_size, hidden_size]
    layers: Sequence[LayerWeights]
    norm: Tensor  # [hidden_size] float32
    head: PackedLinear
    # Set for a draft head (`draft_head`) only. The input of its first layer's q, k and v is the
    # token's embedding, normalized by `attention_norm`, concatenated with its row of
    # `DecoderPass.hidden_in`, normalized by `hidden_norm`.
    hidden_norm: Tensor | None = None  # [hidden_size] float32
    normed_residual: bool = False  # the residual stream starts as the normalized `hidden_in`

    @property
    def hidden_size(self) -> int:
        return self.embed.num_inputs

    @property
    def vocab_size(self) -> int:
        return self.head.weight.num_outputs


@dataclass(frozen=True, slots=True)
class DecoderPass:
    """The inputs of one forward pass. Every row belongs to a segment; tensors are contiguous."""

    input_ids: Tensor  # [num_rows] int64
    positions: Tensor  # [num_rows] int64
    slots: Tensor  # [num_rows] int64, -1: K and V are not written
    segments: Segments
    kv: Tensor  # [num_layers, 2, num_slots, num_kv_heads, head_dim], written in place
    logit_rows: Tensor  # [num_logit_rows] int64
    num_top: int = 0  # best tokens to return per logit row
    # Auxiliary hidden states to return. i: input of layer i; num_layers: output of the last layer.
    aux_layers: tuple[int, ...] = ()
    hidden_in: Tensor | None = None  # [num_rows, hidden_size] float32, for a draft head only


@dataclass(frozen=True, slots=True)
class DecoderOutput:
    logits: Tensor  # [num_logit_rows, vocab_size] float32
    # [num_logit_rows, num_top] int64, the best token first, the lowest id first among equals; -1 in
    # rows with a logit that is not finite.
    top: Tensor
    aux_hidden_states: Tensor  # [num_rows, num_aux_layers, hidden_size] float32


class FusedDecoder(Protocol):
    """A model on one backend."""

    def __call__(self, batch: DecoderPass) -> DecoderOutput: ...

    def head(self, x: Tensor) -> Tensor:
        """Final norm and unembedding: [n, hidden_size] float32 -> [n, vocab_size] float32."""
        ...

    def unembed(self, x: Tensor) -> Tensor:
        """Unembedding without the norm: [n, hidden_size] float32 -> [n, vocab_size] float32."""
        ...


def why_not_packed(
    hidden_size: int, intermediate_size: int, num_heads: int, num_kv_heads: int, head_dim: int
) -> str | None:
    """The reason why the kernel supports no model of this shape; None if it does."""
    group_size = num_heads // num_kv_heads
    for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if size % GROUP:
            return f"{name} {size} is no multiple of {GROUP}"
    if head_dim % 16 or head_dim > 256:
        return f"head_dim {head_dim} is no multiple of 16 up to 256"
    if group_size * head_dim % GROUP or group_size > 32:
        return f"{group_size} heads of {head_dim} per KV head are no multiple of {GROUP} up to 32"
    return None
