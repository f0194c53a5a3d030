"""Sends the answer to a generation request, as one response or as a stream of events."""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct

from specserve.server.chat_formatter import ChatFormatter
from specserve.server.completion_formatter import CompletionFormatter
from specserve.server.connections import SERVER_NAME
from specserve.server.encoded import encoded
from specserve.server.error_mapping import as_api_error
from specserve.server.event_stream import KEEP_ALIVE_S, EventStream, padding, with_heartbeats
from specserve.server.generation import GenerationRun
from specserve.server.protocol.fields import StreamOptions
from specserve.server.service import REQUEST_ID
from specserve.text.text_delta import TextDelta

logger = logging.getLogger(__name__)
ResponseFormatter = ChatFormatter | CompletionFormatter


async def send_response(
    request: web.Request, generation: GenerationRun, formatter: ResponseFormatter
) -> web.StreamResponse:
    """Send the answer. Before its first byte, raises what `GenerationRun.text_deltas` raises."""
    if formatter.request.stream:
        return await _send_stream(request, _chunks(generation, formatter), generation.id)
    return await _single_response(generation, formatter)


async def _single_response(generation: GenerationRun, formatter: ResponseFormatter) -> web.Response:
    deltas: defaultdict[int, list[TextDelta]] = defaultdict(list)  # by choice
    logprobs: defaultdict[int, list[Any]] = defaultdict(list)
    async with aclosing(generation.text_deltas()) as arriving:
        async for delta in arriving:
            logprobs[delta.choice].append(formatter.logprobs(delta))
            deltas[delta.choice].append(delta.without_logprobs())
            if delta.tokens.prompt_logprobs:  # all those of a prompt chunk arrive at once
                await asyncio.sleep(0)
    choices: list[Any] = []
    for index in range(generation.num_choices):
        choices.append(encoded(formatter.choice(deltas.pop(index), logprobs.pop(index))))
        await asyncio.sleep(0)  # let other tasks run: there may be many long choices
    answer = formatter.response(choices, generation.usage(), generation.metrics())
    return web.Response(body=msgspec.json.encode(answer), content_type="application/json")


async def _send_stream(
    request: web.Request, chunks: AsyncGenerator[list[Struct], None], generation_id: str
) -> web.StreamResponse:
    headers = {"X-Request-Id": request[REQUEST_ID], "Server": SERVER_NAME}
    events = EventStream(request, headers)
    try:
        async with (
            aclosing(chunks),
            aclosing(with_heartbeats(chunks, KEEP_ALIVE_S)) as batches,
        ):
            async for batch in batches:
                if batch is None:
                    await events.comment("keep-alive")
                else:
                    await events.send(*map(msgspec.json.encode, batch))
        await events.end()
    except ConnectionError:
        logger.info("%s: the client has disconnected", generation_id)
    except Exception as error:
        if not events.response.prepared:
            raise
        with suppress(ConnectionError):  # the status can no longer change
            await events.send(as_api_error(error).body())
            await events.end()
    return events.response


async def _chunks(
    generation: GenerationRun, formatter: ResponseFormatter
) -> AsyncGenerator[list[Struct], None]:
    """The chunks of each write, in order."""
    fields = formatter.request
    options = fields.stream_options or StreamOptions()
    shows_tokens = fields.return_token_ids or fields.return_drafter_ids
    num_unfinished = generation.num_choices
    started = False

    def complete(chunk: Struct, **more: Any) -> Struct:
        """The chunk with the fields that `options` ask for, and `more`."""
        if options.include_usage or options.continuous_usage_stats:
            more.setdefault("usage", generation.usage() if options.continuous_usage_stats else None)
        chunk = msgspec.structs.replace(chunk, **more)
        if options.include_obfuscation:
            chunk = msgspec.structs.replace(chunk, obfuscation="")
            return msgspec.structs.replace(chunk, obfuscation=padding(chunk))
        return chunk

    async with aclosing(generation.text_deltas()) as deltas:
        async for delta in deltas:
            batch = [] if started else [complete(chunk) for chunk in formatter.first_chunks()]
            started = True
            tokens = delta.tokens
            num_unfinished -= tokens.finish is not None
            logprobs = delta.logprobs or tokens.prompt_logprobs
            if delta.text or tokens.finish or logprobs or (shows_tokens and tokens.ids):
                last = num_unfinished == 0 and not options.include_usage
                more = {"metrics": generation.metrics()} if last else {}
                choices = (formatter.chunk_choice(delta),)
                batch.append(complete(formatter.answer, choices=choices, **more))
            if batch:
                yield batch
    if options.include_usage:
        usage, metrics = generation.usage(), generation.metrics()
        yield [complete(formatter.answer, usage=usage, metrics=metrics)]
