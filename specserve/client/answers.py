"""Converts the JSON of a server to the Structs of `types`.

The same Structs decode whole answers and stream chunks, of completions and of chats. A missing
field keeps its default, so answers of other servers with OpenAI's API are decoded as well.
"""

from itertools import repeat
from typing import Annotated, TypeVar

import msgspec
from msgspec import Meta, Struct

from specserve.client.errors import ErrorDetail, UnexpectedAnswer, quote
from specserve.client.types import Choice, Completion, Delta, Stats, TokenLogprob, TopLogprob, Usage

T = TypeVar("T")
Byte = Annotated[int, Meta(ge=0, le=255)]


class _Details(Struct, frozen=True):
    cached_tokens: int | None = None  # of the prompt
    accepted_prediction_tokens: int | None = None  # this and the next: of the completion
    rejected_prediction_tokens: int | None = None


class _Usage(Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None


class _Top(Struct, frozen=True):
    token: str
    logprob: float
    bytes: tuple[Byte, ...] | None = None


class _Token(_Top, frozen=True):
    top_logprobs: tuple[_Top, ...] = ()


class _Logprobs(Struct, frozen=True):
    """Chats have `content`, completions the other three fields."""

    content: tuple[_Token, ...] | None = None
    tokens: tuple[str, ...] = ()
    token_logprobs: tuple[float | None, ...] = ()
    top_logprobs: tuple[dict[str, float] | None, ...] | None = None


class _PromptLogprob(Struct, frozen=True):
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


# Per token of the prompt, by token id, the token itself first.
_PromptLogprobs = tuple[dict[str, _PromptLogprob] | None, ...]


class _Message(Struct, frozen=True):
    content: str | None = None


class _Choice(Struct, frozen=True):
    index: int = 0
    text: str | None = None  # of a completion
    message: _Message | None = None  # of a chat
    delta: _Message | None = None  # of a streamed chat
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    token_ids: tuple[int, ...] | None = None
    drafter_ids: tuple[int, ...] | None = None
    logprobs: _Logprobs | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: _PromptLogprobs | None = None  # of a completion


class Answer(Struct, frozen=True):
    """The JSON of a whole answer or of a stream chunk."""

    id: str = ""
    model: str = ""
    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    metrics: Stats | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    prompt_logprobs: _PromptLogprobs | None = None  # of a chat
    error: ErrorDetail | None = None


def read_json(data: bytes, kind: type[T]) -> T:
    """Decode the JSON of an answer or a stream chunk as `kind`. Raises UnexpectedAnswer."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise UnexpectedAnswer(
            f"the answer is not one of a specserve server ({error}): {quote(data)!r}"
        ) from None


def whole(answer: Answer) -> Completion:
    """The Completion of a whole answer. Raises UnexpectedAnswer if it has no choices."""
    collector = Collector()
    collector.add(answer)
    return collector.completion()


class Collector:
    """Converts stream chunks to deltas and merges all of them into one Completion."""

    def __init__(self) -> None:
        self._id = self._model = ""
        self._prompt_ids: tuple[int, ...] = ()
        self._prompt_logprobs: _PromptLogprobs = ()
        self._choices: dict[int, list[Delta]] = {}
        self._usage: Usage | None = None
        self._stats: Stats | None = None

    def add(self, answer: Answer) -> list[Delta]:
        """The deltas of one chunk: one per choice that is not empty, or one for the usage."""
        self._id = self._id or answer.id
        self._model = self._model or answer.model
        self._prompt_ids = self._prompt_ids or answer.prompt_token_ids or ()
        self._prompt_logprobs = self._prompt_logprobs or answer.prompt_logprobs or ()
        self._usage = self._usage if answer.usage is None else _usage(answer.usage)
        self._stats = answer.metrics or self._stats
        deltas = []
        for choice in answer.choices:
            self._prompt_ids = self._prompt_ids or choice.prompt_token_ids or ()
            self._prompt_logprobs = self._prompt_logprobs or choice.prompt_logprobs or ()
            delta = _delta(choice)
            self._choices.setdefault(choice.index, []).append(delta)
            if delta != Delta(index=choice.index):
                deltas.append(delta)
        if not answer.choices and (answer.usage or answer.metrics):
            deltas.append(Delta(usage=self._usage, stats=self._stats))
        return deltas

    def completion(self) -> Completion:
        """All chunks so far, merged. Raises UnexpectedAnswer if they have no choices."""
        if not self._choices:
            raise UnexpectedAnswer("the server's answer holds no choices")
        return Completion(
            id=self._id,
            model=self._model,
            choices=tuple(_join(index, self._choices[index]) for index in sorted(self._choices)),
            prompt_ids=self._prompt_ids,
            prompt_logprobs=tuple(map(_prompt_logprob, self._prompt_logprobs)),
            usage=self._usage or Usage(),
            stats=self._stats or Stats(),
        )


def _join(index: int, deltas: list[Delta]) -> Choice:
    logprobs = tuple(each for delta in deltas for each in delta.logprobs)
    finish = next((delta for delta in reversed(deltas) if delta.finish_reason), Delta())
    return Choice(
        index=index,
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token for delta in deltas for token in delta.token_ids),
        drafter_ids=tuple(drafter_id for delta in deltas for drafter_id in delta.drafter_ids),
        logprobs=logprobs or None,
        finish_reason=finish.finish_reason,
        stop_reason=finish.stop_reason,
    )


def _delta(choice: _Choice) -> Delta:
    message = choice.message or choice.delta or _Message()
    return Delta(
        text=choice.text or message.content or "",
        token_ids=choice.token_ids or (),
        drafter_ids=choice.drafter_ids or (),
        logprobs=_logprobs(choice.logprobs or _Logprobs()),
        finish_reason=choice.finish_reason,
        stop_reason=choice.stop_reason,
        index=choice.index,
    )


def _logprobs(wire: _Logprobs) -> tuple[TokenLogprob, ...]:
    if wire.content is not None:
        return tuple(
            TokenLogprob(
                each.token,
                each.logprob,
                tuple(TopLogprob(t.token, t.logprob, _raw(t.bytes)) for t in each.top_logprobs),
                _raw(each.bytes),
            )
            for each in wire.content
        )
    tops = repeat(None) if wire.top_logprobs is None else wire.top_logprobs
    return tuple(
        TokenLogprob(token, logprob, tuple(TopLogprob(*pair) for pair in (top or {}).items()))
        for token, logprob, top in zip(wire.tokens, wire.token_logprobs, tops, strict=False)
    )


def _prompt_logprob(wire: dict[str, _PromptLogprob] | None) -> TokenLogprob | None:
    if not wire:
        return None
    first, ranked = next(iter(wire.values())), [each for each in wire.values() if each.rank]
    ranked.sort(key=lambda each: each.rank or 0)
    top = tuple(TopLogprob(each.decoded_token or "", each.logprob) for each in ranked)
    return TokenLogprob(first.decoded_token or "", first.logprob, top)


def _raw(wire: tuple[Byte, ...] | None) -> bytes | None:
    return None if wire is None else bytes(wire)


def _usage(wire: _Usage) -> Usage:
    prompt = wire.prompt_tokens_details or _Details()
    completion = wire.completion_tokens_details or _Details()
    return Usage(
        prompt_tokens=wire.prompt_tokens,
        completion_tokens=wire.completion_tokens,
        total_tokens=wire.total_tokens,
        cached_tokens=prompt.cached_tokens or 0,
        accepted_prediction_tokens=completion.accepted_prediction_tokens or 0,
        rejected_prediction_tokens=completion.rejected_prediction_tokens or 0,
    )
