"""The KV tensors. Owns device memory; knows no sequences and no block tables.

The target and each draft model have separate storages, indexed by the same block tables.
"""

from typing import Final

import torch
from msgspec import Struct
from torch import Tensor

from specserve_kernels import huge_pages

_PAGES_AHEAD: Final = 2  # huge pages per plane that are allocated ahead of those in use


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
        self._planes = self.data.flatten(0, 1).flatten(2)  # [planes, slots, elements]
        slot_bytes = self._planes.shape[2] * spec.dtype.itemsize
        self._page_slots = huge_pages.PAGE // slot_bytes if device.type == "cpu" else 0
        self.allocates_ahead = False  # see `record_written`
        self._num_used = 0  # slots from here on were never written
        self._num_allocated = 0  # pages, in the order of `record_written`
        self._allowance = 0.0  # pages that it may allocate

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """K and V of one layer, each [num_slots, num_kv_heads, head_dim]."""
        return self.data[index, 0], self.data[index, 1]

    def record_written(self, slots: Tensor) -> None:
        """Record that a pass has written `slots` [num_rows] int64, in all layers.

        Linux allocates and zeroes a huge page at its first write, which takes 0.1 to 5 ms. K and V
        of every layer are a plane of their own and are written at the same slots, so that once in a
        while a pass does it for all planes, with all threads. If `allocates_ahead` (CPU only), this
        method does it before, in one thread: after each pass it allocates up to twice the memory of
        its slots. That takes more time, but no pass is much slower than others.
        """
        if self._page_slots == 0:
            return
        num_planes, num_slots = self._planes.shape[:2]
        self._num_used = max(self._num_used, int(slots.numpy().max()) + 1)
        if not self.allocates_ahead:
            return
        self._allowance += 2 * len(slots) * num_planes / self._page_slots
        wanted = (self._num_used / self._page_slots + _PAGES_AHEAD) * num_planes
        while self._allowance >= 1 and self._num_allocated < wanted:
            page, plane = divmod(self._num_allocated, num_planes)
            slot = page * self._page_slots
            self._num_allocated += 1
            if self._num_used <= slot < num_slots:
                self._planes[plane, slot, 0] = 0
                self._allowance -= 1
        self._allowance = min(self._allowance, 1.0)
