"""POST /tokenize and /detokenize"""

from aiohttp import web
from msgspec import UNSET

from specserve.server.auth import Scope, principal, scope
from specserve.server.protocol.others import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from specserve.server.routes.begin import in_time, read
from specserve.server.routes.reply import reply
from specserve.server.service import SERVICE
from specserve.types import RequestError


@scope(Scope.INFERENCE)
async def tokenize(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    fields = await read(request, TokenizeRequest)
    service.check_model(fields.model)
    if (fields.prompt is None) == (fields.messages is None):
        raise RequestError("prompt", "send exactly one of prompt and messages")
    tenant = principal(request).name
    async with in_time(request, None):
        if fields.messages is not None:
            tokens = await service.texts.chat(
                fields.messages,
                add_generation_prompt=fields.add_generation_prompt
                and not fields.continue_final_message,
                continue_final_message=fields.continue_final_message,
                tenant=tenant,
            )
        else:
            assert fields.prompt is not None
            tokens = await service.texts.encode(
                fields.prompt, add_special=fields.add_special_tokens, tenant=tenant
            )
    spelled = tuple(map(service.token_bytes.text, tokens)) if fields.return_token_strs else UNSET
    return reply(
        TokenizeResponse(
            count=len(tokens),
            max_model_len=service.engine_info().limits.max_model_len,
            tokens=tokens,
            token_strs=spelled,
        )
    )


@scope(Scope.INFERENCE)
async def detokenize(request: web.Request) -> web.Response:
    service = request.app[SERVICE]
    fields = await read(request, DetokenizeRequest)
    service.check_model(fields.model)
    vocab_size = service.engine_info().limits.vocab_size
    for index, token in enumerate(fields.tokens):
        if token >= vocab_size:
            raise RequestError(
                f"tokens[{index}]", f"{token} is not in the vocabulary of {vocab_size}"
            )
    return reply(DetokenizeResponse(service.tokenizer.decode(fields.tokens, skip_special=False)))
