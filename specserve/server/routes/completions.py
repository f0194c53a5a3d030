"""POST /v1/completions"""

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
from specserve.text import IncrementalDecoder


@scope(Scope.INFERENCE)
async def completions(request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    fields = await read(request, CompletionRequest)
    fields.check()
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
    echoes = [p if isinstance(p, str) else _text(service, fields, p) for p in given]
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


def _text(service: Service, fields: CompletionRequest, prompt: tuple[int, ...]) -> str:
    """Of a prompt given as ids; a character that it leaves open is the completion's."""
    skip_special = fields.skip_special_tokens is not False
    return IncrementalDecoder(service.tokenizer, skip_special=skip_special).feed(prompt)
