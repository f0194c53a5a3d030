"""Reads the body of a request and decodes it, a long one in a tokenizer process."""

import re
from typing import Final, TypeVar

import msgspec
from aiohttp import web

from specserve.server.auth import PRINCIPAL
from specserve.server.connections import read_body
from specserve.server.deadline import deadline
from specserve.server.held_bodies import TAKE_BYTES
from specserve.server.parse import decode
from specserve.server.protocol.fields import GenerationFields
from specserve.server.service import SERVICE

# Bytes; a longer body is decoded by a tokenizer process. Decoding this many in the event loop takes
# 10 ms if every byte is a JSON value.
_MAX_INLINE_BODY: Final = 2**15

_TIMEOUT: Final = re.compile(rb'"request_timeout"\s*:\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)[\s,}]')

T = TypeVar("T", bound=GenerationFields)


async def read_request(request: web.Request, request_type: type[T], handler: str) -> T:
    """Read and decode the body. Raises what `call_tokenizer_process` raises.

    A body over `_MAX_INLINE_BODY` bytes is decoded by the function `handler` of a tokenizer
    process, because it would block the event loop.
    """
    body = await read_bytes(request)
    if len(body) <= _MAX_INLINE_BODY:
        fields = decode(body, request_type)
        fields.check()
        return fields
    data = await call_tokenizer_process(request, handler, body)
    return msgspec.msgpack.decode(data, type=request_type)


async def read_bytes(request: web.Request) -> bytes:
    """Read the body, within the configured limits, and wait for a turn of its key to handle it.

    Raises APIError.
    """
    service = request.app[SERVICE]
    timeout = service.config.server.body_timeout
    body = await read_body(request, service.max_body_bytes, timeout, request[TAKE_BYTES])
    await service.turns.wait(request[PRINCIPAL].name)
    return body


async def call_tokenizer_process(request: web.Request, handler: str, body: bytes) -> bytes:
    """Run the function `handler` of a tokenizer process on the body; returns its result.

    Raises APIError, RequestError or TokenizerUnavailable.
    """
    service = request.app[SERVICE]
    limits, tenant = service.engine_info().limits, request[PRINCIPAL].name
    # The body is not decoded yet, and this may have to wait, too.
    found = _TIMEOUT.match(body, max(0, body.rfind(b'"request_timeout"')))
    async with deadline(request, float(found[1]) if found else None).enforced():
        return await service.engine.tokenizer_pool.call(handler, body, limits, tenant=tenant)
