"""The real model through the offline API: parity with transformers, exactness, text."""

import re
from pathlib import Path

import pytest
import torch
from gguf_models import load_reference
from msgspec.structs import replace
from transformers import AutoConfig

from specserve import LLM, SamplingParams
from specserve.hub import resolve
from specserve.tree import PREDICTION_ID
from specserve.types import Prompt

pytestmark = pytest.mark.slow

QUESTIONS = [
    "What is the capital of France?",
    "Write a haiku about rain.",
    "Explain photosynthesis to a child.",
    "List three prime numbers above 50.",
    "Translate to German: Good morning, my friend.",
    "Summarise: The cat sat on the mat. The mat was red. The cat was happy.",
    "Write a Python function that reverses a string.",
    "Who wrote Hamlet?",
    "A train travels 60 km in 45 minutes. What is its speed?",
    "Name the planets of the solar system.",
    "Give me a recipe for pancakes.",
    "What is the difference between a list and a tuple?",
    "Tell me a short story about a dragon.",
    "Why is the sky blue?",
    "Repeat after me: one two three, one two three, one two three.",
    "Write an email asking for a day off.",
]
CHATS = [[{"role": "user", "content": question}] for question in QUESTIONS]
SETTINGS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=24),
    "nucleus": SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=24),
    "penalties": SamplingParams(
        temperature=1.0,
        presence_penalty=0.5,
        frequency_penalty=0.4,
        repetition_penalty=1.1,
        min_p=0.05,
        logit_bias={198: -2.0, 28: 1.0},
        seed=11,
        max_tokens=24,
    ),
}


@pytest.fixture(scope="module")
def directory() -> Path:
    return resolve("smollm2-135m")


@pytest.fixture(scope="module")
def plain() -> LLM:
    return LLM("smollm2-135m", draft="none", device="cpu", kv_memory="256MiB")


@pytest.fixture(scope="module")
def ngram() -> LLM:
    # How many nodes are worth their rows is the machine's to say: here all of them.
    return LLM("smollm2-135m", draft="ngram", device="cpu", kv_memory="256MiB", cost_aware=False)


@pytest.fixture(scope="module")
def auto() -> LLM:
    return LLM("smollm2-135m", device="cpu", kv_memory="256MiB", cost_aware=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_greedy_ids_are_those_of_transformers(directory: Path) -> None:
    """16 prompts x 64 tokens, fp32: given the ids so far, transformers picks the same next one.

    By induction that is its own greedy text; a difference must be a tie of its logits.
    """
    llm = LLM(
        str(directory),
        draft="none",
        device="cpu",
        dtype="float32",
        quantization="none",
        kv_memory="512MiB",
    )
    results = llm.generate(CHATS, SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True))
    theirs = load_reference(directory / "model.gguf", AutoConfig.from_pretrained(directory))
    for result in results:
        ids, start = [*result.prompt_ids, *result.token_ids], len(result.prompt_ids)
        assert len(result.token_ids) == 64, result.error
        with torch.inference_mode():
            logits = theirs(torch.tensor([ids])).logits[0, start - 1 : -1]
        ours = logits.gather(1, torch.tensor(result.token_ids)[:, None])[:, 0]
        behind = logits.amax(1) - ours
        assert behind.max() < 1e-4, f"{behind.max()} at {int(behind.argmax())}"


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Name three colours.", "red|blue|green|yellow|white"),
        ("How many days are in a week?", "7|seven"),
        ("What is 2+2?", "4"),
        ("Say hello in French", "bonjour"),
    ],
)
def test_the_default_sampling_answers_plain_questions(
    question: str, expected: str, auto: LLM
) -> None:
    """At least 7 of 8 answers; at temperature 1 a quarter to a half of them are right."""
    params = replace(auto.default_sampling_params, n=8, seed=1, max_tokens=40)
    assert (params.temperature, params.top_p) == (0.2, 0.9)
    (result,) = auto.generate([{"role": "user", "content": question}], params)
    texts = [completion.text for completion in result.completions]
    assert sum(re.search(expected, text, re.IGNORECASE) is not None for text in texts) >= 7, texts


@pytest.mark.parametrize("setting", SETTINGS)
def test_ngram_writes_what_plain_decoding_writes(setting: str, plain: LLM, ngram: LLM) -> None:
    """Alone and in a batch of 12, id by id, in the default (exact) mode."""
    assert plain.engine.platform.exact
    chats, params = CHATS[:12], SETTINGS[setting]
    expected = [result.token_ids for result in plain.generate(chats, params)]
    assert [result.token_ids for result in ngram.generate(chats, params)] == expected
    alone = [ngram.generate([chat], params)[0].token_ids for chat in chats[4:6]]
    assert alone == expected[4:6]


