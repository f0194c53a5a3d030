"""The KV tensors. Owns device memory; knows no sequences and no block tables.

The target and each draft model have separate storages, indexed by the same block tables.
"""

import torch
from msgspec import Struct
from torch import Tensor

from specserve_kernels import huge_pages


class KVSpec(Struct, frozen=True):
    """The shape and dtype of the KV cache of one model."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_slot(self) -> int:
        """Bytes of K and V of one token, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize


class KVStorage:
    """The KV cache of one model: one tensor for all layers, so that a commit is one kernel launch.

    Slot s of block b has index `b * block_size + s` in the slot dimension.
    """

    def __init__(self, spec: KVSpec, num_slots: int, device: torch.device) -> None:
        self.spec = spec
        # [num_layers, 2, num_slots, num_kv_heads, head_dim]. Zeroed because attention multiplies
        # masked-out slots by 0, and 0 * NaN is NaN.
        size = (spec.num_layers, 2, num_slots, spec.num_kv_heads, spec.head_dim)
        if device.type == "cpu":
            self.data = huge_pages.zeros(size, spec.dtype)
        else:
            self.data = torch.zeros(size, dtype=spec.dtype, device=device)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer, each [num_slots, num_kv_heads, head_dim]."""
        return self.data[index, 0], self.data[index, 1]
