"""POST /v1/completions"""

import asyncio
import time
from typing import Final

from aiohttp import web

from specserve.server.auth import PRINCIPAL
from specserve.server.completion_formatter import CompletionFormatter, Echo
from specserve.server.deadline import deadline
from specserve.server.protocol.completions import Completion, CompletionRequest, Prompts
from specserve.server.routes.read_request import read_request
from specserve.server.routes.start_generation import start_generation
from specserve.server.send_response import send_response
from specserve.server.service import SERVICE, Service
from specserve.server.tokenizer_worker import read_completion
from specserve.text import IncrementalDecoder

_IDS_AT_ONCE: Final = 1024  # token ids decoded before other tasks get their turn


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
    echoes = await _echoes(service, fields, given, prompts)
    formatter = CompletionFormatter(answer, fields, prompts, echoes, service.token_bytes)
    return await send_response(request, generation, formatter)


async def _echoes(
    service: Service, fields: CompletionRequest, given: Prompts, prompts: list[tuple[int, ...]]
) -> list[Echo]:
    """What `echo` puts before each answer. `given` are the prompts, `prompts` their token ids.

    A text is returned as it is, but with `logprobs` the text of its tokens, to which their offsets
    belong. Token ids are decoded without an incomplete last character, which belongs to the
    completion.
    """
    if not fields.echo:
        return [Echo()] * len(prompts)
    echoes = []
    for text, ids in zip(given, prompts, strict=True):
        if isinstance(text, str) and fields.logprobs is None:
            echoes.append(Echo(text))
            continue
        skip_special = fields.skip_special_tokens is not False
        decoder = IncrementalDecoder(service.engine.tokenizer, skip_special=skip_special)
        parts, offsets, length = [], [], 0
        for start in range(0, len(ids), _IDS_AT_ONCE):
            for index in ids[start : start + _IDS_AT_ONCE]:
                offsets.append(length + decoder.num_replacements_before(index))
                parts.append(decoder.feed((index,)))
                length += len(parts[-1])
            await asyncio.sleep(0)  # let other tasks run: there may be many long prompts
        echoes.append(Echo("".join(parts), tuple(min(offset, length) for offset in offsets)))
    return echoes