@pytest.mark.parametrize("setting", SETTINGS)
def test_auto_writes_what_plain_decoding_writes(setting: str, plain: LLM, auto: LLM) -> None:
    """With the head that ships, however it draws."""
    assert list(auto.engine.drafter.names) == ["recycle", "eagle"]
    chats, params = CHATS[:4], SETTINGS[setting]
    expected = [result.token_ids for result in plain.generate(chats, params)]
    before = {drafter.name: drafter.num_accepted for drafter in auto.engine.stats().drafters}
    assert [result.token_ids for result in auto.generate(chats, params)] == expected
    after = {drafter.name: drafter.num_accepted for drafter in auto.engine.stats().drafters}
    assert after["eagle"] - before["eagle"] > 5


def test_a_bad_request_in_a_batch_ends_alone(plain: LLM, ngram: LLM) -> None:
    good = SETTINGS["greedy"]
    prompts: list[Prompt] = [
        CHATS[0],
        "",
        CHATS[1],
        [1, 10**6],
        [{"role": "robot"}],
        "word " * 9000,
    ]
    params = [good, good, SamplingParams(top_p=0.0), good, good, good]
    results = ngram.generate(prompts, params)
    assert results[0].token_ids == plain.generate(CHATS[0], good)[0].token_ids
    errors = [result.error or "" for result in results]
    assert errors[0] == ""
    assert "prompt" in errors[1]
    assert "empty" in errors[1]
    assert "top_p: 0.0 is out of range; expected" in errors[2]
    assert "token id 1000000 is not in the vocabulary" in errors[3]
    assert "messages[0]" in errors[4]
    assert "context of 8192" in errors[5]
    assert all(result.finish_reason == "error" for result in results[1:])


def test_n_samples_differ_and_repeat(ngram: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, n=3, max_tokens=16)
    first, second = (ngram.generate(CHATS[12], params)[0] for _ in range(2))
    texts = [completion.text for completion in first.completions]
    assert len(set(texts)) == 3
    assert texts == [completion.text for completion in second.completions]
    one = SamplingParams(temperature=1.0, seed=3, max_tokens=16)
    assert ngram.generate(CHATS[12], one)[0].text == texts[0]


def test_streamed_text_is_the_text(ngram: LLM) -> None:
    pieces: dict[int, list[str]] = {0: [], 1: []}
    chats = [CHATS[4], [{"role": "user", "content": "Say: 日本語 🎉 naïve café"}]]
    results = ngram.generate(
        chats, SETTINGS["nucleus"], on_text=lambda index, piece: pieces[index].append(piece)
    )
    for index, result in enumerate(results):
        assert "".join(pieces[index]) == result.text
        assert result.text == ngram.tokenizer.decode(list(result.token_ids))


def test_a_stop_string_ends_the_text_before_it(plain: LLM, ngram: LLM) -> None:
    full = plain.generate(CHATS[9], SamplingParams(temperature=0.0, max_tokens=40))[0].text
    stop = full[17:22]
    pieces: list[str] = []
    result = ngram.generate(
        CHATS[9],
        SamplingParams(temperature=0.0, max_tokens=40, stop=(stop,)),
        on_text=lambda _, piece: pieces.append(piece),
    )[0]
    assert result.text == full[: full.index(stop)]
    assert "".join(pieces) == result.text, "text behind a stop string was shown"
    assert (result.finish_reason, result.completions[0].stop_reason) == ("stop", stop)


def test_min_tokens_spares_an_earlier_stop_string(ngram: LLM) -> None:
    """The text is cut at the occurrence that ended it, not at the one min_tokens let pass."""
    plain = SamplingParams(temperature=0.0, max_tokens=60)
    text = ngram.generate(CHATS[14], plain)[0].text  # "One two three, one two three, ..."
    words = text.split()
    stop = next(word for word in words if words.count(word) > 1)
    first = len(ngram.tokenizer.encode(text[: text.index(stop) + len(stop)]))
    result = ngram.generate(CHATS[14], replace(plain, min_tokens=first + 1, stop=(stop,)))[0]
    assert result.finish_reason == "stop"
    assert len(result.token_ids) > first
    assert stop in result.text
    assert text.startswith(result.text + stop)


def test_a_prediction_is_accepted(plain: LLM, ngram: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40)
    answer = plain.generate(CHATS[9], params)[0]
    told = ngram.generate(CHATS[9], params, predictions=[answer.text])[0]
    assert told.token_ids == answer.token_ids
    assert told.stats.mean_acceptance_length > 2
    assert told.completions[0].drafter_ids.count(PREDICTION_ID) > 0.6 * len(answer.token_ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_drafting_for_itself_every_chain_token_is_accepted(
    temperature: float, directory: Path
) -> None:
    chain = {"draft_lm": {"branching": 1, "beam": 1}}
    llm = LLM(
        str(directory),
        draft=str(directory),
        options=chain,
        device="cpu",
        max_nodes=6,
        cost_aware=False,
        kv_memory="512MiB",
    )
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=49, ignore_eos=True)
    for result in llm.generate(CHATS[:8], params):
        stats = result.stats
        assert stats.num_spec_steps == 9  # 8 passes of 6 tokens and the last one
        assert stats.num_draft_tokens == stats.num_accepted_draft_tokens == 40
