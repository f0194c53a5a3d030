"""A large single response is made in small parts, so that the event loop is free in between."""

import asyncio
import json
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any, Final, cast

import pytest

from specserve.server.chat_formatter import ChatFormatter
from specserve.server.completion_formatter import CompletionFormatter, Echo
from specserve.server.generation import GenerationRun
from specserve.server.protocol.chat import ChatChunk, ChatRequest
from specserve.server.protocol.completions import Completion, CompletionRequest
from specserve.server.protocol.usage import Usage
from specserve.server.send_response import ResponseFormatter, send_response
from specserve.text import Tokenizer
from specserve.text.text_delta import TextDelta
from specserve.text.token_bytes import TokenBytes
from specserve.types import StepOutput, TokenLogprobs

NUM_CHOICES, NUM_TOKENS, NUM_TOP = 4, 400, 20


def delta(choice: int, at: int) -> TextDelta:
    token = at % 200
    entry = TokenLogprobs(token, -0.5, tuple((token + i, -0.5 - i) for i in range(NUM_TOP)))
    finish = "length" if at == NUM_TOKENS - 1 else None
    tokens = StepOutput("", (token,), (0,), (entry,), finish=cast(Any, finish))
    return TextDelta(choice, "ab", tokens, (entry,), (2 * at,))


class Generation:
    """Stands for a `GenerationRun` of four choices."""

    id, num_choices = "id", NUM_CHOICES

    async def text_deltas(self) -> AsyncGenerator[TextDelta, None]:
        for at in range(NUM_TOKENS):
            for choice in range(NUM_CHOICES):
                await asyncio.sleep(0)
                yield delta(choice, at)

    def usage(self) -> Usage:
        return Usage(1, 2, 3, cast(Any, None))

    def metrics(self) -> None:
        return None


def chat(names: TokenBytes) -> ResponseFormatter:
    request = ChatRequest(messages=[], n=NUM_CHOICES, logprobs=True, top_logprobs=NUM_TOP)
    return ChatFormatter(ChatChunk(id="i", created=1, model="m", choices=()), request, (1,), names)


def completion(names: TokenBytes) -> ResponseFormatter:
    request = CompletionRequest(prompt="a", n=NUM_CHOICES, logprobs=NUM_TOP)
    answer = Completion(id="i", created=1, model="m", choices=())
    return CompletionFormatter(answer, request, [(1,)], [Echo()], names)


MAKERS: Final = [chat, completion]


@pytest.mark.parametrize("make", MAKERS)
def test_the_event_loop_is_never_blocked_for_long(
    make: Callable[[TokenBytes], ResponseFormatter], chat_model: Path
) -> None:
    formatter = make(TokenBytes(Tokenizer(chat_model)))
    gaps: list[float] = []

    async def watch() -> None:
        last = time.thread_time()
        while True:
            await asyncio.sleep(0)
            now = time.thread_time()
            gaps.append(now - last)
            last = now

    async def scenario() -> Any:
        watching = asyncio.create_task(watch())
        generation = cast(GenerationRun, Generation())
        answer = await send_response(cast(Any, None), generation, formatter)
        watching.cancel()
        return answer

    answer = json.loads(asyncio.run(scenario()).body)
    assert [each["index"] for each in answer["choices"]] == list(range(NUM_CHOICES))
    for choice in answer["choices"]:
        logprobs = choice["logprobs"]
        if "content" in logprobs:
            assert len(logprobs["content"]) == NUM_TOKENS
            assert all(len(entry["top_logprobs"]) == NUM_TOP for entry in logprobs["content"])
        else:
            assert {len(logprobs[name]) for name in logprobs} == {NUM_TOKENS}
            assert logprobs["text_offset"] == list(range(0, 2 * NUM_TOKENS, 2))
    assert max(gaps) < sum(gaps) / 8, "most of the work is done at once"
