"""POST /tokenize and /detokenize: a tokenizer process decodes the request and writes the answer."""

import msgspec
from aiohttp import web

from specserve.server.routes.read_request import call_tokenizer_process, read_bytes
from specserve.server.service import SERVICE
from specserve.server.tokenizer_worker import Answer, detokenize_body, tokenize_body


async def tokenize(request: web.Request) -> web.Response:
    return await _answer(request, tokenize_body.__name__)


async def detokenize(request: web.Request) -> web.Response:
    return await _answer(request, detokenize_body.__name__)


async def _answer(request: web.Request, handler: str) -> web.Response:
    data = await call_tokenizer_process(request, handler, await read_bytes(request))
    answer = msgspec.msgpack.decode(data, type=Answer)
    request.app[SERVICE].check_model(answer.model)
    return web.Response(body=answer.body, content_type="application/json")
