"""Gumbel noise, argmax and penalties on CUDA; `Kernels.gumbel_noise` defines the noise.

`tl.philox` with a 64-bit seed and 32-bit counters is Philox4x32-10 keyed by the seed's two words.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from specserve_kernels.triton.compile import kernel

BLOCK = 1024
ROUNDING = {"enable_fp_fusion": False}  # every operation is rounded, as in torch


def gumbel_noise(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Noise of chosen tokens, float32 [num_rows, num_tokens]; see `Kernels.gumbel_noise`."""
    num_rows, num_tokens = token_ids.shape
    token_ids = token_ids.contiguous()
    noise = torch.empty((num_rows, num_tokens), dtype=torch.float32, device=token_ids.device)
    if noise.numel():
        grid = (num_rows, triton.cdiv(num_tokens, BLOCK))
        noise_of_tokens[grid](
            seeds, positions, token_ids, noise, num_tokens, SIZE=BLOCK, **ROUNDING
        )
    return noise


def gumbel_argmax(logits: Tensor, seeds: Tensor, positions: Tensor, sampled: Tensor) -> Tensor:
    """argmax(logits + noise), int64 [num_rows]; see `Kernels.gumbel_argmax`."""
    num_rows, vocab_size = logits.shape
    logits = logits.contiguous()
    best = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    if num_rows:
        num_blocks = triton.cdiv(vocab_size, 4 * BLOCK)
        tops = torch.empty((num_rows, num_blocks), dtype=torch.float32, device=logits.device)
        ids = torch.empty((num_rows, num_blocks), dtype=torch.int32, device=logits.device)
        block_argmax[(num_rows, num_blocks)](
            logits,
            seeds,
            positions,
            sampled,
            tops,
            ids,
            vocab_size,
            num_blocks,
            SIZE=BLOCK,
            **ROUNDING,
        )
        size = triton.next_power_of_2(num_blocks)
        first_of_best[(num_rows,)](tops, ids, best, num_blocks, SIZE=size, **ROUNDING)
    return best


def apply_penalties(
    logits: Tensor,
    prompt_mask: Tensor,
    counts: Tensor,
    repetition: Tensor,
    frequency: Tensor,
    presence: Tensor,
) -> Tensor:
    """A new tensor of penalized logits; see `Kernels.apply_penalties`."""
    num_rows, vocab_size = logits.shape
    inputs = [tensor.contiguous() for tensor in (logits, prompt_mask, counts)]
    out = torch.empty((num_rows, vocab_size), dtype=torch.float32, device=logits.device)
    if out.numel():
        grid = (num_rows, triton.cdiv(vocab_size, BLOCK))
        penalise[grid](
            *inputs, repetition, frequency, presence, out, vocab_size, SIZE=BLOCK, **ROUNDING
        )
    return out


@kernel
def _words(
    seeds: tl.tensor, positions: tl.tensor, row: tl.tensor, counter: tl.tensor
) -> tl.tensor:  # four words, each [counters] uint32
    position = tl.load(positions + row)
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = (counter * 0).to(tl.uint32)
    return tl.philox(tl.load(seeds + row), counter.to(tl.uint32), zero + low, zero + high, zero)


@kernel
def _gumbel(word: tl.tensor) -> tl.tensor:
    uniform = (word.to(tl.float64) + 0.5) * 2.3283064365386963e-10  # 2 ** -32
    return (-tl.log(-tl.log(uniform))).to(tl.float32)


