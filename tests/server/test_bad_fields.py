"""Fields of the wrong type, out of range or contradictory: 14 to 24 of BAD_INPUTS.md."""

import re
from typing import Any, Final

import pytest
from live import LiveServer
from refusal import CHAT, COMPLETION, MINIMAL, assert_refused
from tiny_chat import CONTROL

from specserve.server.protocol.chat import ChatRequest
from specserve.server.protocol.completions import CompletionRequest

ROUTES = {COMPLETION: CompletionRequest, CHAT: ChatRequest}
VOCAB: Final = 256 + len(CONTROL)
CONTEXT: Final = 512

# 14: what is not even of the right type.
INTEGER = [True, "5", 1.0, 1.5, {}, []]
NUMBER = [True, "5", "NaN", {}, []]
BOOLEAN = [0, 1, "true", {}, []]
TEXT = [True, 5, 1.5, {}, []]
OBJECT = [True, 5, 1.5, "{}", []]
LIST = [True, 5, 1.5, "[]", {}]
WRONG_TYPES: dict[str, list[Any]] = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "min_tokens", "n"), INTEGER),
    **dict.fromkeys(("top_k", "seed", "priority", "top_logprobs", "prompt_logprobs"), INTEGER),
    **dict.fromkeys(("temperature", "top_p", "min_p", "repetition_penalty"), NUMBER),
    **dict.fromkeys(("presence_penalty", "frequency_penalty", "request_timeout"), NUMBER),
    **dict.fromkeys(("ignore_eos", "stream", "include_stop_str_in_output", "echo"), BOOLEAN),
    **dict.fromkeys(("skip_special_tokens", "return_token_ids", "return_drafter_ids"), BOOLEAN),
    **dict.fromkeys(("add_generation_prompt", "continue_final_message", "store"), BOOLEAN),
    **dict.fromkeys(("model", "cache_salt", "user", "safety_identifier", "prompt_cache_key"), TEXT),
    **dict.fromkeys(("logit_bias", "stream_options", "speculation", "prediction"), OBJECT),
    "chat_template_kwargs": OBJECT,
    "tools": [*LIST, []],
    "tool_choice": ["auto", "required", "", 5, {}, []],
    "reasoning_effort": ["most", "", 5, {}, []],
    "metadata": OBJECT,
    "stop_token_ids": LIST,
    "messages": [*LIST, None],
    "prompt": [True, 5, 1.5, {}, [], None],
    "stop": [True, 5, 1.5, {}],
    "service_tier": ["flex", "", 1, True, {}, []],
    "logprobs": [1.5, "5", {}, []],  # a number in one route, true or false in the other
}

