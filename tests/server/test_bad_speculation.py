"""Wrong, late or broken drafts affect nothing but speed: 37 to 41 of BAD_INPUTS.md."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import pytest
from live import LiveServer, Reply, events, start_server
from refusal import CHAT, COMPLETION, MINIMAL, assert_error, assert_refused, vital_signs
from safetensors.torch import load_file, save_file
from tiny_chat import CONTROL, write_byte_chat

from specserve.types import SamplingParams

VOCAB: Final = 256 + len(CONTROL)
END_ID: Final = VOCAB - 1
CONTEXT: Final = 512
OFF: Final = {"speculation": {"enabled": False}}
# With this an answer is ASCII, so that it can be given back as a prediction.
ASCII: Final = {str(token): -100 for token in range(128, VOCAB)}


def choices(reply: Reply) -> Any:
    assert reply.status == 200, reply
    return reply.json()["choices"]


def completion(prompt: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 40, "seed": 7, "return_token_ids": True} | more


def content(text: str) -> dict[str, str]:
    return {"type": "content", "content": text}


# Slices are stop strings and numbers stop tokens, both taken from the answer.
ENDS: dict[str, dict[str, Any]] = {
    **{f"after {count} tokens": {"max_tokens": count} for count in (1, 2, 7, 8, 9, 15, 16, 17)},
    "a stop string": {"stop": [slice(20, 23)]},
    "a stop string of one token": {"stop": [slice(5, 6)], "include_stop_str_in_output": True},
    "two stop strings": {"stop": [slice(12, 14), slice(9, 12)]},
    "a stop token": {"stop_token_ids": [11]},
    "the end of the text": {"logit_bias": ASCII | {str(END_ID): 100}, "min_tokens": 5},
    "the end of the text at once": {"logit_bias": ASCII | {str(END_ID): 100}},
}


def test_drafts_that_continue_past_the_end(survivor: LiveServer) -> None:
    """37: the answer ends where it ends without drafts."""
    body = completion("Where does it end?", temperature=0, logit_bias=ASCII)
    (whole,) = choices(survivor.ask(COMPLETION, body | {"max_tokens": 60} | OFF))
    for end, given in ENDS.items():
        fields = {name: _filled(value, whole["text"]) for name, value in given.items()}
        expected = choices(survivor.ask(COMPLETION, body | fields | OFF))
        reply = survivor.ask(COMPLETION, body | fields | {"prediction": content(whole["text"])})
        assert choices(reply) == expected, end
        ids = expected[0]["token_ids"]
        if len(ids) > 8 and ids == whole["token_ids"][: len(ids)]:
            details = reply.json()["usage"]["completion_tokens_details"]
            assert details["accepted_prediction_tokens"] > 4, "nothing was drafted"


def _filled(value: Any, text: str) -> Any:
    """A list of parts of the text, or their first characters' tokens, where `value` says so."""
    if not isinstance(value, list):
        return value
    return [text[part] if isinstance(part, slice) else ord(text[part]) for part in value]


def test_the_context_ends_inside_a_draft(survivor: LiveServer) -> None:
    """37."""
    for room in (1, 2, 7, 8, 9, 30):
        body = completion("ab" * (CONTEXT // 2), temperature=0, max_tokens=room, ignore_eos=True)
        body["prompt"] = body["prompt"][room:]
        body["logit_bias"] = {"97": 100}  # a, again and again: all of the prediction is right
        reply = survivor.ask(COMPLETION, body | {"prediction": content("a" * 60)})
        assert choices(reply) == choices(survivor.ask(COMPLETION, body | OFF))
        usage = reply.json()["usage"]
        assert usage["total_tokens"] == CONTEXT
        assert usage["completion_tokens_details"]["accepted_prediction_tokens"] <= room


SAMPLERS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.01},
    {"temperature": 2},
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 1e-9},
    {"top_p": 0.8},
    {"min_p": 1},
    {"min_p": 0.1},
    {"presence_penalty": 2},
    {"frequency_penalty": -2, "temperature": 0},
    {"repetition_penalty": 10},
    {"repetition_penalty": 0.01},
    {"logit_bias": {str(token): -100 for token in range(VOCAB)}},
    {"logit_bias": {"101": 100}},
    {"min_tokens": 9, "logit_bias": {str(END_ID): 100}},
    {"stop": ["e", "th"]},
    {"stop": ["e", "th"], "include_stop_str_in_output": True},
    {"stop": ["<|im", "e"], "skip_special_tokens": False, "logit_bias": {str(END_ID): 5}},
    {"stop_token_ids": list(range(0, 256, 5))},
    {"ignore_eos": True, "logit_bias": {str(END_ID): 5}},
    {"logprobs": 20},
    {"prompt_logprobs": 3},
    {"n": 3},
    {"seed": 2**63 - 1},
    {"max_tokens": 1},
]