@kernel
def noise_of_tokens(
    seeds: tl.tensor,  # [rows] int64
    positions: tl.tensor,  # [rows] int64
    token_ids: tl.tensor,  # [rows, num_tokens] int64
    noise: tl.tensor,  # [rows, num_tokens] float32
    num_tokens: int,
    SIZE: tl.constexpr,
) -> None:
    """Grid (rows, blocks of tokens)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    token = tl.load(token_ids + row * num_tokens + column, mask=column < num_tokens, other=0)
    word0, word1, word2, word3 = _words(seeds, positions, row, token // 4)
    word = tl.where(token % 4 < 2, tl.where(token % 4 == 0, word0, word1),
                    tl.where(token % 4 == 2, word2, word3))  # fmt: skip
    tl.store(noise + row * num_tokens + column, _gumbel(word), mask=column < num_tokens)


@kernel
def _better(
    top: tl.tensor, word_index: tl.tensor, value: tl.tensor, index: int
) -> tuple[tl.tensor, tl.tensor]:
    """The larger value and its index; of equal values the earlier one."""
    return tl.where(value > top, value, top), tl.where(value > top, index, word_index)


@kernel
def block_argmax(
    logits: tl.tensor,  # [rows, vocab_size] float32
    seeds: tl.tensor,  # [rows] int64
    positions: tl.tensor,  # [rows] int64
    sampled: tl.tensor,  # [rows] bool
    tops: tl.tensor,  # [rows, num_blocks] float32
    ids: tl.tensor,  # [rows, num_blocks] int32
    vocab_size: int,
    num_blocks: int,
    SIZE: tl.constexpr,
) -> None:
    """Grid (rows, blocks of 4 * SIZE tokens). A counter's four words belong to four tokens."""
    row = tl.program_id(0).to(tl.int64)
    counter = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    source = logits + row * vocab_size
    low = float("-inf")
    value0 = tl.load(source + counter * 4, mask=counter * 4 < vocab_size, other=low)
    value1 = tl.load(source + counter * 4 + 1, mask=counter * 4 + 1 < vocab_size, other=low)
    value2 = tl.load(source + counter * 4 + 2, mask=counter * 4 + 2 < vocab_size, other=low)
    value3 = tl.load(source + counter * 4 + 3, mask=counter * 4 + 3 < vocab_size, other=low)
    if tl.load(sampled + row):
        word0, word1, word2, word3 = _words(seeds, positions, row, counter)
        value0 += _gumbel(word0)
        value1 += _gumbel(word1)
        value2 += _gumbel(word2)
        value3 += _gumbel(word3)
    top, index = value0, counter * 0
    top, index = _better(top, index, value1, 1)
    top, index = _better(top, index, value2, 2)
    top, index = _better(top, index, value3, 3)
    best, place = tl.max(top, 0, return_indices=True, return_indices_tie_break_left=True)
    word_index = tl.sum(tl.where(tl.arange(0, SIZE) == place, index, 0), 0)
    block = row * num_blocks + tl.program_id(1)
    tl.store(tops + block, best)
    tl.store(ids + block, (tl.program_id(1) * SIZE + place) * 4 + word_index)


@kernel
def first_of_best(
    tops: tl.tensor, ids: tl.tensor, best: tl.tensor, num_blocks: int, SIZE: tl.constexpr
) -> None:
    """Grid (rows,). Blocks are in ascending order of their tokens."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, SIZE)
    inside = block < num_blocks
    top = tl.load(tops + row * num_blocks + block, mask=inside, other=float("-inf"))
    _, place = tl.max(top, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(best + row, tl.load(ids + row * num_blocks + place).to(tl.int64))


@kernel
def penalise(
    logits: tl.tensor,
    prompt_mask: tl.tensor,
    counts: tl.tensor,
    repetition: tl.tensor,
    frequency: tl.tensor,
    presence: tl.tensor,
    out: tl.tensor,
    vocab_size: int,
    SIZE: tl.constexpr,
) -> None:
    """Grid (rows, blocks of tokens)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = column < vocab_size
    offset = row * vocab_size + column
    logit = tl.load(logits + offset, mask=inside, other=0.0)
    count = tl.load(counts + offset, mask=inside, other=0).to(tl.float32)
    in_prompt = tl.load(prompt_mask + offset, mask=inside, other=0) != 0
    factor = tl.load(repetition + row)
    repeated = tl.where(logit > 0, logit / factor, logit * factor)
    logit = tl.where(in_prompt | (count > 0), repeated, logit)
    emitted = tl.where(count > 0, 1.0, 0.0)
    penalty = tl.load(frequency + row) * count
    tl.store(out + offset, logit - penalty - tl.load(presence + row) * emitted, mask=inside)
