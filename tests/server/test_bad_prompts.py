"""Prompts that cannot be answered: 25 to 30 of BAD_INPUTS.md."""

import time
from typing import Any, Final

import pytest
from live import LiveServer
from refusal import COMPLETION, MINIMAL, assert_refused, scrape
from tiny_chat import CONTROL

VOCAB: Final = 256 + len(CONTROL)
END_ID: Final = VOCAB - 1
CONTEXT: Final = 512
HI: Final = {"role": "user", "content": "Hi."}

PROMPTS: dict[str, list[tuple[Any, str]]] = {
    "25 empty": [
        ("", "prompt"),
        ([], "prompt"),
        ([[]], "prompt[0]"),
        ([""], "prompt"),
        (["a", ""], "prompt"),
        ([[1], []], "prompt[1]"),
        (None, "prompt"),
        ([None], "prompt[0]"),
    ],
    "26 no token ids": [
        ([-1], "prompt[0]"),
        ([1, VOCAB], "prompt"),
        ([1, 2**31 - 1], "prompt"),
        ([1, 2**31], "prompt[1]"),
        ([2**40], "prompt[0]"),
        ([2**63], "prompt[0]"),
        ([2**70], "prompt[0]"),
        ([1, 1.0], "prompt[1]"),
        ([1, True], "prompt[1]"),
        ([True], "prompt[0]"),
        ([1, "a"], "prompt[1]"),
        (["a", 1], "prompt[1]"),
        ([1, [1]], "prompt[1]"),
        ([[1], 1], "prompt[1]"),
        ([[1], "a"], "prompt[1]"),
        ([[1], [1, -1]], "prompt[1][1]"),
        ([[1], [VOCAB]], "prompt"),
        ([[[1]]], "prompt[0][0]"),
        ([1.5], "prompt[0]"),
        ([{}], "prompt[0]"),
        ({"0": 1}, "prompt"),
    ],
    "27 too many": [
        (["a"] * 129, "prompt"),
        ([[1]] * 129, "prompt"),
        (["a"] * 10**6, "prompt"),
        ([[1]] * 10**6, "prompt"),
        ([[]] * 10**6, "prompt"),
    ],
    "28 too long": [
        ("a" * (2 * 2**20), "prompt"),
        ("a" * (8 * 2**20 - 100), "prompt"),
        ("\u00e9" * 2**20, "prompt"),
        ("a b " * 2**20, "prompt"),
        (["a", "a" * (2 * 2**20)], "prompt"),
        ([1] * 2 * 10**6, "prompt"),
        ([[1]] * 127 + [[1] * 10**6], "prompt"),
    ],
    "29 one more than there is room for": [
        ("a" * CONTEXT, "prompt"),
        ([1] * CONTEXT, "prompt"),
        ([1] * (CONTEXT + 1), "prompt"),
        ([1] * (CONTEXT - 1), "max_tokens"),  # two are asked for
    ],
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts(survivor: LiveServer, kind: str) -> None:
    for prompt, param in PROMPTS[kind]:
        body = {**MINIMAL[COMPLETION], "prompt": prompt}
        start = time.monotonic()
        assert_refused(survivor.ask(COMPLETION, body), 400, param)
        assert time.monotonic() - start < 10
        assert_refused(survivor.ask(COMPLETION, {**body, "stream": True}), 400, param)


def test_a_bad_prompt_among_good_ones_is_refused_before_any_runs(survivor: LiveServer) -> None:
    """25, 26, 29: at any position among them."""
    before = scrape(survivor)["vllm:generation_tokens_total"]
    for bad in ([VOCAB], [1] * CONTEXT):
        body = {"prompt": [[1]] * 120 + [bad], "max_tokens": 8}
        assert_refused(survivor.ask(COMPLETION, body), 400, "prompt")
        assert_refused(survivor.ask(COMPLETION, {**body, "stream": True}), 400, "prompt")
    assert scrape(survivor)["vllm:generation_tokens_total"] == before


@pytest.mark.parametrize(
    ("prompt", "max_tokens"),
    [
        (" ", 4),
        ("\n\t\r\n", 4),
        ([0], 4),
        ([END_ID], 4),  # 30: only control tokens
        ([END_ID - 2, END_ID - 1, END_ID] * 5, 4),
        ("<|im_end|>", 4),
        ([1] * (CONTEXT - 1), 1),  # 29: exactly full
        ([1], CONTEXT - 1),
        (["a"] * 128, 1),
        ([[1]] * 128, 1),
    ],
)
def test_prompts_at_the_limits(survivor: LiveServer, prompt: Any, max_tokens: int) -> None:
    body = {"prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True, "temperature": 0}
    reply = survivor.ask(COMPLETION, body)
    assert reply.status == 200, reply
    choices = reply.json()["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"length"}
    num_prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    assert len(choices) == num_prompts
    assert reply.json()["usage"]["completion_tokens"] == num_prompts * max_tokens


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [HI]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "tools": []}, "tools"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": None}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1, VOCAB]}, "tokens[1]"),
        ("/detokenize", {"tokens": [2**40]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1, 1.0]}, "tokens[1]"),
        ("/detokenize", {"tokens": [[1]]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1] * (2**20 + 1)}, "tokens"),
    ],
)
def test_tokenize_and_detokenize_errors(
    survivor: LiveServer, path: str, body: dict[str, Any], param: str
) -> None:
    assert_refused(survivor.ask(path, body), 400, param)


def test_long_texts_are_tokenized_in_time(survivor: LiveServer) -> None:
    """28: other requests do not wait for them."""
    start = time.monotonic()
    reply = survivor.ask("/tokenize", {"prompt": "a" * 10**6})
    assert reply.status in (200, 400), reply.status
    assert survivor.ask("/tokenize", {"prompt": ""}).json()["tokens"] == []
    assert survivor.ask("/detokenize", {"tokens": []}).json() == {"prompt": ""}
    assert survivor.ask("/detokenize", {"tokens": [97] * 2**20}).status == 200
    assert time.monotonic() - start < 15
