"""The text of answers over HTTP: echoed, streamed, stopped, with and without speculation."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import LiveServer, events, start_server
from odd_tokenizers import ADDED, write_tokenizer
from tiny import write_tiny_llama

from specserve.text import Tokenizer
from specserve.text.token_bytes import TokenBytes

COMPLETION, CHAT = "/v1/completions", "/v1/chat/completions"
NUM_PADDED = 3  # rows of the head that the tokenizer has no tokens for
SEEDS = range(3)
OFF = {"speculation": {"enabled": False}}
TEMPLATE = (
    "{{ messages[0].content }}{{ style }}{{ reasoning_effort }}"
    "{% if tools %}{{ tools[0].function.name }}{% endif %}"
    "{% for call in messages[-1].tool_calls %}{{ call.function.name }}{% endfor %}"
)


@pytest.fixture(scope="module", params=["sentencepiece", "byte level"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer of unusual tokens, the last of which is the end token."""
    folder = tmp_path_factory.mktemp("odd") / "odd"
    added = (*ADDED, "<|end|>")
    config: dict[str, Any] = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    write_tokenizer(folder, request.param, added=added, **config)
    size = Tokenizer(folder).vocab_size
    write_tiny_llama(folder, seed=3, vocab_size=size + NUM_PADDED, sharpness=2.0)
    write_tokenizer(folder, request.param, added=added, **config)
    settings = json.loads((folder / "config.json").read_text())
    settings["eos_token_id"] = Tokenizer(folder).vocabulary()["<|end|>"]
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def server(directory: Path) -> Iterator[LiveServer]:
    with start_server(directory, "--draft", "ngram", "--draft", "recycle") as live:
        yield live
        assert "Traceback" not in live.log.read_text()


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer(directory)


def choice_of(server: LiveServer, body: dict[str, Any], path: str = COMPLETION) -> dict[str, Any]:
    reply = server.ask(path, body)
    assert reply.status == 200, reply
    (choice,) = reply.json()["choices"]
    return dict(choice)


def streamed(server: LiveServer, body: dict[str, Any]) -> dict[str, Any]:
    """A choice, assembled from its chunks."""
    reply = server.ask(COMPLETION, {**body, "stream": True})
    whole: dict[str, Any] = {"text": "", "token_ids": [], "logprobs": {}}
    for (choice,) in (event["choices"] for event in events(reply.body)):
        whole["text"] += choice["text"]
        whole["token_ids"] += choice.get("token_ids", [])
        for name, values in (choice["logprobs"] or {}).items():
            whole["logprobs"].setdefault(name, []).extend(values)
        whole |= {name: choice[name] for name in ("finish_reason", "stop_reason")}
    return whole


def sampled(tokenizer: Tokenizer, seed: int, **more: Any) -> dict[str, Any]:
    """A mix of words, bytes and control tokens, with every option of an answer."""
    vocabulary = tokenizer.vocabulary()
    prompt = [vocabulary[token] for token in ("<s>", "x", "A")][: 1 + seed % 3]
    odd = {str(vocabulary[token]): 2.0 for token in (*ADDED, "<s>")}
    body = {"prompt": prompt, "seed": seed, "max_tokens": 40, "return_token_ids": True}
    return {**body, "logit_bias": odd, "ignore_eos": True, "logprobs": 3} | more


@pytest.mark.parametrize("skip", [True, False])
def test_streams_and_speculation_change_nothing(
    server: LiveServer, tokenizer: Tokenizer, skip: bool
) -> None:
    for seed in SEEDS:
        body = sampled(tokenizer, seed, skip_special_tokens=skip)
        whole = choice_of(server, body)
        for other in (choice_of(server, body | OFF), streamed(server, body)):
            assert {**whole, **other} == whole
        ids, names = whole["token_ids"], TokenBytes(tokenizer)
        assert whole["logprobs"]["tokens"] == [names.text(index) for index in ids]
        assert_pointed_at(whole, ids, tokenizer, skip)


def assert_pointed_at(
    choice: dict[str, Any], ids: list[int], tokenizer: Tokenizer, skip: bool
) -> None:
    """Offsets lie in the text, in order, and each token's whole characters begin at its offset."""
    text, offsets = choice["text"], choice["logprobs"]["text_offset"]
    assert len(offsets) == len(ids)
    assert offsets == sorted(offsets)
    assert all(0 <= offset <= len(text) for offset in offsets)
    for index, offset in list(zip(ids, offsets, strict=True))[1:]:
        data = tokenizer.detokenizer.bytes_of(index)
        shown = not (skip and index in tokenizer.hidden_ids)
        if shown and data.decode(errors="ignore").encode() == data:
            rest = text[offset:]
            assert data.decode().startswith(rest) or rest.startswith(data.decode())


