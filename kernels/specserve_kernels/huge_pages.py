"""Host memory in huge pages, where the system gives them: for what every pass reads end to end.

With pages of 4 KiB a pass over a hundred megabytes of weights looks up tens of thousands of
addresses, and no prefetch of the hardware crosses from one page to the next.
"""

import mmap
from contextlib import suppress
from math import prod
from typing import Final

import torch
from torch import Tensor

PAGE: Final = 2 * 2**20  # bytes; what Linux calls huge on x86-64 and on arm64 with small pages


def zeros(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Like torch.zeros; memory is taken when it is first written, a page at a time."""
    num_bytes = prod(size) * dtype.itemsize
    if num_bytes < PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size, dtype=dtype)
    memory = mmap.mmap(-1, num_bytes + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them: ordinary pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    raw = torch.frombuffer(memory, dtype=torch.uint8)
    return raw[-raw.data_ptr() % PAGE :][:num_bytes].view(dtype).view(size)


class Arena:
    """Takes in tensors that live as long as each other, one after the other in the same pages."""

    def __init__(self, chunk_bytes: int = 16 * PAGE) -> None:
        self._chunk_bytes = chunk_bytes
        self._free = torch.empty(0, dtype=torch.uint8)

    def copy(self, x: Tensor) -> Tensor:
        """`x` again, contiguous, at a multiple of 64 bytes."""
        if x.nbytes > len(self._free):
            self._free = zeros((max(self._chunk_bytes, x.nbytes),), torch.uint8)
        size = -(-x.nbytes // 64) * 64
        own, self._free = self._free[: x.nbytes], self._free[size:]
        return own.view(x.dtype).view(x.shape).copy_(x)
