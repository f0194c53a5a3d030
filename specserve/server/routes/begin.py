"""What both generating routes do first: read the body, check it, make a `Generation` of it."""

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

_READ_HERE: Final = 2**15  # bytes; 10 ms if each is a JSON value

_TIMEOUT: Final = re.compile(rb'"request_timeout"\s*:\s*([0-9]{1,9}(?:\.[0-9]{1,9})?)[\s,}]')

T = TypeVar("T", bound=GenerationFields)


async def read(request: web.Request, request_type: type[T], handler: str) -> T:
    """The body as a request. Raises APIError or RequestError.

    A long one is read by the text workers' `handler`: in the event loop it would hold up everybody.
    """
    body = await read_bytes(request)
    if len(body) <= _READ_HERE:
        fields = decode(body, request_type)
        fields.check()
        return fields
    data = await call_text_worker(request, handler, body)
    return msgspec.msgpack.decode(data, type=request_type)


async def read_bytes(request: web.Request) -> bytes:
    """The body. Raises APIError."""
    config = request.app[SERVICE].config.server
    limit = parse_bytes("max_body_bytes", config.max_body_bytes)
    return await read_body(request, limit, config.body_timeout, request[BODY].take)


async def call_text_worker(request: web.Request, handler: str, body: bytes) -> bytes:
    """What the text workers' handler makes of the body. Raises APIError, RequestError,
    TextUnavailable or DeadlinePassed."""
    service = request.app[SERVICE]
    limits, tenant = service.engine_info().limits, principal(request).name
    async with in_time(request, _wanted_timeout(body)):
        return await service.texts.call(handler, body, limits, tenant=tenant)


def _wanted_timeout(body: bytes) -> float | None:
    """The `request_timeout` of a body that nobody has read yet: it may have to wait for that."""
    found = _TIMEOUT.match(body, max(0, body.rfind(b'"request_timeout"')))
    return float(found[1]) if found else None


@asynccontextmanager
async def in_time(request: web.Request, wanted: float | None) -> AsyncIterator[None]:
    """Around what a request waits for before it is a `Generation`, which keeps its own deadline.

    `wanted`: what the caller gives it, in seconds. Raises DeadlinePassed.
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
    """`names` are the route's own for fields that the engine calls otherwise.

    Raises APIError while nothing can be served, RequestError for what never can.
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
    _check_prompts(service, job)  # before any of them runs
    return Generation(service, job)


def _salt(of_key: str, of_request: str) -> str:
    """Nothing without either: what such requests teach drafters is there for all."""
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
    """Tokens to generate at most: what was asked for, or else what fits."""
    limit = service.config.server.max_output_tokens
    if wanted is not None:
        if limit is not None and wanted > limit:
            raise RequestError("max_tokens", f"{wanted} is more than this server gives ({limit})")
        return wanted
    engine = service.engine_info().limits
    # A prompt that leaves no room is refused below, in the engine's words.
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
