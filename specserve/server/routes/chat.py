"""POST /v1/chat/completions"""

from aiohttp import web

from specserve.server.auth import Scope, principal, scope
from specserve.server.chat_formatter import ChatFormatter
from specserve.server.protocol.chat import ChatChunk, ChatRequest
from specserve.server.routes.deadline import within_deadline
from specserve.server.routes.read_request import read_request
from specserve.server.routes.start_generation import start_generation
from specserve.server.send_response import send_response
from specserve.server.service import SERVICE
from specserve.server.tokenizer_worker import read_chat


@scope(Scope.INFERENCE)
async def chat_completions(request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    fields = await read_request(request, ChatRequest, read_chat.__name__)
    continues = bool(fields.continue_final_message)
    async with within_deadline(request, fields.request_timeout):
        prompt = await service.engine.tokenizer_pool.chat(
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
    generation = await start_generation(
        request,
        fields,
        [prompt],
        names=fields.names,
        max_tokens=fields.requested_max_tokens,
        logprobs=fields.requested_logprobs,
    )
    answer = ChatChunk(
        id=f"chatcmpl-{generation.job.id}",
        created=service.now(),
        model=service.model_name,
        choices=(),
    )
    formatter = ChatFormatter(answer, fields, prompt, service.token_bytes)
    return await send_response(request, fields, generation, formatter)
