"""The messages between an engine and its callers: frozen Structs, without torch.

A `Request` or an `Abort` goes in, `StepOutput`s come out.
"""

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import msgspec
from msgspec import Struct

MIN_TEMPERATURE = 0.01  # smallest temperature above 0
MAX_LOGPROBS = 20  # alternatives per token
MAX_STOP_STRINGS = 16
MAX_N = 128  # completions per prompt
MAX_SEED = 2**63 - 1

FinishReason = Literal["stop", "length", "abort", "error"]
Quantization = Literal["auto", "none", "int8", "int4"]
Message = Mapping[str, Any]  # {"role": ..., "content": ...}
Prompt = str | Sequence[int] | Sequence[Message]  # text, token ids or a chat


class RequestError(ValueError):
    """A request that cannot be served. `message` has the value of the field `param` and the fix."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param
        self.message = message


def read_prompt(prompt: Prompt) -> str | list[Message] | tuple[int, ...]:
    """The prompt as text, chat messages or token ids. Raises RequestError for anything else."""
    if isinstance(prompt, str):
        return prompt
    if any(isinstance(item, Mapping) for item in prompt):
        return cast(list[Message], list(prompt))
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int):
            raise RequestError("prompt", f"{token!r} is not a token id; give integers")
    return cast(tuple[int, ...], tuple(prompt))


class SamplingParams(Struct, frozen=True, forbid_unknown_fields=True):
    """How tokens are chosen. The defaults sample from the model's unmodified distribution.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 switch the filters off. `max_tokens` 0
    computes the prompt and generates nothing. `logprobs` is the number of alternatives returned per
    token in addition to the chosen one (None: no logprobs); `prompt_logprobs` is the same for the
    tokens of the prompt. `seed` None draws a random seed per request. `skip_special_tokens` leaves
    control tokens out of the text, in which stop strings are searched too.
    `include_stop_str_in_output` keeps the stop string that ended the text.
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
    prompt_logprobs: int | None = None
    n: int = 1

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether a penalty is set, so that the logits depend on earlier tokens."""
        return (
            self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
            or self.repetition_penalty != 1.0
        )

    def samples(self) -> list["SamplingParams"]:
        """The parameters of each of the `n` samples, with n = 1 and a seed of its own.

        The first has `seed`, or a random one if it is None; the others have hashes of that. Only
        the first has `prompt_logprobs`, because these are the same for all.
        """
        seeds = [secrets.randbelow(MAX_SEED) if self.seed is None else self.seed]
        for index in range(1, self.n):
            digest = hashlib.blake2b(f"{seeds[0]}/{index}".encode(), digest_size=8).digest()
            seeds.append(int.from_bytes(digest) % MAX_SEED)
        first = msgspec.structs.replace(self, seed=seeds[0], n=1)
        others = msgspec.structs.replace(first, prompt_logprobs=None)
        return [first, *(msgspec.structs.replace(others, seed=own) for own in seeds[1:])]

    def validate(self, vocab_size: int) -> None:
        """Raise `RequestError`, naming the first field that is out of range."""
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
        _check_int("max_tokens", self.max_tokens, 0, None)
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
        for name in ("logprobs", "prompt_logprobs"):
            if (count := getattr(self, name)) is not None:
                _check_int(name, count, 0, MAX_LOGPROBS)
        _check_int("n", self.n, 1, MAX_N)


class SpeculationParams(Struct, frozen=True, forbid_unknown_fields=True):
    """The speculation settings of one request."""

    enabled: bool = True
    max_nodes: int | None = None  # of a tree, root included
    prediction: tuple[int, ...] = ()  # the output that the caller expects; drafted from as well
    drafters: tuple[str, ...] | None = None  # names of those to use; None: all


class Request(Struct, frozen=True, tag=True):
    """One sequence to generate. `sampling.seed` must be set and `sampling.n` must be 1."""

    id: str
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    speculation: SpeculationParams = SpeculationParams()
    deadline: float | None = None  # time.monotonic() seconds
    priority: int = 0  # among requests of one tenant, higher runs first
    cache_salt: str = ""  # cached prefixes and drafters' tables are shared at equal salt only
    arrived_at: float = 0.0  # time.monotonic() seconds
    tenant: str = ""  # the unit of fair sharing: the name of an API key


class Abort(Struct, frozen=True, tag=True):
    """End a request; its place, KV blocks and draft state are released."""

    id: str
    reason: str = "aborted by the caller"


class TokenLogprobs(Struct, frozen=True):
    """The target's log-probabilities at one token, before sampling parameters apply."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # (token id, logprob), best first


# One entry per prompt token; None for the first token of a prompt, which has no logprob.
PromptLogprobs = tuple[TokenLogprobs | None, ...]


class SpecStats(Struct, frozen=True):
    """Speculation statistics. Tokens after a stop, EOS or max_tokens are not counted.

    A verification is one sequence in one forward pass. `acceptance_histogram[a]` counts the
    verifications that accepted `a` drafted tokens, `drafted_by_depth[d]` those whose tree reached
    depth d + 1, and `accepted_by_depth[d]` those that accepted at least d + 1 tokens.
    """

    num_spec_steps: int = 0  # verifications
    num_draft_tokens: int = 0
    num_accepted_draft_tokens: int = 0
    num_emitted_tokens: int = 0
    acceptance_histogram: tuple[int, ...] = ()
    drafted_by_depth: tuple[int, ...] = ()
    accepted_by_depth: tuple[int, ...] = ()

    @property
    def mean_acceptance_length(self) -> float:
        """Tokens per forward pass of the target, bonus token included (plain decoding: 1.0)."""
        return self.num_emitted_tokens / self.num_spec_steps if self.num_spec_steps else 0.0


class StepOutput(Struct, frozen=True, tag=True):
    """The result of one step for one request."""

    id: str
    ids: tuple[int, ...] = ()
    # Drafter id per token: 0 the target, 1 + index of the drafter, or `tree.PREDICTION_ID`.
    drafter_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: PromptLogprobs = ()  # of the next prompt tokens; each is returned once
    finish: FinishReason | None = None
    stop_reason: str | int | None = None  # the stop string or token id that ended it
    error: str | None = None  # the reason of "error", and maybe of "abort"
    num_cached_tokens: int = 0  # prompt tokens taken from the prefix cache
    stats: SpecStats | None = None  # on the last output


def _check_number(name: str, value: Any, low: float, high: float, low_open: bool = False) -> None:
    bracket = "(" if low_open else "["
    expected = f"expected a number in {bracket}{low:g}, {high:g}]"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(name, f"{value!r} is not a number; {expected}")
    if not low <= value <= high or (low_open and value == low):  # also refuses NaN
        raise RequestError(name, f"{value} is out of range; {expected}")


def _check_int(name: str, value: Any, low: int, high: int | None) -> None:
    limit = "" if high is None else f" and at most {high}"
    expected = f"expected an integer of at least {low}{limit}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(name, f"{value!r} is not an integer; {expected}")
    if value < low or (high is not None and value > high):
        raise RequestError(name, f"{value} is out of range; {expected}")


def _check_token(name: str, token: Any, vocab_size: int) -> None:
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
        raise RequestError(
            name, f"token id {token!r} is not in the vocabulary; expected 0 to {vocab_size - 1}"
        )
