"""POST /v1/chat/completions"""

import time

from aiohttp import web

from specserve.server.auth import PRINCIPAL
from specserve.server.chat_formatter import ChatFormatter
from specserve.server.deadline import deadline
from specserve.server.protocol.chat import ChatChunk, ChatRequest
from specserve.server.routes.read_request import read_request
from specserve.server.routes.start_generation import start_generation
from specserve.server.send_response import send_response
from specserve.server.service import SERVICE
from specserve.server.tokenizer_worker import read_chat
from specserve.types import RequestError


async def chat_completions(request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    fields = await read_request(request, ChatRequest, read_chat.__name__)
    continues, generates = bool(fields.continue_final_message), fields.add_generation_prompt
    try:
        async with deadline(request, fields.request_timeout).enforced():
            prompt = await service.engine.tokenizer_pool.chat(
                fields.messages,
                add_generation_prompt=not continues if generates is None else generates,
                continue_final_message=continues,
                tools=fields.tools or (),
                template_kwargs=fields.template_kwargs,
                max_tokens=service.engine_info().limits.max_model_len,
                tenant=request[PRINCIPAL].name,
            )
        generation = await start_generation(request, fields, [prompt])
    except RequestError as error:
        raise fields.renamed(error) from None
    answer = ChatChunk(
        id=f"chatcmpl-{generation.id}",
        created=int(time.time()),
        model=service.model_name,
        choices=(),
    )
    formatter = ChatFormatter(answer, fields, prompt, service.token_bytes)
    return await send_response(request, generation, formatter)
