"""The first steps of both generation routes: read and check the body, create a `Generation`."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final, TypeVar

import msgspec
from aiohttp import web

from specserve.config import parse_bytes
from specserve.server.auth import principal
from specserve.server.connections import read_body
from specserve.server.generation import DeadlinePassed, Generation, Job
from specserve.server.held_bodies import BODY
from specserve.server.parse import decode
from specserve.server.protocol.fields import GenerationFields
from specserve.server.service import ARRIVED, REQUEST_ID, SERVICE, Service
from specserve.types import Request, RequestError

# Bytes; a longer body is decoded by a tokenizer process. Decoding this many in the event loop takes
# 10 ms if every byte is a JSON value.
_READ_HERE: Final = 2**15

_TIMEOUT: Final = re.compile(rb'"request_timeout"\s*:\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)[\s,}]')

T = TypeVar("T", bound=GenerationFields)


async def read(request: web.Request, request_type: type[T], handler: str) -> T:
    """Read and decode the body. Raises APIError, RequestError, TextUnavailable or DeadlinePassed.

    A body over `_READ_HERE` bytes is decoded by the function `handler` of a tokenizer process,
    because it would block the event loop.
    """
    body = await read_bytes(request)
    if len(body) <= _READ_HERE:
        fields = decode(body, request_type)
        fields.check()
        return fields
    data = await call_text_worker(request, handler, body)
    return msgspec.msgpack.decode(data, type=request_type)


async def read_bytes(request: web.Request) -> bytes:
    """Read the body, within the configured limits. Raises APIError."""
    config = request.app[SERVICE].config.server
    limit = parse_bytes("max_body_bytes", config.max_body_bytes)
    return await read_body(request, limit, config.body_timeout, request[BODY].take)


async def call_text_worker(request: web.Request, handler: str, body: bytes) -> bytes:
    """Run the function `handler` of a tokenizer process on the body; returns its result.

    Raises APIError, RequestError, TextUnavailable or DeadlinePassed.
    """
    service = request.app[SERVICE]
    limits, tenant = service.engine_info().limits, principal(request).name
    async with in_time(request, _wanted_timeout(body)):
        return await service.texts.call(handler, body, limits, tenant=tenant)


def _wanted_timeout(body: bytes) -> float | None:
    """The `request_timeout` of a body that is not decoded yet; decoding may have to wait, too."""
    found = _TIMEOUT.match(body, max(0, body.rfind(b'"request_timeout"')))
    return float(found[1]) if found else None


@asynccontextmanager
async def in_time(request: web.Request, wanted: float | None) -> AsyncIterator[None]:
    """Enforce the request's deadline on the `with` block, before there is a `Generation`.

    `wanted`: the client's `request_timeout` in seconds, or None. Raises DeadlinePassed when the
    deadline passes, RequestError if `wanted` exceeds the server's limit.
    """
    left = _deadline(request, wanted) - time.monotonic()
    try:
        async with asyncio.timeout(left):
            yield
    except TimeoutError:
        raise DeadlinePassed("the request ran out of time", wanted is not None) from None


async def begin(
    request: web.Request,
    fields: GenerationFields,
    prompts: list[tuple[int, ...]],
    *,
    names: Mapping[str, str],
    max_tokens: int | None,
    logprobs: int | None,
) -> Generation:
    """Check the request and create its `Generation`; `prompts` are the token ids.

    `names` maps the engine's field names to those of the route, for error messages. Raises APIError
    (404 for another model, 503 without an engine), RequestError for a request that can never be
    served, and TextUnavailable or DeadlinePassed.
    """
    try:
        return await _begin(request, fields, prompts, max_tokens, logprobs)
    except RequestError as error:
        if error.param not in names:
            raise
        raise RequestError(names[error.param], error.message) from None


async def _begin(
    request: web.Request,
    fields: GenerationFields,
    prompts: list[tuple[int, ...]],
    max_tokens: int | None,
    logprobs: int | None,
) -> Generation:
    service = request.app[SERVICE]
    service.check_model(fields.model)
    if (unavailable := service.no_engine()) is not None:
        raise unavailable
    caller = principal(request)
    job = Job(
        id=request[REQUEST_ID],
        prompts=prompts,
        sampling=fields.sampling(
            max_tokens=_room(service, max(map(len, prompts)), max_tokens), logprobs=logprobs
        ),
        speculation=fields.speculation_params(await _prediction(request, fields)),
        key=caller.name,
        cache_salt=_salt(caller.cache_salt, fields.cache_salt or ""),
        priority=fields.priority or 0,
        deadline=_deadline(request, fields.request_timeout),
        deadline_asked=fields.request_timeout is not None,
    )
    _check_prompts(service, job)  # before any prompt runs
    return Generation(service, job)


def _salt(of_key: str, of_request: str) -> str:
    """The salt for prefix cache and drafter tables; empty if neither part is given.

    What drafters learn from requests with an empty salt is used for all requests.
    """
    return f"{of_key}/{of_request}" if of_key or of_request else ""


async def _prediction(request: web.Request, fields: GenerationFields) -> tuple[int, ...]:
    if fields.prediction is None:
        return ()
    service = request.app[SERVICE]
    async with in_time(request, fields.request_timeout):
        return await service.texts.encode(
            fields.prediction.text,
            add_special=False,
            param="prediction",
            max_tokens=service.engine_info().limits.max_model_len,
            tenant=principal(request).name,
        )


def _room(service: Service, longest_prompt: int, wanted: int | None) -> int:
    """The limit on generated tokens: `wanted`, or else what the context and KV cache hold."""
    limit = service.config.server.max_output_tokens
    if wanted is not None:
        if limit is not None and wanted > limit:
            raise RequestError("max_tokens", f"{wanted} is more than this server gives ({limit})")
        return wanted
    engine = service.engine_info().limits
    # At least 1: `_check_prompts` refuses a prompt that leaves no room.
    room = max(1, min(engine.max_model_len, engine.num_kv_slots) - longest_prompt)
    return room if limit is None else min(room, limit)


def _deadline(request: web.Request, wanted: float | None) -> float:
    limit = request.app[SERVICE].config.server.request_timeout
    if wanted is not None and wanted > limit:
        raise RequestError(
            "request_timeout", f"{wanted} s is more than this server gives ({limit})"
        )
    return request[ARRIVED] + (limit if wanted is None else wanted)


def _check_prompts(service: Service, job: Job) -> None:
    longest, limits = service.config.server.max_prompt_tokens, service.engine_info().limits
    wanted, most = len(job.prompts) * job.sampling.n, service.admission.capacity
    if wanted > most:
        raise RequestError(
            "n" if job.sampling.n > 1 else "prompt",
            f"{wanted} sequences are more than this server ever holds ({most}); ask for fewer",
        )
    for ids in job.prompts:
        if longest is not None and len(ids) > longest:
            raise RequestError(
                "prompt", f"{len(ids)} tokens are more than this server takes ({longest})"
            )
        limits.check(Request("", ids, job.sampling, job.speculation))
