"""The official OpenAI client, unchanged, against a real server."""

import asyncio

import openai
import pytest
from live import MODEL, LiveServer
from openai import AsyncOpenAI, OpenAI
from openai.types.chat import ChatCompletionMessageParam

HELLO: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Say something."}]


@pytest.fixture
def client(live_server: LiveServer) -> OpenAI:
    return OpenAI(base_url=f"{live_server.url}/v1", api_key="none", max_retries=0)


def test_models(client: OpenAI) -> None:
    (model,) = client.models.list().data
    assert model.id == MODEL
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_a_chat(client: OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=12, seed=1)
    (choice,) = answer.choices
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12


def test_a_stream_equals_the_single_response(client: OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=60, seed=2)
    chunks = list(
        client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            max_tokens=60,
            seed=2,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[-1] == whole.choices[0].finish_reason
    assert set(reasons[:-1]) == {None}
    assert chunks[-1].choices == []
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_same_seed_gives_the_same_text(client: OpenAI) -> None:
    def text(seed: int | None) -> str | None:
        answer = client.chat.completions.create(
            model=MODEL, messages=HELLO, max_tokens=40, seed=seed, temperature=1.0
        )
        return answer.choices[0].message.content

    assert text(5) == text(5)
    assert text(5) != text(6)
    assert text(None) != text(None)


def test_several_choices(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=20, n=3, seed=3, temperature=1.0
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) == 3
    alone = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=20, seed=3, temperature=1.0
    )
    assert alone.choices[0].message.content == answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 60
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=20, n=3, seed=3, temperature=1.0, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == [choice.message.content for choice in answer.choices]


def test_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=HELLO, max_tokens=10, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert len(logprobs.content) == 10
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob <= 0  # greedy takes the best
    spelled = b"".join(bytes(entry.bytes or []) for entry in logprobs.content)
    assert spelled.decode(errors="replace") == answer.choices[0].message.content


def test_logprobs_of_completions(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="abc", max_tokens=8, temperature=0, logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.top_logprobs is not None
    assert logprobs.text_offset is not None
    assert len(logprobs.tokens) == len(logprobs.token_logprobs or []) == 8
    assert all(len(top) == 2 for top in logprobs.top_logprobs)
    assert logprobs.text_offset[1] == len(logprobs.tokens[0])


def test_a_stop_string_ends_the_text(client: OpenAI) -> None:
    whole = client.completions.create(model=MODEL, prompt="q", max_tokens=60, seed=4)
    text = whole.choices[0].text
    stop = text[20:23]
    cut = client.completions.create(model=MODEL, prompt="q", max_tokens=60, seed=4, stop=stop)
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == text[: text.index(stop)]
    pieces = client.completions.create(
        model=MODEL, prompt="q", max_tokens=60, seed=4, stop=[stop, "never there"], stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in pieces) == cut.choices[0].text


def test_completions_of_several_prompts_with_echo(client: OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=["one", "two"], n=2, max_tokens=6, echo=True, seed=9, temperature=1.0
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text[:3] for choice in answer.choices] == ["one", "one", "two", "two"]
    ids = client.completions.create(model=MODEL, prompt=[[111, 110, 101]], max_tokens=6, seed=9)
    assert "one" + ids.choices[0].text == answer.choices[0].text


def test_raw_responses(client: OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=3,
        extra_headers={"X-Request-Id": "my-own-id"},
    )
    assert raw.headers["x-request-id"] == "my-own-id"
    assert raw.headers["content-type"].startswith("application/json")
    assert len(raw.parse().choices) == 1


def test_a_refused_request_names_its_field(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=HELLO, temperature=3)
    assert caught.value.param == "temperature"
    assert caught.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model=MODEL,
            messages=HELLO,
            tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}],
        )
    assert caught.value.param == "tools"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=HELLO)
    assert missing.value.code == "model_not_found"


def test_an_answer_can_be_sent_back(client: OpenAI) -> None:
    first = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=5, seed=1)
    history = [*HELLO, first.choices[0].message, {"role": "user", "content": "And?"}]
    second = client.chat.completions.create(model=MODEL, messages=history, max_tokens=5)  # type: ignore[arg-type]
    assert second.choices[0].message.content is not None


def test_extensions_pass_through_extra_body(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=16,
        seed=1,
        prediction={"type": "content", "content": "whatever"},
        extra_body={
            "return_token_ids": True,
            "return_drafter_ids": True,
            "top_k": 40,
            "min_p": 0.01,
            "speculation": {"max_nodes": 4},
        },
    )
    choice = answer.choices[0].model_extra or {}
    assert len(choice["token_ids"]) == len(choice["drafter_ids"]) == 16
    assert answer.usage is not None
    details = answer.usage.completion_tokens_details
    assert details is not None
    assert details.accepted_prediction_tokens is not None
    assert details.rejected_prediction_tokens is not None
    total = details.accepted_prediction_tokens + details.rejected_prediction_tokens
    assert total == len("whatever")
    metrics = (answer.model_extra or {})["metrics"]["speculative_decoding"]
    assert len(metrics["acceptance_histogram"]) == metrics["num_spec_tokens"] + 1
    assert sum(metrics["acceptance_histogram"]) == metrics["num_spec_steps"]


def test_many_at_once(live_server: LiveServer) -> None:
    """Asynchronous streams, more than run at once."""

    async def all_texts() -> list[str]:
        async with AsyncOpenAI(base_url=f"{live_server.url}/v1", api_key="none") as client:

            async def text(seed: int) -> str:
                stream = await client.completions.create(
                    model=MODEL, prompt="go", max_tokens=24, seed=seed, stream=True
                )
                return "".join([chunk.choices[0].text async for chunk in stream])

            return list(await asyncio.gather(*(text(seed % 4) for seed in range(40))))

    texts = asyncio.run(all_texts())
    assert len(set(texts)) == 4
    assert texts == texts[:4] * 10
    live_server.wait_until_idle()
