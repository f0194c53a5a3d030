"""Measures the memory bandwidth, which bounds the speed of reading all weights once."""

import time
from typing import Final

import torch

SIZE: Final = 2**30  # bytes, far more than any cache


def read_bandwidth() -> float:
    """Bytes per second of a sequential read with torch's threads; the best of 9 runs."""
    data = torch.ones(SIZE // 4, dtype=torch.float32)
    best = float("inf")
    for _ in range(9):
        started = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - started)
    return SIZE / best