# Of the right type and still wrong, by the name that the error gives it; in both routes.
OUT_OF_RANGE: dict[str, list[Any]] = {
    "temperature": [-1, -1e-9, 2.1, 1e308, 1e-45, 5e-324, 0.009],
    "top_p": [0, -0.0, -0.1, 1.1],
    "top_k": [-2, VOCAB + 1, 2**31, 2**63, 2**70],
    "min_p": [-0.1, 1.1],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1, 1e308],
    "repetition_penalty": [0, -1, 10.1, 1e308],
    "n": [0, -1, 129, 10**6, 2**63, 2**70],
    "max_tokens": [-1, CONTEXT, 2**31, 2**63, 2**70, -(2**70)],
    "min_tokens": [-1, 3, 2**31, 2**70],
    "prompt_logprobs": [-1, 21, 10**9, 2**70],
    "seed": [-1, 2**63, 2**64, 2**70, -(2**63) - 1],
    "stop": ["", "x" * 1025, "x" * 10**6, ["a"] * 17, ["a"] * 10**6],
    "stop[0]": [[""], ["x" * 1025], [5], [None], [["a"]], [{}]],
    "stop[1]": [["a", ""], ["a", True]],
    "stop_token_ids": [[VOCAB], [2**31 - 1], [0] * 1025, [0] * 10**6],
    "stop_token_ids[0]": [[-1], [2**31], [2**63], [2**70], [1.0], [True], ["1"], [None], [[]]],
    "stop_token_ids[2]": [[1, 2, -1]],
    "logit_bias": [
        *({"abc": 1}, {"-1": 1}, {"+1": 1}, {" 1": 1}, {"1.0": 1}, {"1e1": 1}, {"": 1}, {"0x1": 1}),
        *(
            {str(VOCAB): 1},
            {"2147483648": 1},
            {str(2**63): 1},
            {"1" * 5000: 1},
            {"\u0661": 1},
            {"²": 1},
        ),
        *({"1": 100.1}, {"1": -100.1}, {"1": 1e308}, {"1": None}, {"1": True}, {"1": "5"}),
        *({"1": []}, {str(index): 1 for index in range(10**5)}),
    ],
    "priority": [-1001, 1001, 2**63],
    "request_timeout": [0, -1, 601, 86401, 1e308],
    "cache_salt": ["", "x" * 1025],
    "model": ["x" * 257],
    "user": ["x" * 257],
    "metadata": [{"a": 1}, {"a": None}, {str(index): "" for index in range(17)}],
    "stream_options": [{"include_usage": True}],  # without a stream
}
OF_ONE_ROUTE: dict[str, dict[str, list[Any]]] = {
    COMPLETION: {
        "logprobs": [-2, -1, 21, 10**9, 2**70],
    },
    CHAT: {
        "top_logprobs": [-2, -1, 21, 10**9, 2**70, 5],  # and 5 without logprobs
        "max_completion_tokens": [-1, 2**70],
    },
}
# Each is fine by itself.
CONTRADICTIONS: list[tuple[str, str, dict[str, Any]]] = [
    (COMPLETION, "min_tokens", {"max_tokens": 4, "min_tokens": 5}),
    (COMPLETION, "n", {"prompt": ["a"] * 2, "n": 65}),
    (COMPLETION, "n", {"prompt": ["a"] * 128, "n": 128}),
    (COMPLETION, "prompt_logprobs", {"stream": True, "prompt_logprobs": 0}),
    (CHAT, "prompt_logprobs", {"stream": True, "prompt_logprobs": 0}),
    (CHAT, "max_tokens", {"max_tokens": 3, "max_completion_tokens": 4}),
    (CHAT, "top_logprobs", {"logprobs": False, "top_logprobs": 0}),
    (CHAT, "stream_options", {"stream": False, "stream_options": {}}),
    (CHAT, "max_tokens", {"max_tokens": CONTEXT - 5}),
    (COMPLETION, "max_tokens", {"max_tokens": CONTEXT - 2}),
]
LATER_OR_NEVER: dict[str, list[Any]] = {
    "best_of": [0, -1, 2, 129, "2"],
    "allowed_token_ids": [[], [1], [-1], [0] * 10**6],
    "bad_words": [[], [""], ["a"]],
    "prompt_embeds": [[], ["gASVAAAA"]],
    "suffix": ["x"],
    "logits_processors": [[], ["os.system"]],
    "use_beam_search": [True],
    "modalities": [["audio"], []],
    "audio": [{"voice": "x"}],
    "web_search_options": [{}],
    "reasoning_effort": ["low"],
}


def test_every_field_has_wrong_types() -> None:
    """A new field must be added to the table."""
    for request_type in ROUTES.values():
        assert set(request_type.__struct_fields__) <= set(WRONG_TYPES)


def refuses(server: LiveServer, path: str, param: str, fields: dict[str, Any]) -> None:
    assert_refused(server.ask(path, {**MINIMAL[path], **fields}), 400, param)


@pytest.mark.parametrize("field", WRONG_TYPES)
def test_wrong_types(survivor: LiveServer, field: str) -> None:
    """14."""
    for path, request_type in ROUTES.items():
        for value in WRONG_TYPES[field] if field in request_type.__struct_fields__ else ():
            refuses(survivor, path, field, {field: value})


