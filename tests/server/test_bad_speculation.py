"""Drafts that are wrong, late or broken cost speed and nothing else: 37 to 42 of BAD_INPUTS.md."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
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

HANGS_ON: Final = "\x07"  # in a prompt
BAD_DRAFTERS: Final = f"""
import time

from specserve.drafting.base import DraftOptions
from specserve.tree import DraftTree, chain_tree
import numpy as np


class Drafter:
    Options = DraftOptions
    needs_taps = ()
    needs_topk = 0

    def __init__(self, options, path, target):
        pass

    def kv_spec(self, dtype):
        return None

    def bind(self, context):
        self.source = context.source

    def propose(self, seqs, budgets):
        return [self.tree(seq.tokens[-1], budget) for seq, budget in zip(seqs, budgets)]

    def tree(self, root, budget):
        return chain_tree(root, [65], [0.5], self.source)

    def observe(self, feedback):
        pass

    def forget(self, seq_id):
        pass


class Outside(Drafter):
    def tree(self, root, budget):
        return chain_tree(root, [{VOCAB}], [0.5], self.source)


class Negative(Drafter):
    def tree(self, root, budget):
        return chain_tree(root, [-1], [0.5], self.source)


class Huge(Drafter):
    def tree(self, root, budget):
        return chain_tree(root, [65] * budget, [0.5] * budget, self.source)


class Foreign(Drafter):
    def tree(self, root, budget):
        return chain_tree((root + 1) % {VOCAB}, [65], [0.5], self.source)


class Looped(Drafter):
    def tree(self, root, budget):
        return DraftTree(
            np.array([root, 65], np.int32), np.array([-1, 1], np.int16),
            np.array([1, 0.5], np.float32), np.array([0, self.source], np.uint8),
        )


class Unsure(Drafter):
    def tree(self, root, budget):
        return DraftTree(
            np.array([root, 65], np.int32), np.array([-1, 0], np.int16),
            np.array([1, np.nan], np.float32), np.array([0, self.source], np.uint8),
        )


class Short(Drafter):
    def propose(self, seqs, budgets):
        return []


class Nothing(Drafter):
    def propose(self, seqs, budgets):
        return None


class Raising(Drafter):
    def propose(self, seqs, budgets):
        raise MemoryError("boom")


class Deaf(Drafter):
    def observe(self, feedback):
        raise RuntimeError("boom")


class Forgetful(Drafter):
    def forget(self, seq_id):
        raise KeyError(seq_id)


class Hanging(Drafter):
    def propose(self, seqs, budgets):
        while any({ord(HANGS_ON)} & set(seq.tokens) for seq in seqs):
            time.sleep(1)
        return super().propose(seqs, budgets)
