"""The options of a generation call, and the JSON body made from them.

Values that JSON cannot represent and unknown names are refused here; the server checks ranges.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypedDict, cast

import msgspec
from msgspec import Struct

from specserve.field_help import lists_fields
from specserve.server.descriptions import DESCRIPTIONS

Message = Mapping[str, Any]  # {"role": ..., "content": ...}
Messages = str | Sequence[Message]  # text stands for one user message
Prompt = str | Sequence[int]


class SpeculationOptions(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Settings of speculative decoding for a request. They affect speed, never the output."""

    enabled: bool = True
    max_nodes: int | None = None  # nodes of a tree, the root included; None: the server's
    drafters: tuple[str, ...] | None = None  # the drafters to use; None: all


class Options(TypedDict, total=False):
    """Keyword arguments of all generation calls. Missing or None: the default of the server.

    `help(Client.chat)` says what each of them does. Most are fields of the request, described in
    `server/descriptions.py`.
    """

    model: str | None
    max_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    include_stop_str_in_output: bool | None
    skip_special_tokens: bool | None
    seed: int | None
    n: int | None
    logprobs: int | None
    prompt_logprobs: int | None
    speculation: SpeculationOptions | Mapping[str, Any] | None
    prediction: str | None
    cache_salt: str | None
    priority: int | None
    timeout: float | None
    request_id: str | None
    extra: Mapping[str, Any] | None


_MEANINGS: Final = {
    **DESCRIPTIONS,
    **{  # fields that the two requests describe apart
        name.partition(".")[2]: text
        for name, text in DESCRIPTIONS.items()
        if name.startswith(("ChatRequest.", "CompletionRequest."))
    },
    "logit_bias": "Numbers to add to the logits of single tokens, from -100 to 100, by token id.",
    "timeout": "Seconds for the whole call, retries included. Default: that of the client.",
    "request_id": "Identifies the request in the server's log. Default: one of the server.",
    "extra": "Further fields of the request's JSON.",
}
# A decorator: appends what each option means to the docstring of a method.
lists_options: Final = lists_fields(Options, _MEANINGS)
_NOT_IN_THE_BODY: Final = {"timeout", "request_id", "extra"}


def completion_body(prompt: Prompt, options: Options, *, stream: bool) -> bytes:
    """The JSON of a request to /v1/completions. Raises TypeError and ValueError."""
    body = _body(options, stream)
    body["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
    return encode_body(body)


def chat_body(messages: Messages, options: Options, *, stream: bool) -> bytes:
    """The JSON of a request to /v1/chat/completions. Raises TypeError and ValueError."""
    body = _body(options, stream)
    body["messages"] = as_messages(messages)
    if "logprobs" in body:
        body["top_logprobs"] = body["logprobs"]
        body["logprobs"] = True
    return encode_body(body)


def as_messages(messages: Messages) -> list[dict[str, Any]]:
    """The messages as dictionaries; text becomes one user message."""
    if isinstance(messages, str):
        return [{"role": "user", "content": messages}]
    return [dict(message) for message in messages]


def encode_body(fields: Mapping[str, Any]) -> bytes:
    """Encode a JSON object. Raises ValueError, naming the field, for a value such as NaN."""
    parts = []
    for name, value in fields.items():
        try:
            encoded = json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: no JSON can be made of {value!r:.80}: {error}") from None
        parts.append(f"{json.dumps(name)}:{encoded}")
    return f"{{{','.join(parts)}}}".encode()


def _body(options: Options, stream: bool) -> dict[str, Any]:
    unknown = options.keys() - Options.__annotations__.keys()
    if unknown:
        raise TypeError(
            f"unknown options: {', '.join(sorted(unknown))}; known are "
            f"{', '.join(sorted(Options.__annotations__))} (extra= adds other fields)"
        )
    body = {
        name: value
        for name, value in cast(dict[str, Any], options).items()
        if value is not None and name not in _NOT_IN_THE_BODY
    }
    for name, as_json in _AS_JSON.items():
        if name in body:
            body[name] = as_json(body[name])
    body |= {"return_token_ids": True, "return_drafter_ids": True}
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body | dict(options.get("extra") or {})


def _speculation(options: SpeculationOptions | Mapping[str, Any]) -> Any:
    try:
        return msgspec.to_builtins(msgspec.convert(options, SpeculationOptions))
    except msgspec.ValidationError as error:
        raise ValueError(f"speculation: {error}") from None


_AS_JSON: Final[dict[str, Any]] = {
    "logit_bias": dict,
    "stop": lambda stop: stop if isinstance(stop, str) else list(stop),
    "stop_token_ids": list,
    "speculation": _speculation,
    "prediction": lambda text: {"type": "content", "content": text},
}
