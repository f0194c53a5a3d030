"""Output formats of completions: the JSON object of `--json` and the one-line summary."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from specserve.completion import Completion, Generation

# The fields of `SpecStats` that `--json` shows.
_SPECULATION: Final = (
    "num_spec_steps",
    "num_draft_tokens",
    "num_accepted_draft_tokens",
    "mean_acceptance_length",
    "acceptance_histogram",
)


def json_lines(index: int, generation: Generation) -> list[str]:
    """The JSON objects of prompt number `index`, one per completion.

    `sample` is there if the prompt has several completions, `logprobs` and `prompt_logprobs` if
    they were requested (these in the first object of a prompt), and `error` if the completion
    failed or was aborted.
    """
    several = len(generation.completions) > 1
    results = [
        _result(index, sample if several else None, len(generation.prompt_ids), completion)
        for sample, completion in enumerate(generation.completions)
    ]
    if generation.prompt_logprobs is not None:
        results[0]["prompt_logprobs"] = generation.prompt_logprobs
    return [msgspec.json.encode(result).decode() for result in results]


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


def _result(
    index: int, sample: int | None, num_prompt: int, completion: Completion
) -> dict[str, Any]:
    num_tokens = len(completion.token_ids)
    result = {
        "index": index,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_tokens,
            "total_tokens": num_prompt + num_tokens,
            "cached_tokens": completion.num_cached_tokens,
        },
        "speculation": {name: getattr(completion.stats, name) for name in _SPECULATION},
        "timing": completion.timing,
    }
    optional = {"sample": sample, "logprobs": completion.logprobs, "error": completion.error}
    return result | {name: value for name, value in optional.items() if value is not None}
