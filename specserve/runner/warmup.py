"""Warm-up requests: they make an engine run forward passes of every size it will meet."""

from collections.abc import Iterator
from typing import Final

from msgspec.structs import replace

from specserve.types import Request, SamplingParams

STEPS_PER_ROUND: Final = 3  # steps per round: prompts, a tree after a prompt, a tree after a tree
_PROMPT_LEN: Final = 4  # tokens per prompt in the rounds that run trees

_GREEDY = SamplingParams(temperature=0.0, ignore_eos=True, seed=0)
_SAMPLED = SamplingParams(
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
    """Yield the rounds; the requests of one round run together.

    The first rounds have prompts only: `row_multiple` rows in one forward pass, then twice as many
    each time, up to `max_rows`. The last rounds have trees of `max_nodes` nodes: for one sequence,
    then for as many sequences as fit. No sequence exceeds `max_tokens` tokens, prompt and output.
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


def _prompts(num_rows: int, max_seqs: int, longest: int) -> list[Request]:
    """Up to `max_seqs` prompts of `num_rows` tokens in total, each of which generates one token."""
    lengths = [longest] * (num_rows // longest) + [num_rows % longest]
    return [_request(i, length, 1) for i, length in enumerate(lengths[:max_seqs]) if length]


def _request(index: int, prompt_len: int, max_tokens: int) -> Request:
    """A prompt that repeats one token, so that drafters that copy repeated text propose trees."""
    sampling = replace(_SAMPLED if index % 2 else _GREEDY, max_tokens=max_tokens)
    salt = f"{prompt_len}/{max_tokens}/{index}"  # distinct, so the prefix cache has no hits
    return Request(f"warm-up-{index}", (0,) * prompt_len, sampling, cache_salt=salt)
