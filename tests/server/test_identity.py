"""Same seed, same output: 32 concurrent requests over HTTP, and the offline API one by one."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest
from live import LiveServer, events, start_server

from specserve import LLM, SamplingParams

CHAT = "/v1/chat/completions"
COMPLETION = "/v1/completions"
SAMPLINGS = (
    SamplingParams(temperature=0.0, max_tokens=40),
    SamplingParams(temperature=0.8, top_p=0.9, max_tokens=32, logprobs=3),
    SamplingParams(temperature=1.2, top_k=20, max_tokens=40, ignore_eos=True),
    SamplingParams(min_p=0.05, max_tokens=24, n=2),
    SamplingParams(presence_penalty=0.5, frequency_penalty=0.3, repetition_penalty=1.1),
    SamplingParams(logit_bias={101: 2.0, 32: -3.0}, max_tokens=48),
    SamplingParams(temperature=0.5, stop=("e", "th"), max_tokens=60, min_tokens=4),
    SamplingParams(stop_token_ids=(97, 111), max_tokens=60, ignore_eos=True),
)
SPECULATIONS: tuple[dict[str, Any], ...] = (
    {},
    {"enabled": False},
    {"max_nodes": 2},
    {"max_nodes": 8},
    {"drafters": ["recycle"]},
)
Choice = tuple[tuple[int, ...], str, str]  # ids, text, finish_reason


@dataclass(frozen=True)
class Case:
    """The same request in both APIs."""

    text: str
    path: str
    stream: bool
    sampling: SamplingParams
    speculation: dict[str, Any]

    @property
    def offline_prompt(self) -> Any:
        return [{"role": "user", "content": self.text}] if self.path == CHAT else self.text

    def body(self) -> dict[str, Any]:
        fields = msgspec.to_builtins(self.sampling)
        body = {name: value for name, value in fields.items() if value not in (None, [], {})}
        body |= {"stream": self.stream}
        body |= {"return_token_ids": True, "speculation": self.speculation}
        if self.path == COMPLETION:
            return body | {"prompt": self.text}
        if self.sampling.logprobs is not None:
            body |= {"logprobs": True, "top_logprobs": self.sampling.logprobs}
        return body | {"messages": self.offline_prompt}


def cases(max_tokens: int = 10**6) -> list[Case]:
    """Every kind of sampling on both routes, streamed or not, each with its own prompt and seed."""
    return [
        Case(
            text=f"Question {index}: what is it that comes next? " * (1 + index % 4),
            path=path,
            stream=stream,
            sampling=msgspec.structs.replace(
                sampling, seed=1000 + index, max_tokens=min(sampling.max_tokens, max_tokens)
            ),
            speculation=SPECULATIONS[index % len(SPECULATIONS)],
        )
        for index, (sampling, path, stream) in enumerate(
            product(SAMPLINGS, (CHAT, COMPLETION), (False, True))
        )
    ]


def over_http(server: LiveServer, case: Case) -> list[Choice]:
    reply = server.ask(case.path, case.body(), timeout=300)
    assert reply.status == 200, reply
    messages = events(reply.body) if case.stream else [reply.json()]
    ids: dict[int, tuple[int, ...]] = {}
    texts: dict[int, str] = {}
    ends: dict[int, str] = {}
    for message in messages:
        for choice in message["choices"]:
            index, shown = choice["index"], choice.get("delta") or choice.get("message") or {}
            text = choice["text"] if "text" in choice else shown.get("content", "")
            texts[index] = texts.get(index, "") + text
            ids[index] = (*ids.get(index, ()), *choice.get("token_ids", ()))
            if choice["finish_reason"] is not None:
                ends[index] = choice["finish_reason"]
    return [(ids[index], texts[index], ends[index]) for index in sorted(ids)]


def offline(llm: LLM, case: Case) -> list[Choice]:
    (generation,) = llm.generate([case.offline_prompt], case.sampling)
    return [
        (completion.token_ids, completion.text, completion.finish_reason)
        for completion in generation.completions
    ]


def all_at_once(server: LiveServer, asked: list[Case]) -> list[list[Choice]]:
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda case: over_http(server, case), asked))


def test_32_concurrent_requests_equal_single_and_offline_ones(
    live_server: LiveServer, chat_model: Path
) -> None:
    """Offline without speculation: the output depends on the seed only."""
    asked = cases()
    assert len(asked) == 32
    served = all_at_once(live_server, asked)
    llm = LLM(str(chat_model), draft="none", dtype="float32", device="cpu", kv_memory="4MiB")
    for case, choices in zip(asked, served, strict=True):
        assert choices == offline(llm, case), case
    assert {end for choices in served for *_, end in choices} == {"stop", "length"}


def test_request_ids_may_come_twice(live_server: LiveServer) -> None:
    """For example after a retry by a proxy."""
    headers = {"X-Request-Id": "not-so-unique"}
    body = {"prompt": "x", "max_tokens": 200, "ignore_eos": True, "seed": 1}
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(live_server.ask, COMPLETION, body, headers=headers) for _ in range(4)]
        replies = [each.result() for each in asked]
    assert [reply.status for reply in replies] == [200] * 4
    assert len({reply.json()["choices"][0]["text"] for reply in replies}) == 1


@pytest.mark.slow
def test_identity_with_a_real_model() -> None:
    asked = cases(max_tokens=12)[::4]
    assert len(asked) == 8
    model = Path("smollm2-135m")  # an alias
    with start_server(model, "--kv-memory", "256MiB", "--threads", "2") as server:
        served = all_at_once(server, asked)
    llm = LLM("smollm2-135m", draft="none", dtype="float32", device="cpu", kv_memory="256MiB")
    for case, choices in zip(asked, served, strict=True):
        assert choices == offline(llm, case), case