"""
BAD_NAMES: Final = (
    *("outside", "negative", "huge", "foreign", "looped", "unsure"),
    *("short", "nothing", "raising", "deaf", "forgetful"),
)


def choices(reply: Reply) -> Any:
    assert reply.status == 200, reply
    return reply.json()["choices"]


def completion(prompt: str, **more: Any) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": 40, "seed": 7, "return_token_ids": True} | more


def content(text: str) -> dict[str, str]:
    return {"type": "content", "content": text}


ENDS: dict[str, dict[str, Any]] = {
    **{f"after {count} tokens": {"max_tokens": count} for count in (1, 2, 7, 8, 9, 15, 16, 17)},
    "a stop string": {"stop": ["{20:23}"]},
    "a stop string of one token": {"stop": ["{5:6}"], "include_stop_str_in_output": True},
    "two stop strings": {"stop": ["{12:14}", "{9:12}"]},
    "a stop token": {"stop_token_ids": ["{11:12}"]},
    "the end of the text": {"logit_bias": ASCII | {str(END_ID): 100}, "min_tokens": 5},
    "the end of the text at once": {"logit_bias": ASCII | {str(END_ID): 100}},
}


@pytest.mark.parametrize("end", ENDS)
def test_a_draft_that_goes_on_behind_the_end(survivor: LiveServer, end: str) -> None:
    """37."""
    body = completion("Where does it end?", temperature=0, logit_bias=ASCII)
    (whole,) = choices(survivor.ask(COMPLETION, body | {"max_tokens": 60} | OFF))
    fields = dict(ENDS[end])
    if "stop" in fields:
        fields["stop"] = [_cut(whole["text"], part) for part in fields["stop"]]
    if "stop_token_ids" in fields:
        fields["stop_token_ids"] = [
            ord(_cut(whole["text"], part)) for part in fields["stop_token_ids"]
        ]
    expected = choices(survivor.ask(COMPLETION, body | fields | OFF))
    reply = survivor.ask(COMPLETION, body | fields | {"prediction": content(whole["text"])})
    assert choices(reply) == expected
    if fields.get("max_tokens", 40) > 8 and "logit_bias" not in fields:
        assert expected[0]["token_ids"] == whole["token_ids"][: len(expected[0]["token_ids"])]
        details = reply.json()["usage"]["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] > 4, "nothing was drafted"


def _cut(text: str, part: str) -> str:
    """'{2:4}' -> text[2:4]"""
    start, end = map(int, part.strip("{}").split(":"))
    return text[start:end]


@pytest.mark.parametrize("room", [1, 2, 7, 8, 9, 30])
def test_the_context_ends_within_a_draft(survivor: LiveServer, room: int) -> None:
    """37."""
    prompt = "ab" * CONTEXT
    body = completion(prompt[: CONTEXT - room], temperature=0, max_tokens=room, ignore_eos=True)
    body["logit_bias"] = {"97": 100}  # a, again and again: all of the prediction is right
    reply = survivor.ask(COMPLETION, body | {"prediction": content("a" * 60)})
    assert choices(reply) == choices(survivor.ask(COMPLETION, body | OFF))
    assert reply.json()["usage"]["total_tokens"] == CONTEXT
    assert reply.json()["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] <= room


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
    {"stop_token_ids": list(range(0, 256, 5))},
    {"ignore_eos": True, "logit_bias": {str(END_ID): 5}},
    {"logprobs": 20},
    {"n": 3},
    {"seed": 2**63 - 1},
    {"max_tokens": 1},
]


def test_every_sampling_parameter_is_among_them() -> None:
    assert set(SamplingParams.__struct_fields__) == {name for each in SAMPLERS for name in each}


@pytest.fixture(scope="module")
def drafted(chat_model: Path) -> Iterator[LiveServer]:
    """A draft that is always right and one that hardly ever is, together."""
    with start_server(chat_model, "--draft", str(chat_model), "--draft", "ngram") as server:
        before = vital_signs(server)
        yield server
        assert vital_signs(server) == before


def test_every_sampling_with_every_speculation_in_one_batch(drafted: LiveServer) -> None:
    """38: what it is alone and without drafts."""
    prompt = "to be or not to be, to be or "
    methods: list[dict[str, Any]] = [
        {},
        OFF,
        {"speculation": {"max_nodes": 1}},
        {"speculation": {"max_nodes": 64}},
        {"speculation": {"drafters": ["ngram"]}},
        {"speculation": {"drafters": [drafted_name(drafted)], "max_nodes": 3}},
        {"prediction": content("not to be, to be")},
    ]
    plain = [
        completion(prompt, **({"max_tokens": 16, "seed": index} | sampler))
        for index, sampler in enumerate(SAMPLERS)
    ]
    expected = [choices(drafted.ask(COMPLETION, body | OFF)) for body in plain]
    mixed = [(index, method) for method in methods for index in range(len(plain))]
    with ThreadPoolExecutor(48) as pool:
        replies = pool.map(lambda m: drafted.ask(COMPLETION, plain[m[0]] | m[1]), mixed)
        for (index, method), reply in zip(mixed, replies, strict=True):
            assert choices(reply) == expected[index], (SAMPLERS[index], method)


def drafted_name(server: LiveServer) -> str:
    (name,) = set(server.ask("/v1/speculation").json()["drafters"]) - {"ngram"}
    return str(name)


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
    (content("a" * (CONTEXT * 8)), "prediction"),
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
    assert_refused(survivor.ask(path, MINIMAL[path] | tools | {"prediction": {}}), 400, "tools")
    body = MINIMAL[path] | {"prediction": content("a" * 10 * 2**20)}
    assert_refused(survivor.ask(path, body), 413)


@pytest.mark.parametrize(
    "prediction",
    [
        content("\0"),
        content("<|im_end|>" * 20),
        content("\U0010ffff\ufeff\u2028"),
        content("Hi." * 100),
        {"type": "content", "content": [{"type": "text", "text": "H"}] * 1024},
        {"type": "content", "content": [{"type": "text", "text": t} for t in ("", "Hi", "")]},
    ],
)
def test_predictions_that_are_of_no_use(survivor: LiveServer, prediction: dict[str, Any]) -> None:
    """41: with several choices too."""
    for fields in ({}, {"n": 3}, {"temperature": 0, "stop": ["e"]}, OFF):
        body = completion("Hi.", **fields)
        expected = choices(survivor.ask(COMPLETION, body | OFF))
        assert choices(survivor.ask(COMPLETION, body | {"prediction": prediction})) == expected


SPECULATIONS: list[tuple[Any, str]] = [
    ({"enabled": None}, "speculation.enabled"),
    ({"enabled": "yes"}, "speculation.enabled"),
    *(({"max_nodes": value}, "speculation.max_nodes") for value in (0, -1, 65, 2**70, 1.5, True)),
    *(({"drafters": value}, "speculation.drafters") for value in ([], "ngram", ["a"] * 17)),
    ({"drafters": [5]}, "speculation.drafters[0]"),
    ({"drafters": ["ngram", "../ngram"]}, "speculation.drafters[1]"),
    ({"drafters": ["none"]}, "speculation.drafters[0]"),
    ({"drafters": ["\0"]}, "speculation.drafters[0]"),
    ({"method": "ngram"}, "speculation.method"),
]


def test_what_may_be_asked_of_speculation(survivor: LiveServer) -> None:
    for path in (CHAT, COMPLETION):
        for speculation, param in SPECULATIONS:
            body = MINIMAL[path] | {"speculation": speculation}
            assert_refused(survivor.ask(path, body), 400, param)


@pytest.fixture(scope="module")
def misdrafted(chat_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Every bad drafter there is, beside a good one."""
    plugins = tmp_path_factory.mktemp("plugins")
    (plugins / "bad_drafters.py").write_text(BAD_DRAFTERS)
    metadata = plugins / "bad_drafters-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: bad-drafters\nVersion: 1\n")
    points = [f"{name} = bad_drafters:{name.title()}" for name in (*BAD_NAMES, "hanging")]
    (metadata / "entry_points.txt").write_text("\n".join(["[specserve.drafters]", *points]))
    drafts = [flag for name in (*BAD_NAMES, "ngram", "hanging") for flag in ("--draft", name)]
    path = os.pathsep.join([str(plugins), os.environ.get("PYTHONPATH", "")])
    with start_server(chat_model, *drafts, "--heartbeat-timeout", "2", PYTHONPATH=path) as server:
        yield server


