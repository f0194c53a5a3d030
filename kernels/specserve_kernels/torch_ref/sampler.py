"""Gumbel noise keyed by (seed, position, token), and penalties. Knows logits, not requests.

A token's noise has the same bits whether it is computed alone or with the whole vocabulary.
"""

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_ROWS_AT_ONCE = 4  # keeps the int64 and float64 temporaries in cache


def philox(even: Tensor, odd: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC'11); `even` holds words 0 and 2, `odd` words 1 and 3.

    All are int64 [2, ...] in [0, 2**32), of shapes that broadcast; `key` holds key words 0 and 1.
    Returns the new even and odd words.
    """
    shape = (2, *(1 for _ in range(even.dim() - 1)))
    multipliers = torch.tensor(_MULTIPLIERS, device=even.device).view(shape)
    weyl = torch.tensor(_WEYL, device=even.device).view(shape)
    for _ in range(_ROUNDS):
        # Products may wrap to negative int64; the mask turns the shift into a logical one.
        crossed = (even * multipliers).flip(0)
        even = ((crossed >> 32) & _MASK).bitwise_xor_(odd).bitwise_xor_(key)
        odd = crossed.bitwise_and_(_MASK)
        key = (key + weyl).bitwise_and_(_MASK)
    return even, odd


def gumbel_noise(seeds: Tensor, positions: Tensor, token_ids: Tensor) -> Tensor:
    """Noise of chosen tokens, float32 [num_rows, num_tokens]; see `Kernels.gumbel_noise`."""
    words = torch.stack(_words(seeds, positions, token_ids >> 2), dim=-1)
    chosen = words.gather(-1, (token_ids & 3).unsqueeze(-1)).squeeze(-1)
    return gumbel_of_words(chosen.to(torch.float64))


def gumbel_argmax(logits: Tensor, seeds: Tensor, positions: Tensor, sampled: Tensor) -> Tensor:
    """argmax(logits + noise), int64 [num_rows]; see `Kernels.gumbel_argmax`."""
    best = logits.argmax(dim=-1)
    sampled_rows = sampled.nonzero().flatten()
    for start in range(0, len(sampled_rows), _ROWS_AT_ONCE):
        rows = sampled_rows[start : start + _ROWS_AT_ONCE]
        noise = _vocabulary_noise(seeds[rows], positions[rows], logits.shape[1])
        best[rows] = noise.add_(logits[rows]).argmax(dim=-1)
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
    factor = repetition[:, None]
    emitted = counts > 0
    repeated = torch.where(logits > 0, logits / factor, logits * factor)
    penalised = torch.where(prompt_mask | emitted, repeated, logits)
    return penalised - frequency[:, None] * counts - presence[:, None] * emitted


def _words(seeds: Tensor, positions: Tensor, counters: Tensor) -> tuple[Tensor, ...]:
    """The four Philox words of each counter, [num_rows, n]; `counters` is [num_rows, n]."""
    seeds, positions = seeds[:, None], positions[:, None]
    low, high = positions & _MASK, (positions >> 32) & _MASK
    even = torch.stack((counters, high.expand_as(counters)))
    odd = torch.stack((low, torch.zeros_like(low)))
    even, odd = philox(even, odd, torch.stack((seeds & _MASK, (seeds >> 32) & _MASK)))
    return even[0], odd[0], even[1], odd[1]


def _vocabulary_noise(seeds: Tensor, positions: Tensor, vocab_size: int) -> Tensor:
    """Noise of all tokens, float32 [num_rows, vocab_size]; each counter is computed once."""
    num_counters = (vocab_size + 3) // 4
    counters = torch.arange(num_counters, device=seeds.device).expand(len(seeds), -1)
    uniform = torch.empty((len(seeds), num_counters, 4), dtype=torch.float64, device=seeds.device)
    for word, values in enumerate(_words(seeds, positions, counters)):
        uniform[..., word] = values
    return gumbel_of_words(uniform.flatten(1))[:, :vocab_size]


def gumbel_of_words(words: Tensor) -> Tensor:
    """Float32 noise of 32-bit words, given as float64 [...] and overwritten; see `Kernels`."""
    uniform = words.add_(0.5).mul_(2.0**-32)
    return uniform.log_().neg_().log_().neg_().to(torch.float32)
