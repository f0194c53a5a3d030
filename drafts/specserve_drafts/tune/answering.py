"""Answers many prompts with one engine, whose batch stays full until the last of them."""

import math
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from specserve.llm import LLM
from specserve.types import FinishReason, Prompt, Request, RequestError, SamplingParams, SpecStats

_AHEAD: Final = 4  # requests in the engine, running and waiting, as a multiple of its batch
_NUMBERS: Final = count()  # of requests


@dataclass(slots=True)
class Answer:
    id: str  # of the sequence, as observers of the engine see it
    prompt_ids: tuple[int, ...]
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stats: SpecStats = field(default_factory=SpecStats)
    error: str | None = None


def answer_all(
    llm: LLM,
    jobs: Iterable[tuple[Prompt, SamplingParams]],
    tick: Callable[[int], None],
    until: float = math.inf,
) -> Generator[Answer, None, None]:
    """Answer prompts, and yield the answers in their order. Nobody else may use the engine.

    `jobs` may be endless, and is read as there is room. `tick(num_tokens)` is called after every
    forward pass with the number of tokens that it emitted. At `until` (`time.monotonic()` seconds)
    no further job begins, and the unfinished answers end as they are, with finish_reason "abort".
    A refused job has an error and no tokens. Closing the generator ends everything.
    """
    engine, ahead = llm.engine, _AHEAD * llm.config.schedule.max_num_seqs
    waiting, running = deque[Answer](), dict[str, Answer]()
    more, todo = True, iter(jobs)
    try:
        while more or waiting:
            while more and len(waiting) < ahead:
                job = next(todo, None) if time.monotonic() < until else None
                if more := job is not None:
                    answer = _submit(llm, *job, until)
                    waiting.append(answer)
                    if answer.error is None:
                        running[answer.id] = answer
            if running:
                num_tokens = 0
                for output in engine.step():
                    answer = running[output.id]
                    answer.token_ids += output.ids
                    num_tokens += len(output.ids)
                    if output.finish is not None:
                        answer.finish_reason, answer.stats = (
                            output.finish,
                            output.stats or SpecStats(),
                        )
                        answer.error = output.error if output.finish == "error" else None
                        del running[output.id]
                tick(num_tokens)
            while waiting and waiting[0].finish_reason is not None:
                yield waiting.popleft()
    finally:
        for seq_id in running:
            engine.abort(seq_id)
        if running:
            engine.step()  # releases their KV


def _submit(llm: LLM, prompt: Prompt, sampling: SamplingParams, until: float) -> Answer:
    answer = Answer(f"tune-{next(_NUMBERS)}", ())
    try:
        answer.prompt_ids = llm.encode(prompt)
        sampling.validate(llm.engine.shape.vocab_size)
        deadline = None if until == math.inf else until
        llm.engine.submit(
            Request(
                answer.id,
                answer.prompt_ids,
                sampling,
                deadline=deadline,
                arrived_at=time.monotonic(),
            )
        )
    except RequestError as error:
        answer.finish_reason, answer.error = "error", str(error)
    return answer
