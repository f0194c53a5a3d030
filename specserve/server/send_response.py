"""Sends the answer to a generation request, as one response or as a stream of events."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from typing import Any, Protocol

import msgspec
from aiohttp import web
from msgspec import Struct

from specserve.server.connections import SERVER_NAME
from specserve.server.encoded import encoded
from specserve.server.error_mapping import as_api_error
from specserve.server.errors import APIError
from specserve.server.event_stream import KEEP_ALIVE_S, EventStream, padding, with_heartbeats
from specserve.server.generation import GenerationRun
from specserve.server.protocol.fields import GenerationFields, StreamOptions
from specserve.server.protocol.usage import Metrics, Usage
from specserve.server.service import REQUEST_ID
from specserve.text.text_delta import TextDelta

logger = logging.getLogger(__name__)


class ResponseFormatter(Protocol):
    """How a route formats its answers. Chunks have the fields `usage` and `metrics`."""

    def first_chunks(self) -> Sequence[Struct]: ...

    def delta_chunk(self, delta: TextDelta) -> Struct | None: ...

    def usage_chunk(self) -> Struct: ...

    def add(self, delta: TextDelta) -> None:
        """Take the next delta of a single response."""

    def choice(self, index: int) -> Struct:
        """A choice of the single response, once all deltas were added."""

    def response(self, choices: Sequence[Any], usage: Usage, metrics: Metrics) -> Struct:
        """The single response; `choices` are all results of `choice`, in order."""


async def send_response(
    request: web.Request,
    fields: GenerationFields,
    generation: GenerationRun,
    formatter: ResponseFormatter,
) -> web.StreamResponse:
    """Send the answer. Before its first byte, raises what `GenerationRun.text_deltas` raises."""
    if fields.stream:
        options = fields.stream_options or StreamOptions()
        return await _send_stream(request, options, generation, formatter)
    return await _single_response(generation, formatter)


async def _single_response(generation: GenerationRun, formatter: ResponseFormatter) -> web.Response:
    job = generation.job
    async with aclosing(generation.text_deltas()) as deltas:
        async for delta in deltas:
            formatter.add(delta)
    choices = []
    for index in range(len(job.prompts) * job.sampling.n):
        choices.append(encoded(formatter.choice(index)))
        await asyncio.sleep(0)  # let other tasks run: there may be many long choices
    answer = formatter.response(choices, generation.usage(), generation.metrics())
    return web.Response(body=msgspec.json.encode(answer), content_type="application/json")


async def _send_stream(
    request: web.Request,
    options: StreamOptions,
    generation: GenerationRun,
    formatter: ResponseFormatter,
) -> web.StreamResponse:
    headers = {"X-Request-Id": request[REQUEST_ID], "Server": SERVER_NAME}
    events = EventStream(request, headers)
    try:
        async with (
            aclosing(_chunks(options, generation, formatter)) as chunks,
            aclosing(with_heartbeats(chunks, KEEP_ALIVE_S)) as batches,
        ):
            async for batch in batches:
                if batch is None:
                    await events.comment("keep-alive")
                else:
                    await events.send(*batch)
        await events.end()
    except ConnectionError:
        logger.info("%s: the client has disconnected", generation.job.id)
    except Exception as error:
        if not events.response.prepared:
            raise
        await _end_with_error(events, as_api_error(error))
    return events.response


async def _chunks(
    options: StreamOptions, generation: GenerationRun, formatter: ResponseFormatter
) -> AsyncGenerator[list[Struct], None]:
    """The chunks of each write, in order."""
    num_unfinished = len(generation.job.prompts) * generation.job.sampling.n
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
            num_unfinished -= delta.tokens.finish is not None
            chunk = formatter.delta_chunk(delta)
            if chunk is not None:
                last = num_unfinished == 0 and not options.include_usage
                batch.append(complete(chunk, **({"metrics": generation.metrics()} if last else {})))
            if batch:
                yield batch
    if options.include_usage:
        usage, metrics = generation.usage(), generation.metrics()
        yield [complete(formatter.usage_chunk(), usage=usage, metrics=metrics)]


async def _end_with_error(events: EventStream, error: APIError) -> None:
    """End a stream that has begun with an error event; its status can no longer change."""
    with suppress(ConnectionError):
        await events.send_json(error.body())
        await events.end()
