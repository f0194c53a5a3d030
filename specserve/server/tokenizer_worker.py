"""The server's tokenizer process: `process.tokenizer_main` plus handlers for request bodies.

Decoding 8 MB of JSON, or encoding a million tokens, can take seconds, during which the event loop
would be blocked. Here it has a time limit and a memory limit, and occupies one process only.
Run as `python -m specserve.server.tokenizer_worker FD`.
"""

import sys
from functools import lru_cache
from typing import Final

import msgspec
from msgspec import UNSET, Struct

from specserve.engine.limits import Limits
from specserve.process.tokenizer_main import Handler, main
from specserve.server.parse import decode
from specserve.server.protocol.chat import ChatRequest
from specserve.server.protocol.completions import CompletionRequest
from specserve.server.protocol.others import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from specserve.text import Tokenizer
from specserve.text.chat_messages import read_messages
from specserve.text.token_bytes import TokenBytes
from specserve.types import RequestError

MAX_TOKENS: Final = 2**20  # token ids in one request or answer: 8 MB of JSON


class Answer(Struct, frozen=True):
    """The body of a response, and the `model` that the request named."""

    model: str | None
    body: bytes


def read_completion(tokenizer: Tokenizer, body: bytes, limits: Limits) -> bytes:
    """Decode a `CompletionRequest` and re-encode it as msgpack.

    Raises RequestError, also if a prompt of token ids exceeds the context.
    """
    request = decode(body, CompletionRequest)
    request.check()
    prompts = [prompt for prompt in request.prompts() if isinstance(prompt, tuple)]
    for prompt in prompts:  # here, because the event loop should not decode what it must refuse
        limits.check_prompt_len(len(prompt), generates=request.max_tokens != 0)
    _check_count("prompt", sum(map(len, prompts)))
    return msgspec.msgpack.encode(request)


def read_chat(tokenizer: Tokenizer, body: bytes, limits: Limits) -> bytes:
    """Decode a `ChatRequest` and re-encode it as msgpack, its messages in plain form.

    Raises RequestError.
    """
    request = decode(body, ChatRequest)
    request.check()
    messages = read_messages(request.messages)
    return msgspec.msgpack.encode(msgspec.structs.replace(request, messages=messages))


def tokenize_body(tokenizer: Tokenizer, body: bytes, limits: Limits) -> bytes:
    """The `Answer` to /tokenize, as msgpack. Raises RequestError."""
    request = decode(body, TokenizeRequest)
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("prompt", "send exactly one of prompt and messages")
    if request.messages is not None:
        continues = request.continue_final_message
        generates = request.add_generation_prompt and not continues
        tokens = tokenizer.chat(request.messages, generates, continues)
    else:
        assert request.prompt is not None
        tokens = tokenizer.encode(request.prompt, add_special=request.add_special_tokens)
    _check_count("prompt" if request.messages is None else "messages", len(tokens))
    names = map(_token_bytes(tokenizer).text, tokens) if request.return_token_strs else None
    response = TokenizeResponse(
        count=len(tokens),
        max_model_len=limits.max_model_len,
        tokens=tuple(tokens),
        token_strs=UNSET if names is None else tuple(names),
    )
    return _answer(request.model, response)


def detokenize_body(tokenizer: Tokenizer, body: bytes, limits: Limits) -> bytes:
    """The `Answer` to /detokenize, as msgpack. Raises RequestError."""
    request = decode(body, DetokenizeRequest)
    for index, token in enumerate(request.tokens):
        if token >= limits.vocab_size:
            raise RequestError(
                f"tokens[{index}]", f"{token} is not in the vocabulary of {limits.vocab_size}"
            )
    text = tokenizer.decode(request.tokens, skip_special=False)
    return _answer(request.model, DetokenizeResponse(text))


HANDLERS: Final[dict[str, Handler]] = {
    handler.__name__: handler
    for handler in (read_completion, read_chat, tokenize_body, detokenize_body)
}
_token_bytes = lru_cache(maxsize=1)(TokenBytes)


def _check_count(name: str, num_tokens: int) -> None:
    if num_tokens > MAX_TOKENS:
        raise RequestError(name, f"{num_tokens} tokens given; at most {MAX_TOKENS} are allowed")


def _answer(model: str | None, response: Struct) -> bytes:
    return msgspec.msgpack.encode(Answer(model, msgspec.json.encode(response)))


if __name__ == "__main__":
    main(int(sys.argv[1]), HANDLERS)
