"""POST /v1/chat/completions"""

from aiohttp import web

from specserve.server.auth import Scope, principal, scope
from specserve.server.chat_format import ChatFormat
from specserve.server.protocol.chat import ChatChunk, ChatRequest
from specserve.server.respond import respond
from specserve.server.routes.begin import begin, in_time, read
from specserve.server.service import SERVICE
from specserve.server.text_worker import read_chat


@scope(Scope.INFERENCE)
async def chat_completions(request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    fields = await read(request, ChatRequest, read_chat.__name__)
    continues = bool(fields.continue_final_message)
    async with in_time(request, fields.request_timeout):
        prompt = await service.texts.chat(
            fields.messages,
            add_generation_prompt=(
                not continues
                if fields.add_generation_prompt is None
                else fields.add_generation_prompt
            ),
            continue_final_message=continues,
            max_tokens=service.engine_info().limits.max_model_len,
            tenant=principal(request).name,
        )
    generation = await begin(
        request,
        fields,
        [prompt],
        names=fields.names,
        max_tokens=fields.wanted_tokens,
        logprobs=fields.wanted_logprobs,
    )
    answer = ChatChunk(
        id=f"chatcmpl-{generation.job.id}",
        created=service.now(),
        model=service.model_name,
        choices=(),
    )
    form = ChatFormat(answer, fields, prompt, service.token_bytes)
    return await respond(request, fields, generation, form)