@pytest.mark.parametrize("skip", [True, False])
def test_echo_and_answer_are_the_text_of_all_tokens(
    server: LiveServer, tokenizer: Tokenizer, skip: bool
) -> None:
    for seed in SEEDS:
        body = sampled(tokenizer, seed, skip_special_tokens=skip, logprobs=None)
        answer = choice_of(server, body)
        ids = [*body["prompt"], *answer["token_ids"]]
        echoed = choice_of(server, {**body, "echo": True})
        assert echoed["text"] == tokenizer.decode(ids, skip_special=skip)
        assert streamed(server, {**body, "echo": True})["text"] == echoed["text"]
        # Going on from anywhere gives the text of both, also within a character.
        for at in (len(body["prompt"]) + 1, len(ids) // 2):
            more = {**body, "prompt": ids[:at], "max_tokens": len(ids) - at, "echo": True}
            again = choice_of(server, more)
            everything = [*ids[:at], *again["token_ids"]]
            assert again["text"] == tokenizer.decode(everything, skip_special=skip)
        if not skip:
            reply = server.ask("/detokenize", {"tokens": ids}).json()
            assert reply["prompt"] == echoed["text"]


@pytest.mark.parametrize("skip", [True, False])
def test_logprobs_of_an_echoed_prompt(server: LiveServer, tokenizer: Tokenizer, skip: bool) -> None:
    """They come before those of the answer, and point into the whole text."""
    names = TokenBytes(tokenizer)
    for seed in SEEDS:
        body = sampled(tokenizer, seed, skip_special_tokens=skip)
        answer = choice_of(server, body)
        ids = [*body["prompt"], *answer["token_ids"]]
        at = len(body["prompt"]) + 20
        body |= {"prompt": ids[:at], "max_tokens": len(ids) - at, "echo": True}
        whole = choice_of(server, body)
        for other in (choice_of(server, body | OFF), streamed(server, body)):
            assert {**whole, **other} == whole
        assert whole["logprobs"]["tokens"] == [names.text(index) for index in ids]
        assert_pointed_at(whole, ids, tokenizer, skip)
        for name in ("token_logprobs", "top_logprobs"):
            before, after = whole["logprobs"][name], answer["logprobs"][name]
            assert before[0] is None
            assert before[len(ids) - len(after) :] == after


@pytest.mark.parametrize("skip", [True, False])
def test_stop_strings_are_searched_in_the_visible_text(
    server: LiveServer, tokenizer: Tokenizer, skip: bool
) -> None:
    for seed in SEEDS:
        body = sampled(tokenizer, seed, skip_special_tokens=skip)
        text = choice_of(server, {**body, "logprobs": None})["text"]
        for start in (seed, len(text) - 3):
            stop = text[start : start + 3]
            expected = text[: text.index(stop)]
            for more in ({}, OFF):
                cut = choice_of(server, {**body, "stop": [stop, "never"], **more})
                assert (cut["text"], cut["finish_reason"], cut["stop_reason"]) == (
                    *(expected, "stop"),
                    stop,
                )
                assert_pointed_at(cut, cut["token_ids"], tokenizer, skip)
            live = streamed(server, {**body, "stop": [stop, "never"]})
            assert {**cut, **live} == cut
            kept = {**body, "stop": [stop, "never"], "include_stop_str_in_output": True}
            assert choice_of(server, kept)["text"] == expected + stop
            assert streamed(server, kept)["text"] == expected + stop


def test_a_shown_control_token_is_a_stop_string(server: LiveServer, tokenizer: Tokenizer) -> None:
    first, control = tokenizer.vocabulary()["x"], tokenizer.vocabulary()["<s>"]
    bias = {str(control): 100}
    body = {"prompt": [first], "max_tokens": 3, "temperature": 0, "logit_bias": bias}
    shown = {**body, "skip_special_tokens": False}
    assert choice_of(server, shown)["text"] == "<s><s><s>"
    cut = choice_of(server, {**shown, "stop": "><s"})
    assert (cut["text"], cut["stop_reason"]) == ("<s", "><s")
    assert choice_of(server, {**body, "stop": "<s>"})["finish_reason"] == "length"


def test_a_shown_control_token_separates_the_halves_of_a_stop_string(
    server: LiveServer, tokenizer: Tokenizer
) -> None:
    """Hidden, it has no text, and the halves on both sides of it are the stop string."""
    first, control = tokenizer.vocabulary()["x"], tokenizer.vocabulary()["<s>"]
    bias = {str(first): 100, str(control): 100}
    body = {"prompt": [first], "max_tokens": 8, "temperature": 2, "logit_bias": bias}
    seeds = range(60)
    texts = [
        choice_of(server, {**body, "seed": seed, "skip_special_tokens": False})["text"]
        for seed in seeds
    ]
    seed = next(n for n in seeds if "x<s>x" in texts[n] and "xx" not in texts[n])
    stopping = {**body, "seed": seed, "stop": "xx"}
    shown = {**stopping, "skip_special_tokens": False}
    for answer in (
        choice_of(server, shown),
        choice_of(server, shown | OFF),
        streamed(server, shown),
    ):
        assert (answer["text"], answer["finish_reason"]) == (texts[seed], "length")
    hidden = choice_of(server, stopping)
    assert (hidden["text"], hidden["stop_reason"]) == ("", "xx")


def test_an_end_token_has_no_text(server: LiveServer, tokenizer: Tokenizer) -> None:
    """It is named in the configuration, but not flagged special in tokenizer.json."""
    vocabulary = tokenizer.vocabulary()
    end = vocabulary["<|end|>"]
    body = {"prompt": [vocabulary["x"]], "max_tokens": 3, "logit_bias": {str(end): 100}}
    for field, text in (({}, ""), ({"skip_special_tokens": False}, "<|end|>")):
        answer = choice_of(server, {**body, **field})
        assert (answer["text"], answer["finish_reason"]) == (text, "stop")
    stopped = choice_of(server, {**body, "skip_special_tokens": False, "stop": "end"})
    assert (stopped["text"], stopped["stop_reason"]) == ("<|", "end")


def test_names_in_top_logprobs(server: LiveServer, tokenizer: Tokenizer) -> None:
    """Tokens of one text, and rows that the tokenizer has no token for, are told apart; the
    emitted token is among them, however unlikely."""
    vocabulary, names = tokenizer.vocabulary(), TokenBytes(tokenizer)
    size = tokenizer.vocab_size
    padded = [size + i for i in range(NUM_PADDED)]
    for drawn in (*padded, vocabulary["é"], vocabulary["<0x41>"], vocabulary["A"]):
        body = {"prompt": [vocabulary["x"]], "max_tokens": 1, "logit_bias": {str(drawn): 100}}
        logprobs = choice_of(server, {**body, "temperature": 0, "logprobs": 20})["logprobs"]
        (token,), (value,), (top,) = (
            logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs")
        )
        assert token == names.text(drawn)
        assert top[token] == value
        assert len(top) in (20, 21)
        alone = choice_of(server, {**body, "temperature": 0, "logprobs": 0})["logprobs"]
        assert alone["top_logprobs"] == [{token: value}]
        del body["prompt"]
        message = {"messages": [{"role": "user", "content": "x"}], "logprobs": True}
        chat = choice_of(server, {**body, **message, "temperature": 0, "top_logprobs": 20}, CHAT)
        (entry,) = chat["logprobs"]["content"]
        assert (entry["token"], bytes(entry["bytes"])) == (token, names.bytes(drawn))
        assert len({each["token"] for each in entry["top_logprobs"]}) == 20


def test_what_a_template_gets_beside_texts(server: LiveServer, tokenizer: Tokenizer) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "A", "arguments": "{}"}}
    tool = {"type": "function", "function": {"name": "x", "parameters": {"type": "object"}}}
    messages: list[dict[str, Any]] = [{"role": "user", "content": "x"}]
    calling = [*messages, {"role": "assistant", "content": None, "tool_calls": [call]}]
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, ""),
        ({"chat_template_kwargs": {"style": "A"}}, "A"),
        ({"chat_template_kwargs": {"style": "A", "reasoning_effort": "x"}}, "Ax"),
        ({"reasoning_effort": "low"}, "low"),
        ({"tools": [tool], "tool_choice": "none"}, "x"),
        ({"messages": calling}, "A"),
    ]
    for more, added in cases:
        body = {"messages": messages, "max_tokens": 0, "return_token_ids": True, **more}
        answer = server.ask(CHAT, body).json()
        assert tokenizer.decode(answer["prompt_token_ids"]) == "x" + added
        assert answer["usage"]["completion_tokens"] == 0


def test_words_keep_their_space(server: LiveServer, tokenizer: Tokenizer) -> None:
    spelled = {"▁one": " one", "Ġone": " one"}
    token = next(token for token in spelled if token in tokenizer.vocabulary())
    forced = {"logit_bias": {str(tokenizer.vocabulary()[token]): 100}, "max_tokens": 2}
    body = {"prompt": "x", "temperature": 0, **forced}
    assert choice_of(server, body)["text"] == " one one"
    assert choice_of(server, {**body, "echo": True})["text"] == "x one one"
    assert choice_of(server, {**body, "stop": " one"})["text"] == ""
    message = {"messages": [{"role": "user", "content": "x"}]}
    answer = choice_of(server, {**message, **forced, "temperature": 0}, CHAT)
    assert answer["message"]["content"] == " one one"
    names = server.ask("/tokenize", {"prompt": "x x", "return_token_strs": True}).json()
    assert names["token_strs"] == ["x", " ", "x"]