@pytest.mark.parametrize("path", ROUTES)
def test_null_counts_as_not_given(survivor: LiveServer, path: str) -> None:
    """14."""
    names = set(ROUTES[path].__struct_fields__) - set(MINIMAL[path])
    nulls = dict.fromkeys([*names, "tools", "response_format", "suffix"])
    given = {**MINIMAL[path], "seed": 1, **{name: None for name in nulls if name != "seed"}}
    reply = survivor.ask(path, given)
    assert reply.status == 200, reply
    expected = survivor.ask(path, {**MINIMAL[path], "seed": 1})
    assert reply.json()["choices"] == expected.json()["choices"]


@pytest.mark.parametrize("param", OUT_OF_RANGE)
def test_out_of_range(survivor: LiveServer, param: str) -> None:
    """15 to 23."""
    field = re.split(r"[.[]", param)[0]
    for path in ROUTES:
        for value in OUT_OF_RANGE[param]:
            refuses(survivor, path, param, {field: value})


@pytest.mark.parametrize("path", OF_ONE_ROUTE)
def test_out_of_range_in_one_route(survivor: LiveServer, path: str) -> None:
    """18 and 21."""
    for field, values in OF_ONE_ROUTE[path].items():
        for value in values:
            refuses(survivor, path, field, {field: value})


def test_contradictions(survivor: LiveServer) -> None:
    """18 and 19."""
    for path, param, fields in CONTRADICTIONS:
        refuses(survivor, path, param, fields)


def test_unsupported_fields_are_refused_by_name(survivor: LiveServer) -> None:
    """24, and fields of other servers."""
    for field, values in LATER_OR_NEVER.items():
        for value in values:
            for path in ROUTES:
                refuses(survivor, path, field, {field: value})


def test_unknown_models(survivor: LiveServer) -> None:
    for name in ("gpt-4", "", "../tiny-chat", "tiny-chat/", "Tiny-Chat", "\0"):
        for path in ROUTES:
            reply = survivor.ask(path, {**MINIMAL[path], "model": name})
            assert assert_refused(reply, 404, "model")["code"] == "model_not_found"


ALLOWED: list[dict[str, Any]] = [
    {"temperature": 0, "n": 2},
    {"temperature": 0, "top_k": 1, "top_p": 1e-300, "min_p": 1, "seed": 2**63 - 1},
    {"temperature": 0.01, "repetition_penalty": 1e-300},
    {"temperature": 2, "presence_penalty": -2, "frequency_penalty": -2, "repetition_penalty": 10},
    {"temperature": -0.0},
    {"top_k": -1},
    {"top_k": VOCAB},
    {"logit_bias": {str(token): -100 for token in range(VOCAB)}},  # 23: all tokens banned
    {"logit_bias": {str(token): 100 for token in range(VOCAB)}, "temperature": 0},
    {"logit_bias": {"0": -100, "00": 100}},
    {"stop_token_ids": list(range(VOCAB))},
    {"stop_token_ids": [5] * 1024, "stop": ["a"] * 16},
    {"stop": [], "stop_token_ids": [], "logit_bias": {}, "metadata": {}},
    {"n": 128, "max_tokens": 1},
    {"max_tokens": 2, "min_tokens": 2, "ignore_eos": False, "stop_token_ids": list(range(VOCAB))},
    {"priority": -1000, "cache_salt": "\0\n/../\x7f", "user": "", "metadata": {"": ""}},
    {"request_timeout": 600, "service_tier": "auto", "tools": None},
]


@pytest.mark.parametrize("fields", ALLOWED)
def test_values_at_their_limits(survivor: LiveServer, fields: dict[str, Any]) -> None:
    """18, 23: the limits of every range are accepted."""
    for path in ROUTES:
        reply = survivor.ask(path, {**MINIMAL[path], **fields})
        assert reply.status == 200, reply
        choices = reply.json()["choices"]
        assert len(choices) == fields.get("n", 1)
        assert {choice["finish_reason"] for choice in choices} <= {"stop", "length"}
        if fields.get("temperature") == 0:
            assert len({repr(choice | {"index": 0}) for choice in choices}) == 1