def test_every_sampling_parameter_is_covered() -> None:
    assert set(SamplingParams.__struct_fields__) == {name for each in SAMPLERS for name in each}


def test_every_sampling_with_every_speculation_in_one_batch(survivor: LiveServer) -> None:
    """38: each answer equals the one alone and without drafts."""
    prompt = "to be or not to be, to be or "
    methods: list[dict[str, Any]] = [
        {},
        OFF,
        {"speculation": {"max_nodes": 1}},
        {"speculation": {"max_nodes": 64}},
        {"speculation": {"drafters": ["recycle"]}},
        {"prediction": content("not to be, to be")},
    ]
    plain = [
        completion(prompt, **({"max_tokens": 16, "seed": index} | sampler))
        for index, sampler in enumerate(SAMPLERS)
    ]
    expected = [choices(survivor.ask(COMPLETION, body | OFF)) for body in plain]
    mixed = [(index, method) for method in methods for index in range(len(plain))]
    with ThreadPoolExecutor(48) as pool:
        replies = pool.map(lambda m: survivor.ask(COMPLETION, plain[m[0]] | m[1]), mixed)
        for (index, method), reply in zip(mixed, replies, strict=True):
            assert choices(reply) == expected[index], (SAMPLERS[index], method)


PREDICTIONS: list[tuple[Any, str]] = [
    ({}, "prediction.type"),
    ({"type": "content"}, "prediction.content"),
    ({"content": "a"}, "prediction.type"),
    ({"type": "text", "content": "a"}, "prediction.type"),
    ({"type": None, "content": "a"}, "prediction.type"),
    (content(""), "prediction"),
    ({"type": "content", "content": []}, "prediction"),
    ({"type": "content", "content": [{"type": "text", "text": ""}]}, "prediction"),
    ({"type": "content", "content": None}, "prediction.content"),
    ({"type": "content", "content": 5}, "prediction.content"),
    ({"type": "content", "content": {}}, "prediction.content"),
    ({"type": "content", "content": ["a"]}, "prediction.content[0]"),
    ({"type": "content", "content": [{"type": "text"}]}, "prediction.content[0].text"),
    (
        {"type": "content", "content": [{"type": "image_url", "image_url": {}}]},
        "prediction.content[0].type",
    ),
    ({"type": "content", "content": [{"type": "text", "text": ""}] * 1025}, "prediction.content"),
    ({"type": "content", "content": "a", "x": 1}, "prediction.x"),
    (content("a" * 2**21), "prediction"),
    ({"type": "content", "content": [{"type": "text", "text": "a" * 2**15}] * 64}, "prediction"),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
def test_predictions(survivor: LiveServer, path: str) -> None:
    """41."""
    for prediction, param in PREDICTIONS:
        body = MINIMAL[path] | {"prediction": prediction}
        assert_refused(survivor.ask(path, body), 400, param)
        assert_refused(survivor.ask(path, body | {"stream": True, "n": 2}), 400, param)
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    body = MINIMAL[path] | tools | {"prediction": content("a")}
    assert_refused(survivor.ask(path, body), 400, "tools")
    body = MINIMAL[path] | {"prediction": content("a" * 10 * 2**20)}
    assert_refused(survivor.ask(path, body), 413)


USELESS: list[dict[str, Any]] = [
    content("\0"),
    content("<|im_end|>" * 20),
    content("\U0010ffff\ufeff\u2028"),
    content("Hi." * 1000),  # more than the context holds
    {"type": "content", "content": [{"type": "text", "text": "H"}] * 1024},
    {"type": "content", "content": [{"type": "text", "text": text} for text in ("", "Hi", "")]},
]


def test_predictions_that_do_not_match(survivor: LiveServer) -> None:
    """41: with several choices too."""
    for fields in ({"n": 3}, {"temperature": 0, "stop": ["e"]}, OFF):
        body = completion("Hi.", max_tokens=16, **fields)
        expected = choices(survivor.ask(COMPLETION, body | OFF))
        for prediction in USELESS:
            reply = survivor.ask(COMPLETION, body | {"prediction": prediction})
            assert choices(reply) == expected, prediction


SPECULATIONS: list[tuple[Any, str]] = [
    ({"enabled": "yes"}, "speculation.enabled"),
    *(({"max_nodes": value}, "speculation.max_nodes") for value in (0, -1, 65, 2**70, 1.5, True)),
    *(({"drafters": value}, "speculation.drafters") for value in ([], "ngram", ["a"] * 17)),
    ({"drafters": [5]}, "speculation.drafters[0]"),
    ({"drafters": ["recycle", "../recycle"]}, "speculation.drafters[1]"),
    ({"drafters": ["none"]}, "speculation.drafters[0]"),
    ({"drafters": ["\0"]}, "speculation.drafters[0]"),
    ({"method": "ngram"}, "speculation.method"),
]


def test_bad_speculation_options(survivor: LiveServer) -> None:
    for path in (CHAT, COMPLETION):
        for speculation, param in SPECULATIONS:
            body = MINIMAL[path] | {"speculation": speculation}
            assert_refused(survivor.ask(path, body), 400, param)


POISON: Final = "~"


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One token of the vocabulary makes the model produce NaN."""
    model = write_byte_chat(tmp_path_factory.mktemp("poisoned") / "tiny-chat")
    weights = load_file(model / "model.safetensors")
    # Only this token has anything in a channel that the first norm makes infinite.
    weights["model.embed_tokens.weight"][:, 0] = 0.0
    weights["model.embed_tokens.weight"][ord(POISON), 0] = 100.0
    weights["model.layers.0.input_layernorm.weight"][0] = 3e38
    save_file(weights, model / "model.safetensors")
    with start_server(model, "--kv-memory", "512KiB") as server:
        yield server


def test_non_finite_logits_end_only_their_request(poisoned: LiveServer) -> None:
    """40: requests that share a batch, a block or a prefix with it are not affected."""
    before = vital_signs(poisoned)
    shared = "The beginning is the same for all of them. "
    healthy = {"logit_bias": {str(ord(POISON)): -100}}
    good = [completion(f"{shared}{index}", **healthy) for index in range(6)]
    bad = [completion(f"{shared}{POISON * length}") for length in (1, 40, 300)]
    expected = [choices(poisoned.ask(COMPLETION, body)) for body in good]
    for _ in range(3):
        with ThreadPoolExecutor(12) as pool:
            answers = [pool.submit(poisoned.ask, COMPLETION, body) for body in good]
            failures = [pool.submit(poisoned.ask, COMPLETION, body) for body in bad]
            broken = pool.submit(poisoned.ask, COMPLETION, bad[0] | {"stream": True, "n": 2})
            mixed = [good[0]["prompt"], bad[0]["prompt"]]
            both = pool.submit(poisoned.ask, COMPLETION, good[0] | {"prompt": mixed})
        assert [choices(answer.result()) for answer in answers] == expected
        for failure in failures:
            error = assert_refused(failure.result(), 500)
            assert error["code"] == "generation_failed"
            assert "not numbers" in error["message"]
        assert_refused(broken.result(), 500)  # nothing was sent yet
        assert_refused(both.result(), 500)
    bias = {str(ord(POISON)): 100}
    body = completion("Say it.", temperature=0, stream=True, logit_bias=bias)
    messages = events(poisoned.ask(COMPLETION, body).body)  # what was sent stays
    assert messages[0]["choices"][0]["text"] == POISON
    assert_error(messages[-1]["error"])
    assert messages[-1]["error"]["code"] == "generation_failed"
    assert vital_signs(poisoned) == before
