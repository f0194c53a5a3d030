"""The accepted and rejected tokens of a prediction in `usage` add up to its length."""

from collections.abc import Iterator
from string import ascii_lowercase
from typing import Any, Final

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import LiveServer, start_server
from refusal import CHAT, COMPLETION
from tiny import write_tiny_llama
from tiny_text import BOS, SPECIAL, write_byte_tokenizer

from specserve.server.prediction_usage import PredictionUsage
from specserve.tree import PREDICTION_ID

TOKENS = st.lists(st.integers(0, 5), max_size=20).map(tuple)
MAX_TOKENS: Final = 30


@given(TOKENS, st.data())
def test_an_answer_equal_to_the_prediction_accepts_all_of_it(
    prediction: tuple[int, ...], data: st.DataObject
) -> None:
    """Whoever proposed each token, and in any split."""
    proposers = st.sampled_from([0, 1, PREDICTION_ID])
    drafter_ids = data.draw(
        st.lists(proposers, min_size=len(prediction), max_size=len(prediction)), label="drafter_ids"
    )
    usage = PredictionUsage(prediction)
    cut = data.draw(st.integers(0, len(prediction)), label="cut")
    usage.feed(prediction[:cut], drafter_ids[:cut])
    usage.feed(prediction[cut:], drafter_ids[cut:])
    assert usage.num_accepted == len(prediction)


@given(TOKENS, TOKENS, st.data())
def test_accepted_never_exceeds_the_prediction(
    prediction: tuple[int, ...], answer: tuple[int, ...], data: st.DataObject
) -> None:
    drafted = [token in prediction and data.draw(st.booleans()) for token in answer]
    usage = PredictionUsage(prediction)
    usage.feed(answer, [PREDICTION_ID if each else 0 for each in drafted])
    assert min(sum(drafted), len(prediction)) <= usage.num_accepted <= len(prediction)


def test_an_insertion_rejects_nothing_else() -> None:
    usage = PredictionUsage((1, 2, 3, 4, 5))
    usage.feed((1, 2, 9, 3, 4, 5), (0, PREDICTION_ID, 0, 0, PREDICTION_ID, PREDICTION_ID))
    assert usage.num_accepted == 5


def test_omitted_tokens_are_rejected() -> None:
    usage = PredictionUsage((1, 2, 3, 4, 5))
    usage.feed((1, 4, 5), (PREDICTION_ID, 0, PREDICTION_ID))
    assert usage.num_accepted == 2


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """Its tokenizer puts a control token before every text; the answers are letters."""
    model = tmp_path_factory.mktemp("predicted") / "tiny"
    write_tiny_llama(model, seed=4, vocab_size=BOS + len(SPECIAL))
    with start_server(write_byte_tokenizer(model), "--draft", "ngram", "--no-cost-aware") as live:
        yield live


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("n", [1, 2])
def test_a_perfect_prediction_has_nothing_rejected(server: LiveServer, path: str, n: int) -> None:
    prompt: dict[str, Any] = {"prompt": "hi"}
    if path == CHAT:
        prompt = {"messages": [{"role": "user", "content": "hi"}]}
    letters = server.ask("/tokenize", {"prompt": ascii_lowercase, "add_special_tokens": False})
    bias = {str(token): 100 for token in letters.json()["tokens"]}
    greedy = {"temperature": 0, "logit_bias": bias, "max_tokens": MAX_TOKENS, "n": n}
    body = prompt | greedy | {"return_drafter_ids": True, "return_token_ids": True}
    plain = server.ask(path, body).json()["choices"]
    text = plain[0]["message"]["content"] if path == CHAT else plain[0]["text"]
    assert len(text) == MAX_TOKENS
    answer = server.ask(path, body | {"prediction": {"type": "content", "content": text}}).json()
    assert answer["usage"]["completion_tokens_details"] == {
        "accepted_prediction_tokens": MAX_TOKENS,
        "rejected_prediction_tokens": 0,
    }
    for choice, expected in zip(answer["choices"], plain, strict=True):
        assert choice["token_ids"] == expected["token_ids"]
        assert choice["drafter_ids"][0] == PREDICTION_ID, "not drafted from its first token"
