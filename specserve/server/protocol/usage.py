"""The cost of a response: OpenAI's `usage` and vLLM's `metrics`."""

from collections.abc import Sequence
from itertools import zip_longest

from msgspec import UNSET, Struct, UnsetType

from specserve.types import SpecStats


class PromptDetails(Struct, frozen=True):
    cached_tokens: int


class CompletionDetails(Struct, frozen=True):
    """The sum of both is the number of tokens of the request's `prediction`."""

    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails
    completion_tokens_details: CompletionDetails | UnsetType = UNSET


class SpeculativeDecoding(Struct, frozen=True):
    """Speculative decoding over one request; `num_draft_tokens` counts verified tree nodes.

    `acceptance_histogram[a]` counts the forward passes that accepted `a` drafted tokens.
    `num_spec_tokens` is the length of the deepest path that the node budget allows; the histogram
    has `num_spec_tokens` + 1 entries.
    """

    mean_acceptance_length: float
    draft_acceptance_rate: float
    acceptance_histogram: tuple[int, ...]
    num_spec_steps: int
    num_accepted_draft_tokens: int
    num_draft_tokens: int
    num_spec_tokens: int


class Metrics(Struct, frozen=True):
    """Times of one request in milliseconds, and its rate; null if there were too few tokens.

    `mean_itl_ms` is the mean gap between token chunks. `tokens_per_second` counts from the arrival.
    """

    time_to_first_token_ms: float | None
    generation_time_ms: float | None
    queue_time_ms: float | None
    mean_itl_ms: float | None
    tokens_per_second: float | None
    speculative_decoding: SpeculativeDecoding


def speculative_decoding(stats: Sequence[SpecStats], max_nodes: int) -> SpeculativeDecoding:
    """The sum over the sequences of a request. `max_nodes`: the node budget, root included."""
    steps = sum(s.num_spec_steps for s in stats)
    drafted = sum(s.num_draft_tokens for s in stats)
    accepted = sum(s.num_accepted_draft_tokens for s in stats)
    histograms = ([0] * max_nodes, *(s.acceptance_histogram for s in stats))
    histogram = tuple(map(sum, zip_longest(*histograms, fillvalue=0)))
    return SpeculativeDecoding(
        mean_acceptance_length=1 + accepted / steps if steps else 0.0,
        draft_acceptance_rate=accepted / drafted if drafted else 0.0,
        acceptance_histogram=histogram,
        num_spec_steps=steps,
        num_accepted_draft_tokens=accepted,
        num_draft_tokens=drafted,
        num_spec_tokens=len(histogram) - 1,
    )