def test_drafters_that_are_wrong_or_fail(survivor: LiveServer, misdrafted: LiveServer) -> None:
    """39 and 42: their nodes never reach the target; after a few times nobody asks them."""
    before = vital_signs(misdrafted)
    bodies = [
        completion("abcabcabcab", temperature=temperature, seed=index, n=2)
        for index, temperature in enumerate((0, 0.7, 1.0, 1.5))
    ]
    with ThreadPoolExecutor(len(bodies)) as pool:
        replies = list(pool.map(lambda body: misdrafted.ask(COMPLETION, body), bodies))
    for body, reply in zip(bodies, replies, strict=True):
        assert choices(reply) == choices(survivor.ask(COMPLETION, body | OFF))
    report = misdrafted.ask("/v1/speculation").json()
    active = {source["name"]: source["active"] for source in report["sources"]}
    assert active == dict.fromkeys(BAD_NAMES, False) | {
        **{"ngram": True, "hanging": True, "prediction": True}
    }
    assert vital_signs(misdrafted) == before


def test_a_drafter_that_hangs_is_a_hanging_engine(misdrafted: LiveServer) -> None:
    """42: it cannot be interrupted, so the watchdog starts another engine."""
    before = vital_signs(misdrafted)
    reply = misdrafted.ask(COMPLETION, completion(f"wait{HANGS_ON}"))
    assert_refused(reply, 503)
    assert int(reply.headers["retry-after"]) >= 1
    misdrafted.wait_for("/ready", 200)
    after = vital_signs(misdrafted)
    assert after.ids == before.ids
    assert after.num_restarts == before.num_restarts + 1
    without = completion(f"wait{HANGS_ON}", speculation={"drafters": ["ngram"]})
    assert misdrafted.ask(COMPLETION, without).status == 200


POISON: Final = "~"


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One token of the vocabulary makes the model produce no numbers."""
    model = write_byte_chat(tmp_path_factory.mktemp("poisoned") / "tiny-chat")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][ord(POISON)] = float("nan")
    save_file(weights, model / "model.safetensors")
    with start_server(model, "--kv-memory", "512KiB") as server:
        yield server


def test_logits_that_are_no_numbers_end_their_request(poisoned: LiveServer) -> None:
    """40: and nobody who shares a batch, a block or a prefix with it."""
    before = vital_signs(poisoned)
    shared = "The beginning is the same for all of them. "
    good = [completion(f"{shared}{index}", logit_bias=ASCII) for index in range(6)]
    good = [body | {"logit_bias": ASCII | {str(ord(POISON)): -100}} for body in good]
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
    assert vital_signs(poisoned) == before


def test_logits_that_are_no_numbers_late_in_a_stream(poisoned: LiveServer) -> None:
    """40: what was sent stays, then comes the error."""
    bias = {str(ord(POISON)): 100, **{str(token): -100 for token in (END_ID,)}}
    body = completion("Say it.", temperature=0, stream=True, logit_bias=bias)
    messages = events(poisoned.ask(COMPLETION, body).body)
    assert messages[0]["choices"][0]["text"] == POISON
    assert_error(messages[-1]["error"])
    assert messages[-1]["error"]["code"] == "generation_failed"
