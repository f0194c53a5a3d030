"""Compares token ids of completions, and defines the sampling settings to compare them under.

It does not know how the completions were generated.
"""

from collections.abc import Sequence

from msgspec import Struct

from specserve.completion import Completion
from specserve.text import Tokenizer
from specserve.types import SamplingParams
from specserve_evals.audit import Acceptance
from specserve_evals.prompts import Prompt


class Mismatch(Struct, frozen=True):
    prompt: str
    position: int  # of the first difference in the output
    expected: int | None  # None: the expected output ended there
    found: int | None  # None: the output ended there


class Comparison(Struct, frozen=True):
    """One draft at one batch size under one sampling setting, compared with the reference."""

    draft: str
    setting: str
    batch: int
    num_prompts: int
    num_tokens: int  # tokens of the reference; every one is compared
    mismatches: tuple[Mismatch, ...]
    tokens_per_pass: float
    accepted_by_depth: tuple[int, ...]
    rejected_by_depth: tuple[int, ...]
    acceptance: float | None
    tokens_per_s: float
    is_reference: bool = False  # True: the run that the others are compared with


def sampling_settings(tokenizer: Tokenizer, max_tokens: int) -> dict[str, SamplingParams]:
    """Sampling parameters by name, from greedy to penalties, min-p and logit bias combined."""
    common = dict.fromkeys(tokenizer.encode(" the of to and"), -1.5)
    return {
        "greedy": SamplingParams(temperature=0.0, max_tokens=max_tokens),
        "temp-1": SamplingParams(max_tokens=max_tokens),
        "nucleus": SamplingParams(temperature=0.8, top_p=0.95, max_tokens=max_tokens),
        "penalties": SamplingParams(
            presence_penalty=0.3,
            frequency_penalty=0.2,
            repetition_penalty=1.1,
            min_p=0.05,
            logit_bias=common,
            max_tokens=max_tokens,
        ),
    }


def first_difference(prompt: str, expected: Sequence[int], found: Sequence[int]) -> Mismatch | None:
    """The first position where two outputs differ; None if they are equal."""
    for position in range(max(len(expected), len(found))):
        left = expected[position] if position < len(expected) else None
        right = found[position] if position < len(found) else None
        if left != right:
            return Mismatch(prompt, position, left, right)
    return None


def compare(
    cell: tuple[str, str, int],
    prompts: Sequence[Prompt],
    expected: Sequence[Sequence[int]],
    completions: Sequence[Completion],
    seconds: float,
    acceptance: Acceptance,
) -> Comparison:
    """Compare the completions of `cell` (draft, setting, batch) with the expected token ids.

    `seconds` is the wall time of the completions, `acceptance` the counts of the engine meanwhile.
    """
    draft, setting, batch = cell
    differences = [
        first_difference(prompt.id, ids, completion.token_ids)
        for prompt, ids, completion in zip(prompts, expected, completions, strict=True)
    ]
    passes = sum(completion.stats.num_spec_steps for completion in completions)
    emitted = sum(len(completion.token_ids) for completion in completions)
    return Comparison(
        draft=draft,
        setting=setting,
        batch=batch,
        num_prompts=len(prompts),
        num_tokens=sum(map(len, expected)),
        mismatches=tuple(difference for difference in differences if difference is not None),
        tokens_per_pass=emitted / passes,
        accepted_by_depth=tuple(acceptance.accepted),
        rejected_by_depth=tuple(acceptance.rejected),
        acceptance=acceptance.share,
        tokens_per_s=emitted / seconds,
    )
