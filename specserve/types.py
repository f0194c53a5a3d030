"""What crosses boundaries: frozen Structs, no torch, no engine.

A `Request` or an `Abort` goes in, `StepOutput`s come out. Every range a user can get wrong is
checked here once, by `SamplingParams.validate`, and named in the error.
"""

import hashlib
import math
from typing import Any, Literal

import msgspec
from msgspec import Struct

MIN_TEMPERATURE = 0.01
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_N = 128
MAX_SEED = 2**63 - 1

FinishReason = Literal["stop", "length", "abort", "error"]
Quantization = Literal["auto", "none", "int8", "int4"]


class RequestError(ValueError):
    """A request that cannot be served as asked.

    `param` names the field; the message says the value and the fix.
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param
        self.message = message


class SamplingParams(Struct, frozen=True, forbid_unknown_fields=True):
    """How tokens are chosen. The defaults sample the model's own distribution.

    temperature 0 is greedy. top_k 0, top_p 1, min_p 0 switch the filters off. `logprobs` is the
    number of alternatives returned per token beside the chosen one (None: no logprobs at all).
    `seed` None draws a fresh one per request. `skip_special_tokens` and
    `include_stop_str_in_output` say what the text holds, and so where stop strings are found.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = msgspec.field(default_factory=dict)
    max_tokens: int = 256
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    seed: int | None = None
    logprobs: int | None = None
    n: int = 1

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether the logits depend on the tokens before them."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    def samples(self, seed: int) -> list["SamplingParams"]:
        """One of n = 1 per sample, each with a seed of its own; the first one's is `seed`."""
        seeds = [seed]
        for index in range(1, self.n):
            digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
            seeds.append(int.from_bytes(digest) % MAX_SEED)
        return [msgspec.structs.replace(self, seed=own, n=1) for own in seeds]

    def validate(self, vocab_size: int) -> None:
        """Raise `RequestError` naming the first field that is out of its range."""
        _check_number("temperature", self.temperature, 0.0, 100.0)
        if 0.0 < self.temperature < MIN_TEMPERATURE:
            raise RequestError(
                "temperature",
                f"{self.temperature} is too small to divide by; use 0 for greedy decoding "
                f"or at least {MIN_TEMPERATURE}",
            )
        _check_int("top_k", self.top_k, 0, vocab_size)
        _check_number("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _check_number("min_p", self.min_p, 0.0, 1.0)
        _check_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_number("repetition_penalty", self.repetition_penalty, 0.0, 10.0, low_open=True)
        for token, bias in self.logit_bias.items():
            _check_token("logit_bias", token, vocab_size)
            _check_number(f"logit_bias[{token}]", bias, -100.0, 100.0)
        _check_int("max_tokens", self.max_tokens, 1, None)
        _check_int("min_tokens", self.min_tokens, 0, self.max_tokens)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(
                "stop", f"{len(self.stop)} strings given; at most {MAX_STOP_STRINGS} are allowed"
            )
        if any(not text for text in self.stop):
            raise RequestError("stop", "an empty string would stop at once; remove it")
        for token in self.stop_token_ids:
            _check_token("stop_token_ids", token, vocab_size)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, MAX_SEED)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_int("n", self.n, 1, MAX_N)


class SpeculationParams(Struct, frozen=True, forbid_unknown_fields=True):
    """What one request may ask of speculation.

    `max_nodes` caps the tree, root included. `prediction` is text the caller expects, as token
    ids, drafted from beside what the drafters propose. `drafters` names those to ask (None: all).
    """

    enabled: bool = True
    max_nodes: int | None = None
    prediction: tuple[int, ...] = ()
    drafters: tuple[str, ...] | None = None


class Request(Struct, frozen=True, tag=True):
    """One sequence to generate. `sampling.seed` is set and `sampling.n` is 1 by now."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    speculation: SpeculationParams = SpeculationParams()
    deadline: float | None = None  # time.monotonic() seconds
    priority: int = 0  # higher runs first, of the same tenant
    cache_salt: str = ""
    arrived_at: float = 0.0  # time.monotonic() seconds
    tenant: str = ""  # who shares places, KV and passes with others: the name of an API key


class Abort(Struct, frozen=True, tag=True):
    """Stop a request; its slot, blocks and draft state come back."""

    id: str
    reason: str = "aborted by the caller"


class TokenLogprobs(Struct, frozen=True):
    """The target's own log-probabilities at one emitted token, before any processor."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


class SpecStats(Struct, frozen=True):
    """Speculation over one request. Tokens after a stop, EOS or max_tokens are not counted.

    `acceptance_histogram[a]` counts passes that accepted `a` drafted tokens; `drafted_by_depth[d]`
    counts passes whose tree reached depth d+1 and `accepted_by_depth[d]` those that accepted
    d+1 tokens or more.
    """

    num_spec_steps: int = 0
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    num_emitted_tokens: int = 0
    acceptance_histogram: tuple[int, ...] = ()
    drafted_by_depth: tuple[int, ...] = ()
    accepted_by_depth: tuple[int, ...] = ()

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per target pass, the bonus token included (1.0 is plain decoding)."""
        return self.num_emitted_tokens / self.num_spec_steps if self.num_spec_steps else 0.0


class StepOutput(Struct, frozen=True, tag=True):
    """What one step did for one request. `error` is set when `finish` is "error"."""

    id: str
    new_ids: tuple[int, ...] = ()
    # Per new id: 0 the target itself, else 1 + index of the drafter, or tree.PREDICTION.
    sources: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or token id that ended it
    error: str | None = None
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    stats: SpecStats | None = None  # on the last output


def _check_number(
    name: str, value: Any, low: float, high: float, *, low_open: bool = False
) -> None:
    bracket = "(" if low_open else "["
    expected = f"expected a number in {bracket}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(name, f"{value!r} is not a number; {expected}")
    if not math.isfinite(value) or value > high or value < low or (low_open and value == low):
        raise RequestError(name, f"{value} is out of range; {expected}")


def _check_int(name: str, value: Any, low: int, high: int | None) -> None:
    expected = f"expected an integer of at least {low}" + (
        "" if high is None else f" and at most {high}"
    )
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(name, f"{value!r} is not an integer; {expected}")
    if value < low or (high is not None and value > high):
        raise RequestError(name, f"{value} is out of range; {expected}")


def _check_token(name: str, token: Any, vocab_size: int) -> None:
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
        raise RequestError(
            name, f"token id {token!r} is not in the vocabulary; expected 0 to {vocab_size - 1}"
        )
