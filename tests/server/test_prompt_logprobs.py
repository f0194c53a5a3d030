"""Logprobs of the prompt over HTTP: both forms, several prompts and samples, nothing generated."""

from typing import Any

import pytest
from live import LiveServer, events

from specserve import Client

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
TEXTS = ["It was the best of times.", "It was the worst of times, it was the age."]


def choices(server: LiveServer, path: str = COMPLETION, **body: Any) -> list[dict[str, Any]]:
    reply = server.ask(path, {"temperature": 0, "max_tokens": 4, **body})
    assert reply.status == 200, reply
    return list(reply.json()["choices"])


def test_both_forms_have_the_same_numbers(live_server: LiveServer) -> None:
    """Tokens of the model are bytes."""
    (choice,) = choices(live_server, prompt=TEXTS[0], echo=True, logprobs=2, prompt_logprobs=5)
    ids, entries, echoed = list(TEXTS[0].encode()), choice["prompt_logprobs"], choice["logprobs"]
    assert choice["text"].startswith(TEXTS[0])
    assert echoed["text_offset"][: len(ids)] == list(range(len(ids)))
    assert len(echoed["tokens"]) == len(ids) + 4
    assert entries[0] is echoed["token_logprobs"][0] is echoed["top_logprobs"][0] is None
    for at, entry in enumerate(entries[1:], start=1):
        own, *others = entry.items()
        assert own[0] == str(ids[at])
        assert own[1]["logprob"] == echoed["token_logprobs"][at]
        assert own[1]["decoded_token"] == echoed["tokens"][at]
        assert len(entry) == (5 if own[1]["rank"] else 6)
        ranked = sorted((each for each in entry.values() if each["rank"]), key=lambda e: e["rank"])
        assert [each["rank"] for each in ranked] == [1, 2, 3, 4, 5]
        two = {each["decoded_token"]: each["logprob"] for each in ranked[:2]}
        assert echoed["top_logprobs"][at] == {**two, echoed["tokens"][at]: own[1]["logprob"]}
        assert len(others) >= 4


def test_nothing_is_generated_and_the_prompt_is_cached_for_others(live_server: LiveServer) -> None:
    """What lm-eval sends: batches of token ids."""
    body = {"max_tokens": 0, "echo": True, "logprobs": 1, "temperature": 0, "seed": 1234}
    prompts = [list(f"{text} {'x' * 40}".encode()) for text in TEXTS]
    for _ in range(2):
        reply = live_server.ask(COMPLETION, {**body, "prompt": prompts})
        assert reply.status == 200, reply
        answer = reply.json()
        assert answer["usage"]["completion_tokens"] == 0
        assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        for choice, prompt in zip(answer["choices"], prompts, strict=True):
            assert choice["text"].encode() == bytes(prompt)
            assert choice["finish_reason"] == "length"
            assert [len(column) for column in choice["logprobs"].values()] == [len(prompt)] * 4
    reply = live_server.ask(COMPLETION, {"prompt": prompts[0], "max_tokens": 1})
    assert reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_samples_of_several_prompts(live_server: LiveServer, stream: bool) -> None:
    body: dict[str, Any] = {"prompt": TEXTS, "n": 3, "echo": True, "logprobs": 0, "max_tokens": 9}
    expected = [choices(live_server, prompt=text, echo=True, logprobs=0) for text in TEXTS]
    tokens: dict[int, list[str]] = {}
    values: dict[int, list[float | None]] = {}
    if stream:
        reply = live_server.ask(COMPLETION, {**body, "temperature": 1, "stream": True})
        got = [choice for event in events(reply.body) for choice in event["choices"]]
    else:
        got = choices(live_server, **{**body, "temperature": 1})
    for choice in got:
        if choice["logprobs"]:
            tokens.setdefault(choice["index"], []).extend(choice["logprobs"]["tokens"])
            values.setdefault(choice["index"], []).extend(choice["logprobs"]["token_logprobs"])
    assert sorted(tokens) == list(range(6))
    for index in range(6):
        (alone,), count = expected[index // 3], len(TEXTS[index // 3])
        assert tokens[index][:count] == alone["logprobs"]["tokens"][:count]
        assert values[index][:count] == alone["logprobs"]["token_logprobs"][:count]
        assert len(tokens[index]) <= count + 9


def test_of_a_chat_and_through_the_client(live_server: LiveServer) -> None:
    body = {"messages": [{"role": "user", "content": TEXTS[0]}], "max_tokens": 0, "n": 2}
    answer = live_server.ask(CHAT, {**body, "prompt_logprobs": 1, "return_token_ids": True}).json()
    ids, entries = answer["prompt_token_ids"], answer["prompt_logprobs"]
    assert entries[0] is None
    assert [next(iter(entry)) for entry in entries[1:]] == [str(token) for token in ids[1:]]
    with Client(live_server.url) as client:
        done = client.chat(TEXTS[0], max_tokens=0, prompt_logprobs=1)
        assert done.text == ""
        assert done.finish_reason == "length"
        scored = client.complete(list(done.prompt_ids), max_tokens=0, prompt_logprobs=1)
    for got in (done, scored):
        first, *rest = got.prompt_logprobs
        assert first is None
        assert len(rest) == len(ids) - 1
        for ours, entry in zip(rest, entries[1:], strict=True):
            assert ours is not None
            assert ours.logprob == next(iter(entry.values()))["logprob"]
            assert [each.logprob for each in ours.top] == [
                each["logprob"] for each in entry.values() if each["rank"] == 1
            ]
