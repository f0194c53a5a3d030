"""Sends the answer to a generation request, as one response or as a stream of events."""

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from typing import Any, Protocol

import msgspec
from aiohttp import web
from msgspec import Struct

from specserve.server.connections import SERVER_NAME
from specserve.server.errors import APIError
from specserve.server.failures import as_api_error
from specserve.server.generation import Generation, Piece
from specserve.server.protocol.fields import GenerationFields, StreamOptions
from specserve.server.protocol.usage import Metrics, Usage
from specserve.server.service import REQUEST_ID
from specserve.server.stream import KEEP_ALIVE_S, EventStream, padding, with_pauses

logger = logging.getLogger(__name__)


class Format(Protocol):
    """How a route formats its answers. Chunks have the fields `usage` and `metrics`."""

    def opening(self) -> Sequence[Struct]: ...

    def chunk(self, piece: Piece) -> Struct | None: ...

    def closing(self) -> Struct: ...

    def response(
        self, choices: Sequence[Sequence[Piece]], usage: Usage, metrics: Metrics
    ) -> Struct: ...


async def respond(
    request: web.Request, fields: GenerationFields, generation: Generation, form: Format
) -> web.StreamResponse:
    """Send the answer. Before its first byte, raises what `Generation.pieces` raises."""
    if fields.stream:
        options = fields.stream_options or StreamOptions()
        return await _stream(request, options, generation, form)
    return await _whole(generation, form)


async def _whole(generation: Generation, form: Format) -> web.Response:
    job = generation.job
    choices: list[list[Piece]] = [[] for _ in range(len(job.prompts) * job.sampling.n)]
    async with aclosing(generation.pieces()) as pieces:
        async for piece in pieces:
            choices[piece.choice].append(piece)
    answer = form.response(choices, generation.usage(), generation.metrics())
    return web.Response(body=msgspec.json.encode(answer), content_type="application/json")


async def _stream(
    request: web.Request, options: StreamOptions, generation: Generation, form: Format
) -> web.StreamResponse:
    headers = {"X-Request-Id": request[REQUEST_ID], "Server": SERVER_NAME}
    events = EventStream(request, headers)
    try:
        async with (
            aclosing(_chunks(options, generation, form)) as chunks,
            aclosing(with_pauses(chunks, KEEP_ALIVE_S)) as paused,
        ):
            async for batch in paused:
                if batch is None:
                    await events.comment("keep-alive")
                else:
                    await events.send(*batch)
        await events.end()
    except ConnectionError:
        logger.info("%s: the client is gone", generation.job.id)
    except Exception as error:
        if not events.response.prepared:
            raise
        await _break_off(events, as_api_error(error))
    return events.response


async def _chunks(
    options: StreamOptions, generation: Generation, form: Format
) -> AsyncGenerator[list[Struct], None]:
    """The chunks of each write, in order."""
    num_open = len(generation.job.prompts) * generation.job.sampling.n
    opened = False

    def finished(chunk: Struct, **more: Any) -> Struct:
        if options.include_usage or options.continuous_usage_stats:
            more.setdefault("usage", generation.usage() if options.continuous_usage_stats else None)
        chunk = msgspec.structs.replace(chunk, **more)
        if options.include_obfuscation:
            chunk = msgspec.structs.replace(chunk, obfuscation="")
            return msgspec.structs.replace(chunk, obfuscation=padding(chunk))
        return chunk

    async with aclosing(generation.pieces()) as pieces:
        async for piece in pieces:
            batch = [] if opened else [finished(chunk) for chunk in form.opening()]
            opened = True
            num_open -= piece.bundle.finish is not None
            chunk = form.chunk(piece)
            if chunk is not None:
                last = num_open == 0 and not options.include_usage
                batch.append(finished(chunk, **({"metrics": generation.metrics()} if last else {})))
            if batch:
                yield batch
    if options.include_usage:
        yield [finished(form.closing(), usage=generation.usage(), metrics=generation.metrics())]


async def _break_off(events: EventStream, error: APIError) -> None:
    """End a stream that has begun with an error event; its status can no longer change."""
    with suppress(ConnectionError):
        await events.send_json(error.body())
        await events.end()
