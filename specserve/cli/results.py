"""Output formats of completions: the JSON object of `--json` and the one-line summary."""

from collections.abc import Sequence

import msgspec
from msgspec import UNSET, Struct, UnsetType

from specserve.llm import Completion, Generation, Timing
from specserve.types import FinishReason, SpecStats, TokenLogprobs


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int  # of the prompt, taken from the prefix cache


class Speculation(Struct, frozen=True):
    """The fields of `SpecStats` that `--json` shows."""

    num_spec_steps: int
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    mean_acceptance_length: float
    acceptance_histogram: tuple[int, ...]

    @classmethod
    def of(cls, stats: SpecStats) -> "Speculation":
        return cls(**{name: getattr(stats, name) for name in cls.__struct_fields__})


class Result(Struct, frozen=True):
    """One completion, a line of `--json`.

    `sample` is set if the prompt has several completions, `logprobs` if they were requested, and
    `error` if the completion failed or was aborted.
    """

    index: int  # of the prompt
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    speculation: Speculation
    timing: Timing
    sample: int | UnsetType = UNSET
    logprobs: tuple[TokenLogprobs, ...] | UnsetType = UNSET
    error: str | UnsetType = UNSET


def json_lines(index: int, generation: Generation) -> list[str]:
    """The JSON objects of one prompt, one per completion."""
    several = len(generation.completions) > 1
    return [
        msgspec.json.encode(
            _result(index, sample if several else UNSET, len(generation.prompt_ids), completion)
        ).decode()
        for sample, completion in enumerate(generation.completions)
    ]


def summary(completions: Sequence[Completion], seconds: float) -> str:
    """Tokens, forward passes, acceptance and speed of all completions, which took `seconds`."""
    stats = [completion.stats for completion in completions]
    tokens = sum(len(completion.token_ids) for completion in completions)
    passes = sum(s.num_spec_steps for s in stats)
    drafted = sum(s.num_draft_tokens for s in stats)
    accepted = sum(s.num_accepted_draft_tokens for s in stats)
    line = f"{tokens} tokens in {passes} passes"
    if passes:
        line += f" ({tokens / passes:.2f} per pass)"
    if drafted:
        line += f", {accepted} of {drafted} drafted accepted ({accepted / drafted:.0%})"
    return f"{line}, {tokens / seconds:.1f} tokens/s"


def _result(index: int, sample: int | UnsetType, num_prompt: int, completion: Completion) -> Result:
    num_tokens = len(completion.token_ids)
    return Result(
        index=index,
        sample=sample,
        text=completion.text,
        token_ids=completion.token_ids,
        finish_reason=completion.finish_reason,
        usage=Usage(num_prompt, num_tokens, num_prompt + num_tokens, completion.num_cached_tokens),
        speculation=Speculation.of(completion.stats),
        timing=completion.timing,
        logprobs=UNSET if completion.logprobs is None else completion.logprobs,
        error=UNSET if completion.error is None else completion.error,
    )
