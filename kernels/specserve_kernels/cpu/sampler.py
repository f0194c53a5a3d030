"""Gumbel noise and sampling by the native kernels."""

import ctypes

import torch
from torch import Tensor

from specserve_kernels.cpu.native import num_threads


def gumbel_noise(
    library: ctypes.CDLL, seeds: Tensor, positions: Tensor, token_ids: Tensor
) -> Tensor:
    """float32 [num_rows, num_tokens]; see `Kernels.gumbel_noise`."""
    seeds, positions, token_ids = (x.contiguous() for x in (seeds, positions, token_ids))
    _check(seeds, positions, token_ids.shape[0])
    assert token_ids.dtype == torch.int64, f"token ids are int64, not {token_ids.dtype}"
    noise = torch.empty(token_ids.shape, dtype=torch.float32)
    library.specserve_gumbel_noise(
        seeds.data_ptr(),
        positions.data_ptr(),
        token_ids.data_ptr(),
        *token_ids.shape,
        noise.data_ptr(),
        num_threads(),
    )
    return noise


def gumbel_argmax(
    library: ctypes.CDLL, logits: Tensor, seeds: Tensor, positions: Tensor, sampled: Tensor
) -> Tensor:
    """int64 [num_rows]; see `Kernels.gumbel_argmax`."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    seeds, positions, sampled = (x.contiguous() for x in (seeds, positions, sampled))
    num_rows, vocab_size = logits.shape
    _check(seeds, positions, num_rows)
    assert logits.dtype == torch.float32, f"logits are float32, not {logits.dtype}"
    assert sampled.dtype == torch.bool, f"sampled is bool, not {sampled.dtype}"
    assert len(sampled) == num_rows, f"{len(sampled)} sampled for {num_rows} rows"
    tokens = torch.empty(num_rows, dtype=torch.int64)
    library.specserve_gumbel_argmax(
        logits.data_ptr(),
        logits.stride(0),
        seeds.data_ptr(),
        positions.data_ptr(),
        sampled.data_ptr(),
        num_rows,
        vocab_size,
        tokens.data_ptr(),
        num_threads(),
    )
    return tokens


def _check(seeds: Tensor, positions: Tensor, num_rows: int) -> None:
    for name, x in (("seeds", seeds), ("positions", positions)):
        assert x.dtype == torch.int64, f"{name} are int64, not {x.dtype}"
        assert len(x) == num_rows, f"{len(x)} {name} for {num_rows} rows"
