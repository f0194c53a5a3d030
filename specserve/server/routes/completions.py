"""POST /v1/completions"""

import asyncio

from aiohttp import web

from specserve.server.auth import Scope, principal, scope
from specserve.server.completion_format import CompletionFormat
from specserve.server.protocol.completions import (
    DEFAULT_MAX_TOKENS,
    Completion,
    CompletionRequest,
    Prompts,
)
from specserve.server.respond import respond
from specserve.server.routes.begin import begin, in_time, read
from specserve.server.service import SERVICE, Service
from specserve.server.text_worker import read_completion
from specserve.text import IncrementalDecoder


@scope(Scope.INFERENCE)
async def completions(request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    fields = await read(request, CompletionRequest, read_completion.__name__)
    given = fields.prompts()
    async with in_time(request, fields.request_timeout):
        prompts = await _encode(service, given, principal(request).name)
    generation = await begin(
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
    form = CompletionFormat(answer, fields, prompts, echoes, service.token_bytes)
    return await respond(request, fields, generation, form)


async def _encode(service: Service, given: Prompts, tenant: str) -> list[tuple[int, ...]]:
    room = service.engine_info().limits.max_model_len
    return [
        await service.texts.encode(prompt, max_tokens=room, tenant=tenant)
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
        decoder = IncrementalDecoder(service.tokenizer, skip_special=skip_special)
        echoes.append(decoder.feed(prompt))
        await asyncio.sleep(0)  # let other tasks run: there may be many long prompts
    return echoes
