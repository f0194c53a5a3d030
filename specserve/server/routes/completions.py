"""POST /v1/completions"""

import asyncio

from aiohttp import web

from specserve.server.auth import Scope, principal, scope
from specserve.server.completion_formatter import CompletionFormatter
from specserve.server.protocol.completions import (
    DEFAULT_MAX_TOKENS,
    Completion,
    CompletionRequest,
    Prompts,
)
from specserve.server.routes.deadline import within_deadline
from specserve.server.routes.read_request import read_request
from specserve.server.routes.start_generation import start_generation
from specserve.server.send_response import send_response
from specserve.server.service import SERVICE, Service
from specserve.server.tokenizer_worker import read_completion
from specserve.text import IncrementalDecoder


@scope(Scope.INFERENCE)
async def completions(request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    fields = await read_request(request, CompletionRequest, read_completion.__name__)
    given = fields.prompts()
    async with within_deadline(request, fields.request_timeout):
        prompts = await _encode(service, given, principal(request).name)
    generation = await start_generation(
        request,
        fields,
        prompts,
        names={},
        max_tokens=fields.max_tokens or DEFAULT_MAX_TOKENS,
        logprobs=fields.logprobs,
    )
    answer = Completion(
        id=f"cmpl-{generation.job.id}", created=service.now(), model=service.model_name, choices=()
    )
    echoes = await _echoes(service, fields, given) if fields.echo else []
    formatter = CompletionFormatter(answer, fields, prompts, echoes, service.token_bytes)
    return await send_response(request, fields, generation, formatter)


async def _encode(service: Service, given: Prompts, tenant: str) -> list[tuple[int, ...]]:
    max_tokens = service.engine_info().limits.max_model_len
    return [
        await service.engine.tokenizer_pool.encode(prompt, max_tokens=max_tokens, tenant=tenant)
        if isinstance(prompt, str)
        else prompt
        for prompt in given
    ]


async def _echoes(service: Service, fields: CompletionRequest, given: Prompts) -> list[str]:
    """The prompts as text. Token ids are decoded without an incomplete last character, which
    belongs to the completion."""
    echoes = []
    for prompt in given:
        if isinstance(prompt, str):
            echoes.append(prompt)
            continue
        skip_special = fields.skip_special_tokens is not False
        decoder = IncrementalDecoder(service.engine.tokenizer, skip_special=skip_special)
        echoes.append(decoder.feed(prompt))
        await asyncio.sleep(0)  # let other tasks run: there may be many long prompts
    return echoes
