"""Grouped-query attention over a paged KV cache."""

from dataclasses import dataclass

import torch
from torch import Tensor

from specserve.models.layers.linear import Linear
from specserve.models.layers.norm import RMSNorm
from specserve.models.layers.rotary import rotate
from specserve_kernels.ops import Kernels, Plan


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """What the attention of all layers of one forward pass shares."""

    kernels: Kernels
    plan: Plan
    angles: tuple[Tensor, Tensor]  # cos and sin, from `Rotary.angles`
    slots: Tensor  # [num_rows] int64, KV slot of each row; -1: K and V are not written


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention (Ainslie et al. 2023) with a fused q, k and v projection."""

    qkv: Linear  # hidden_size -> (num_heads + 2 * num_kv_heads) * head_dim
    out: Linear  # num_heads * head_dim -> hidden_size
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0  # sliding window in positions; 0: none
    q_norm: RMSNorm | None = None  # both or neither
    k_norm: RMSNorm | None = None

    def __call__(
        self,
        x: Tensor,  # [num_rows, inputs of qkv]
        cache: tuple[Tensor, Tensor],  # K and V, each [num_slots, num_kv_heads, head_dim]
        inputs: AttentionInputs,
    ) -> Tensor:  # [num_rows, hidden_size] in x's dtype
        """Write K and V of the rows to `cache`, in its dtype, and attend."""
        q, k, v = self._heads(x, inputs.angles)
        dtype = cache[0].dtype
        inputs.kernels.kv_write(k.to(dtype), v.to(dtype), *cache, inputs.slots)
        attended = inputs.kernels.paged_tree_attention(
            q.contiguous(), *cache, inputs.plan, scale=self.head_dim**-0.5, window=self.window
        )
        return self.out(attended.flatten(1))

    def _heads(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q and k, and v, each [num_rows, heads, head_dim]."""
        num_heads, num_kv_heads = self.num_heads, self.num_kv_heads
        heads = self.qkv(x).view(x.shape[0], -1, self.head_dim)
        q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            return rotate(self.q_norm(q), angles), rotate(self.k_norm(k), angles), v
        rotated = rotate(heads[:, :-num_kv_heads], angles)
        q, k = torch.split(rotated, [num_heads, num_kv_heads], dim=1)
        return q, k, v
