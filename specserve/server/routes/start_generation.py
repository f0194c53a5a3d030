"""Checks a generation request whose prompts are token ids, and creates its `GenerationRun`."""

from collections.abc import Mapping

from aiohttp import web

from specserve.server.auth import principal
from specserve.server.generation import GenerationJob, GenerationRun
from specserve.server.protocol.fields import GenerationFields
from specserve.server.routes.deadline import deadline, within_deadline
from specserve.server.service import REQUEST_ID, SERVICE, Service
from specserve.types import Request, RequestError


async def start_generation(
    request: web.Request,
    fields: GenerationFields,
    prompts: list[tuple[int, ...]],
    *,
    names: Mapping[str, str],
    max_tokens: int | None,
    logprobs: int | None,
) -> GenerationRun:
    """Check the request and create its `GenerationRun`; `prompts` are the token ids.

    `names` maps the engine's field names to those of the route, for error messages. Raises APIError
    (404 for another model, 503 without an engine), RequestError for a request that can never be
    served, and TokenizerUnavailable or DeadlineExceeded.
    """
    try:
        return await _start(request, fields, prompts, max_tokens, logprobs)
    except RequestError as error:
        if error.param not in names:
            raise
        raise RequestError(names[error.param], error.message) from None


async def _start(
    request: web.Request,
    fields: GenerationFields,
    prompts: list[tuple[int, ...]],
    max_tokens: int | None,
    logprobs: int | None,
) -> GenerationRun:
    service = request.app[SERVICE]
    service.check_model(fields.model)
    if (unavailable := service.no_engine()) is not None:
        raise unavailable
    caller = principal(request)
    max_tokens = _max_new_tokens(service, max(map(len, prompts)), max_tokens)
    job = GenerationJob(
        id=request[REQUEST_ID],
        prompts=prompts,
        sampling=fields.sampling(max_tokens=max_tokens, logprobs=logprobs),
        speculation=fields.speculation_params(await _prediction(request, fields)),
        key=caller.name,
        cache_salt=_join_salts(caller.cache_salt, fields.cache_salt or ""),
        priority=fields.priority or 0,
        deadline=deadline(request, fields.request_timeout),
        deadline_by_client=fields.request_timeout is not None,
    )
    _check_prompts(service, job)  # before any prompt runs
    return GenerationRun(service, job)


def _join_salts(of_key: str, of_request: str) -> str:
    """The salt for prefix cache and drafter tables; empty if neither part is given.

    What drafters learn from requests with an empty salt is used for all requests.
    """
    return f"{of_key}/{of_request}" if of_key or of_request else ""


async def _prediction(request: web.Request, fields: GenerationFields) -> tuple[int, ...]:
    if fields.prediction is None:
        return ()
    service = request.app[SERVICE]
    async with within_deadline(request, fields.request_timeout):
        return await service.engine.tokenizer_pool.encode(
            fields.prediction.text,
            add_special=False,
            param="prediction",
            max_tokens=service.engine_info().limits.max_model_len,
            tenant=principal(request).name,
        )


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
    # At least 1: `_check_prompts` refuses a prompt that leaves no room.
    room = max(1, min(engine.max_model_len, engine.num_kv_slots) - longest_prompt)
    return room if limit is None else min(room, limit)


def _check_prompts(service: Service, job: GenerationJob) -> None:
    max_prompt, limits = service.config.server.max_prompt_tokens, service.engine_info().limits
    num_sequences, capacity = len(job.prompts) * job.sampling.n, service.admission.capacity
    if num_sequences > capacity:
        raise RequestError(
            "n" if job.sampling.n > 1 else "prompt",
            f"{num_sequences} sequences exceed this server's limit of {capacity}; ask for fewer",
        )
    prompt_lens = [len(ids) for ids in job.prompts for _ in range(job.sampling.n)]
    if not service.admission.can_hold(prompt_lens):
        raise RequestError(
            "n" if job.sampling.n > 1 else "prompt",
            "the prompts of all sequences exceed this server's queue (max_queued_tokens "
            f"{service.admission.max_queued_tokens}); ask for fewer sequences",
        )
    for ids in job.prompts:
        if max_prompt is not None and len(ids) > max_prompt:
            raise RequestError(
                "prompt", f"{len(ids)} tokens exceed this server's limit of {max_prompt}"
            )
        limits.check(Request("", ids, job.sampling, job.speculation))
