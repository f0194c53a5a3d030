"""Our own clients against a real server, whose answers equal those of the offline engine."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import MODEL, LiveServer
from msgspec.structs import replace

from specserve import LLM, AsyncClient, Client, SamplingParams
from specserve.client import BadRequest, NotFound
from specserve.client.types import PREDICTION_ID, Choice, Completion

HELLO = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi, hi, hi."}]
SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "max_tokens": 40}
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 60, "ignore_eos": True}


@pytest.fixture(scope="module")
def offline(chat_model: Path) -> LLM:
    return LLM(str(chat_model), dtype="float32", device="cpu", kv_memory="4MiB")


@pytest.fixture
def client(live_server: LiveServer) -> Iterator[Client]:
    with Client(live_server.url, max_retries=0) as client:
        yield client


def test_a_completion_equals_the_offline_one(client: Client, offline: LLM) -> None:
    prompt = "Say ab ab ab"
    sampling = SamplingParams(temperature=1.0, top_p=0.9, seed=7, max_tokens=40, n=2, logprobs=2)
    (expected,) = offline.generate([prompt], sampling)
    answer = client.complete(prompt, **SAMPLED, n=2, logprobs=2)
    assert answer.model == MODEL
    assert answer.prompt_ids == expected.prompt_ids
    assert [c.token_ids for c in answer.choices] == [c.token_ids for c in expected.completions]
    assert [c.text for c in answer.choices] == [c.text for c in expected.completions]
    assert answer.finish_reason == expected.finish_reason
    assert answer.logprobs is not None
    assert expected.logprobs is not None
    assert [each.logprob for each in answer.logprobs] == pytest.approx(
        [each.logprob for each in expected.logprobs]
    )
    num_tokens = sum(len(choice.token_ids) for choice in answer.choices)
    assert answer.usage.prompt_tokens == len(expected.prompt_ids)
    assert answer.usage.completion_tokens == num_tokens
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + num_tokens


def test_a_prompt_of_token_ids(client: Client) -> None:
    ids = client.tokenize("Say ab ab ab")
    from_ids, from_text = (client.complete(prompt, **GREEDY) for prompt in (ids, "Say ab ab ab"))
    assert from_ids.token_ids == from_text.token_ids
    assert client.detokenize(ids) == "Say ab ab ab"


def test_a_chat_equals_the_offline_one_and_reports_usage(client: Client, offline: LLM) -> None:
    sampling = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    (expected,) = offline.generate([HELLO], sampling)
    answer = client.chat(HELLO, **GREEDY)
    assert (answer.text, answer.token_ids) == (expected.text, expected.token_ids)
    assert answer.prompt_ids == client.tokenize(HELLO) == expected.prompt_ids
    assert len(answer.drafter_ids) == len(answer.token_ids) == 60
    speculation = answer.stats.speculative_decoding
    assert speculation is not None
    assert speculation.num_accepted_draft_tokens == sum(map(bool, answer.drafter_ids))
    assert sum(speculation.acceptance_histogram) == speculation.num_spec_steps
    assert answer.stats.time_to_first_token_ms is not None
    assert answer.stats.tokens_per_second is not None


def said(answer: Completion) -> list[Choice]:
    """The parts of an answer that are always the same; drafter ids may change."""
    return [replace(choice, drafter_ids=()) for choice in answer.choices]


def test_a_stream_equals_the_single_response(client: Client) -> None:
    whole = client.chat(HELLO, **SAMPLED, n=2, logprobs=1)
    with client.stream_chat(HELLO, **SAMPLED, n=2, logprobs=1) as stream:
        deltas = list(stream)
    result = stream.result()
    assert said(result) == said(whole)
    assert result.prompt_ids == whole.prompt_ids
    assert result.usage.completion_tokens == whole.usage.completion_tokens
    assert deltas[-1].usage == result.usage
    assert deltas[-1].stats == result.stats
    assert all(delta.usage is None for delta in deltas[:-1])
    for choice in whole.choices:
        own = [delta for delta in deltas if delta.index == choice.index]
        assert "".join(delta.text for delta in own) == choice.text
        assert all(len(d.drafter_ids) == len(d.token_ids) == len(d.logprobs) for d in own)
    completion = client.stream("ab ab", **SAMPLED).result()
    assert said(completion) == said(client.complete("ab ab", **SAMPLED))


def test_token_bytes_join_to_the_text(client: Client) -> None:
    answer = client.chat(HELLO, **GREEDY, logprobs=0)
    assert answer.logprobs is not None
    spelled = b"".join(each.raw or b"" for each in answer.logprobs)
    assert spelled.decode(errors="replace") == answer.text


def test_speculation_does_not_change_the_output(client: Client) -> None:
    plain = client.complete("ab ab ab", **GREEDY, speculation={"enabled": False})
    assert set(plain.drafter_ids) == {0}
    speculation = plain.stats.speculative_decoding
    assert speculation is not None
    assert speculation.num_draft_tokens == 0
    expected = client.complete("ab ab ab", **GREEDY, prediction=plain.text)
    assert expected.token_ids == plain.token_ids
    (first, *_) = client.speculation().drafters
    drafted = client.complete("ab ab ab", **GREEDY, speculation={"drafters": [first]})
    assert drafted.token_ids == plain.token_ids
    assert set(drafted.drafter_ids) == {0, 1}


def test_a_matching_prediction_is_counted(client: Client) -> None:
    text = "".join(f"[{i}]" for i in range(40))
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 20, "logit_bias": {ord("["): 100}}
    answer = client.complete(text, **options, prediction="[" * 40)
    plain = client.complete(text, **options, speculation={"enabled": False})
    assert answer.text == plain.text
    assert PREDICTION_ID in answer.drafter_ids
    assert answer.usage.accepted_prediction_tokens == 20
    assert answer.usage.rejected_prediction_tokens == 20
    assert plain.usage.accepted_prediction_tokens == 0


def test_stop_reason(client: Client) -> None:
    text = client.complete("ab", **GREEDY).text
    stop = text[5:8]
    stopped = client.complete("ab", **GREEDY, stop=stop)
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", stop)
    assert stopped.text == text[: text.index(stop)]


def test_small_routes(client: Client) -> None:
    (model,) = client.models()
    assert (model.id, model.max_model_len) == (MODEL, 512)
    assert client.health()
    assert client.ready()
    assert client.version()
    report = client.speculation()
    assert [each.name for each in report.by_drafter] == [*report.drafters, "prediction"]
    assert "vllm:num_requests_running" in client.metrics()


def test_errors_name_the_field(client: Client) -> None:
    with pytest.raises(BadRequest) as caught:
        client.chat(HELLO, temperature=9)
    assert caught.value.param == "temperature"
    assert caught.value.request_id
    with pytest.raises(BadRequest) as caught:
        client.stream("x", n=0).result()
    assert caught.value.param == "n"
    with pytest.raises(NotFound):
        client.complete("x", model="another")


def test_closing_a_stream_early_stops_generation(client: Client, live_server: LiveServer) -> None:
    before = live_server.metric("vllm:generation_tokens_total")
    for delta in client.stream("x", max_tokens=400, ignore_eos=True):
        if delta.token_ids:
            break
    live_server.wait_until_idle()
    assert 0 < live_server.metric("vllm:generation_tokens_total") - before < 400


def test_concurrent_requests_equal_single_ones(live_server: LiveServer, offline: LLM) -> None:
    prompts = [f"prompt {i} of {i % 5}" for i in range(24)]
    sampling = [SamplingParams(temperature=1.0, seed=i, max_tokens=24) for i in range(24)]
    expected = [generation.token_ids for generation in offline.generate(prompts, sampling)]

    async def ask() -> list[tuple[int, ...]]:
        async with AsyncClient(live_server.url) as client:
            streams = [
                client.stream(prompt, temperature=1.0, seed=i, max_tokens=24)
                for i, prompt in enumerate(prompts)
            ]
            answers = await asyncio.gather(*(stream.result() for stream in streams))
        return [answer.token_ids for answer in answers]

    assert asyncio.run(ask()) == expected


def test_the_chat_command(client: Client, live_server: LiveServer) -> None:
    options: dict[str, Any] = {"temperature": 0.0, "max_tokens": 30}
    first = client.chat("one", **options).text
    turns = [("user", "one"), ("assistant", first), ("user", "two")]
    second = client.chat([{"role": r, "content": c} for r, c in turns], **options).text
    line = ["chat", live_server.url, "--temperature", "0", "--max-tokens", "30"]
    done = subprocess.run(
        [sys.executable, "-m", "specserve.cli", *line],
        input=b"one\ntwo\n/stats\n",
        capture_output=True,
        timeout=60,
        check=False,
        env=os.environ | {"PYTHONUTF8": "1"},
    )
    assert (done.returncode, done.stdout.decode()) == (0, f"{first}\n{second}\n")
    assert b"tokens/s" in done.stderr
