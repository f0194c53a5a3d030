"""Throw-away requests that take an engine through the passes it will meet.

The first pass of a shape is slow: kernels are built or chosen, memory is claimed. Knows what passes
look like, not how an engine runs.
"""

from collections.abc import Iterator
from typing import Final

from msgspec.structs import replace

from specserve.types import Request, SamplingParams

NUM_PASSES: Final = 3  # a round is over then: prompts, a tree after them, a tree after a tree
_PROMPT_LEN: Final = 4  # where trees are what matters

_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, seed=0)
_NOISY = SamplingParams(
    temperature=0.8,
    top_k=8,
    top_p=0.9,
    min_p=0.01,
    repetition_penalty=1.1,
    logprobs=1,
    ignore_eos=True,
    seed=0,
)


def warmup_rounds(
    *, row_multiple: int, max_rows: int, max_seqs: int, max_nodes: int, max_tokens: int
) -> Iterator[list[Request]]:
    """Requests to be run together, round by round.

    First prompts alone, in passes of `row_multiple` rows, twice as many, and so on to `max_rows`;
    then trees of `max_nodes`, of one sequence and of as many as fit. A sequence may have
    `max_tokens` tokens, prompt and output.
    """
    num_rows = row_multiple
    while num_rows < max_rows:
        yield _prompts(num_rows, max_seqs, max_tokens - 1)
        num_rows *= 2
    yield _prompts(max_rows, max_seqs, max_tokens - 1)
    prompt_len = min(_PROMPT_LEN, max_tokens - 1)
    for num_seqs in sorted({1, min(max_seqs, max(1, max_rows // max_nodes))}):
        yield [
            _request(index, prompt_len, min(2 * max_nodes + 2, max_tokens - prompt_len))
            for index in range(num_seqs)
        ]


def probe_request(prompt_len: int) -> Request:
    """A sequence to time passes on; it is never run to its end."""
    return _request(0, prompt_len, 2)


def _prompts(num_rows: int, max_seqs: int, longest: int) -> list[Request]:
    """Up to `max_seqs` prompts of `num_rows` tokens together, each good for a single pass."""
    lengths = [longest] * (num_rows // longest) + [num_rows % longest]
    return [_request(i, length, 1) for i, length in enumerate(lengths[:max_seqs]) if length]


def _request(index: int, prompt_len: int, max_tokens: int) -> Request:
    """A prompt of one token over and over: drafters that look for repetition find it."""
    sampling = replace(_NOISY if index % 2 else _GREEDY, max_tokens=max_tokens)
    salt = f"{prompt_len}/{max_tokens}/{index}"  # nothing is taken from the prefix cache
    return Request(f"warm-up-{index}", (0,) * prompt_len, sampling, cache_salt=salt)
