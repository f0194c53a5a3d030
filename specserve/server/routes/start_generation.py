"""Checks a generation request whose prompts are token ids, and creates its `GenerationRun`."""

import time

from aiohttp import web

from specserve.server.auth import PRINCIPAL
from specserve.server.deadline import deadline
from specserve.server.generation import GenerationRun
from specserve.server.protocol.chat import ChatRequest
from specserve.server.protocol.completions import CompletionRequest
from specserve.server.service import REQUEST_ID, SERVICE, Service
from specserve.types import Request, RequestError


async def start_generation(
    request: web.Request, fields: ChatRequest | CompletionRequest, prompts: list[tuple[int, ...]]
) -> GenerationRun:
    """Check the request and create its `GenerationRun`; `prompts` are the token ids.

    Raises APIError (404 for another model, 503 without an engine, 408 or 504 after the deadline),
    RequestError for a request that can never be served, and TokenizerUnavailable.
    """
    service = request.app[SERVICE]
    service.check_model(fields.model)
    if (unavailable := service.no_engine()) is not None:
        raise unavailable
    caller = request[PRINCIPAL]
    max_tokens = _max_new_tokens(service, max(map(len, prompts)), fields.requested_max_tokens)
    sampling = fields.sampling(
        service.engine_info().default_sampling,
        max_tokens=max_tokens,
        logprobs=fields.requested_logprobs,
    )
    until = deadline(request, fields.request_timeout)
    prediction: tuple[int, ...] = ()
    if fields.prediction is not None:
        async with until.enforced():
            prediction = await service.engine.tokenizer_pool.encode(
                fields.prediction.text,
                add_special=False,
                param="prediction",
                max_tokens=service.engine_info().limits.max_model_len,
                tenant=caller.name,
            )
    # What drafters learn from requests with an empty salt is used for all requests.
    salts = (caller.cache_salt, fields.cache_salt or "")
    salt = "/".join(salts) if any(salts) else ""
    requests = [
        Request(
            request[REQUEST_ID],
            ids,
            sampling,
            fields.speculation_params(prediction),
            until.at,
            fields.priority or 0,
            salt,
            time.monotonic(),
            caller.name,
        )
        for ids in prompts
    ]
    _check_requests(service, requests)  # before any prompt runs
    return GenerationRun(service, requests, until)


def _max_new_tokens(service: Service, longest_prompt: int, requested: int | None) -> int:
    """`requested`, or without it what the context and the KV cache hold beside the prompt.

    Raises RequestError if `requested` exceeds the server's limit.
    """
    limit = service.config.server.max_output_tokens
    if requested is not None:
        if limit is not None and requested > limit:
            raise RequestError("max_tokens", f"{requested} exceeds this server's limit of {limit}")
        return requested
    engine = service.engine_info().limits
    # At least 1: `_check_requests` refuses a prompt that leaves no room.
    room = max(1, min(engine.max_model_len, engine.num_kv_slots) - longest_prompt)
    return room if limit is None else min(room, limit)


def _check_requests(service: Service, requests: list[Request]) -> None:
    max_prompt, limits = service.config.server.max_prompt_tokens, service.engine_info().limits
    n, capacity = requests[0].sampling.n, service.admission.capacity
    prompt_lens = [len(each.prompt_ids) for each in requests for _ in range(n)]
    param = "n" if n > 1 else "prompt"
    if len(prompt_lens) > capacity:
        raise RequestError(
            param,
            f"{len(prompt_lens)} sequences exceed this server's limit of {capacity}; ask for fewer",
        )
    if not service.admission.can_hold(prompt_lens):
        raise RequestError(
            param,
            "the prompts of all sequences exceed this server's queue (max_queued_tokens "
            f"{service.admission.max_queued_tokens}); ask for fewer sequences",
        )
    for each in requests:
        num_prompt = len(each.prompt_ids)
        if max_prompt is not None and num_prompt > max_prompt:
            raise RequestError(
                "prompt", f"{num_prompt} tokens exceed this server's limit of {max_prompt}"
            )
        limits.check(each)
