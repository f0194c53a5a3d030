"""Allocates host memory in huge pages, where available, for data that every forward pass reads.

With 4 KiB pages, reading a hundred megabytes of weights needs tens of thousands of address
translations, and hardware prefetchers do not cross from one page to the next.
"""

import mmap
from contextlib import suppress
from math import prod
from typing import Final

import torch
from torch import Tensor

PAGE: Final = 2 * 2**20  # bytes; Linux's huge page on x86-64, and on arm64 with 4 KiB pages


def zeros(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Like torch.zeros, but in huge pages unless smaller than one; allocated at first write."""
    num_bytes = prod(size) * dtype.itemsize
    if num_bytes < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # no kernel support: ordinary pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    return raw[-raw.data_ptr() % PAGE :][:num_bytes].view(dtype).view(size)


class Arena:
    """Copies tensors of the same lifetime into shared huge pages, one after the other."""

    def __init__(self, chunk_bytes: int = 16 * PAGE) -> None:
        self._chunk_bytes = chunk_bytes
        self._free = torch.empty(0, dtype=torch.uint8)

    def copy(self, x: Tensor) -> Tensor:
        """A contiguous copy of `x`, aligned to 64 bytes."""
        if x.nbytes > len(self._free):
            self._free = zeros((max(self._chunk_bytes, x.nbytes),), torch.uint8)
        size = -(-x.nbytes // 64) * 64
        own, self._free = self._free[: x.nbytes], self._free[size:]
        return own.view(x.dtype).view(x.shape).copy_(x)
