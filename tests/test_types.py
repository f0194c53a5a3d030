"""`SamplingParams.validate`: every field, both sides of every limit, and what is no number."""

import math
from typing import Any

import msgspec
import pytest

from specserve.types import (
    MAX_LOGPROBS,
    MAX_N,
    MAX_SEED,
    MAX_STOP_STRINGS,
    RequestError,
    SamplingParams,
    SpecStats,
)

VOCAB = 100

# field: (values that are allowed, values that are not)
CASES: dict[str, tuple[list[Any], list[Any]]] = {
    "temperature": ([0, 0.0, 0.01, 1.0, 100.0], [-0.1, 0.009, 100.1]),
    "top_k": ([0, 1, VOCAB], [-1, VOCAB + 1, 1.5]),
    "top_p": ([0.001, 1.0, 1], [0.0, -0.1, 1.001]),
    "min_p": ([0.0, 1.0], [-0.001, 1.001]),
    "presence_penalty": ([-2.0, 2.0], [-2.1, 2.1]),
    "frequency_penalty": ([-2.0, 2.0], [-2.1, 2.1]),
    "repetition_penalty": ([0.001, 10.0], [0.0, -1.0, 10.1]),
    "logit_bias": (
        [{}, {0: -100.0, VOCAB - 1: 100.0}],
        [{VOCAB: 1.0}, {-1: 1.0}, {0: 100.1}, {0: -100.1}, {0: math.nan}, {0: True}, {True: 1.0}],
    ),
    "max_tokens": ([0, 1, 10**6], [-1, 1.0]),
    "min_tokens": ([0, 256], [-1, 257, 1.0]),
    "stop": ([(), ("a",), ("a",) * MAX_STOP_STRINGS], [("",), ("a",) * (MAX_STOP_STRINGS + 1)]),
    "stop_token_ids": ([(), (0, VOCAB - 1)], [(VOCAB,), (-1,), (True,), (1.0,)]),
    "ignore_eos": ([True, False], []),
    "skip_special_tokens": ([True, False], []),
    "include_stop_str_in_output": ([True, False], []),
    "seed": ([None, 0, MAX_SEED], [-1, MAX_SEED + 1, 1.0]),
    "logprobs": ([None, 0, MAX_LOGPROBS], [-1, MAX_LOGPROBS + 1, 1.0]),
    "prompt_logprobs": ([None, 0, MAX_LOGPROBS], [-1, MAX_LOGPROBS + 1, 1.0]),
    "n": ([1, MAX_N], [0, MAX_N + 1, 1.0]),
}
NUMBERS = ["temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty"]
NUMBERS += ["repetition_penalty"]
INTEGERS = ["top_k", "max_tokens", "min_tokens", "seed", "logprobs", "prompt_logprobs", "n"]


def allowed() -> list[tuple[str, Any]]:
    return [(name, value) for name, (good, _) in CASES.items() for value in good]


def refused() -> list[tuple[str, Any]]:
    listed = [(name, value) for name, (_, bad) in CASES.items() for value in bad]
    no_numbers = [math.nan, math.inf, -math.inf, True, "1", None]
    listed += [(name, value) for name in NUMBERS for value in no_numbers]
    return listed + [
        (name, value) for name in INTEGERS for value in (math.nan, math.inf, True, "1")
    ]


def test_every_field_has_a_case() -> None:
    assert set(CASES) == set(SamplingParams.__struct_fields__)


@pytest.mark.parametrize(("name", "value"), allowed())
def test_allowed(name: str, value: Any) -> None:
    SamplingParams(**{name: value}).validate(VOCAB)


@pytest.mark.parametrize(("name", "value"), refused())
def test_refused(name: str, value: Any) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**{name: value}).validate(VOCAB)
    assert caught.value.param.startswith(name)
    assert str(caught.value).startswith(name)


def test_the_message_has_the_value_and_the_range() -> None:
    with pytest.raises(RequestError, match=r"top_p: 0\.0 is out of range; .* \(0, 1\]"):
        SamplingParams(top_p=0.0).validate(VOCAB)
    with pytest.raises(RequestError, match=r"token id 100 is not in the vocabulary; .* 0 to 99"):
        SamplingParams(logit_bias={100: 1.0}).validate(VOCAB)


def test_what_comes_over_a_wire_is_strict() -> None:
    with pytest.raises(msgspec.ValidationError, match="top_q"):
        msgspec.json.decode(b'{"top_q": 1}', type=SamplingParams)


def test_acceptance_length_without_a_pass() -> None:
    assert SpecStats().mean_acceptance_length == 0.0
    assert SpecStats(num_spec_steps=4, num_emitted_tokens=10).mean_acceptance_length == 2.5
