"""POST /v1/completions"""

import asyncio
import time

from aiohttp import web

from specserve.server.auth import PRINCIPAL
from specserve.server.completion_formatter import CompletionFormatter
from specserve.server.deadline import deadline
from specserve.server.protocol.completions import Completion, CompletionRequest, Prompts
from specserve.server.routes.read_request import read_request
from specserve.server.routes.start_generation import start_generation
from specserve.server.send_response import send_response
from specserve.server.service import SERVICE, Service
from specserve.server.tokenizer_worker import read_completion
from specserve.text import IncrementalDecoder


async def completions(request: web.Request) -> web.StreamResponse:
    service = request.app[SERVICE]
    fields = await read_request(request, CompletionRequest, read_completion.__name__)
    given = fields.prompts()
    pool, tenant = service.engine.tokenizer_pool, request[PRINCIPAL].name
    async with deadline(request, fields.request_timeout).enforced():
        max_tokens = service.engine_info().limits.max_model_len
        prompts = [
            await pool.encode(prompt, max_tokens=max_tokens, tenant=tenant)
            if isinstance(prompt, str)
            else prompt
            for prompt in given
        ]
    generation = await start_generation(request, fields, prompts)
    answer = Completion(
        id=f"cmpl-{generation.id}",
        created=int(time.time()),
        model=service.model_name,
        choices=(),
    )
    echoes = await _echoes(service, fields, given) if fields.echo else [""] * len(prompts)
    formatter = CompletionFormatter(answer, fields, prompts, echoes, service.token_bytes)
    return await send_response(request, generation, formatter)


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
