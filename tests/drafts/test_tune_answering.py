"""Answering many prompts: order, limits of time, and what remains in the engine."""

import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from tiny_chat import write_tiny_chat

from specserve.llm import LLM
from specserve.types import Prompt, SamplingParams
from specserve_drafts.tune.answering import answer_all

SAMPLING = SamplingParams(temperature=0.8, max_tokens=20)


@pytest.fixture(scope="module")
def llm(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    model = write_tiny_chat(tiny_model, tmp_path_factory.mktemp("tiny") / "model")
    settings: dict[str, Any] = {
        "device": "cpu",
        "dtype": "float32",
        "kv_memory": "4MiB",
        "max_model_len": 128,
    }
    return LLM(str(model), draft="none", max_num_seqs=2, **settings)


def jobs(numbers: Iterator[int]) -> Iterator[tuple[Prompt, SamplingParams]]:
    """Every fourth prompt is too long."""
    for number in numbers:
        sampling = SamplingParams(temperature=0.8, max_tokens=5 + number % 16, seed=number)
        yield f"w{number % 90} " * (200 if number % 4 == 3 else 3), sampling


def test_answers_are_those_of_generate_in_the_same_order(llm: LLM) -> None:
    """Of more prompts than the engine holds at once, answered out of order."""
    emitted: list[int] = []
    answers = list(answer_all(llm, jobs(iter(range(21))), emitted.append))
    prompts, sampling = zip(*jobs(iter(range(21))), strict=True)
    expected = llm.generate(list(prompts), list(sampling))
    assert [tuple(answer.token_ids) for answer in answers] == [each.token_ids for each in expected]
    assert [answer.prompt_ids for answer in answers if answer.error is None] == [
        each.prompt_ids for each in expected if each.error is None
    ]
    assert [answer.error for answer in answers] == [each.error for each in expected]
    assert sum(emitted) == sum(len(answer.token_ids) for answer in answers)
    assert max(emitted) == 2
    assert not llm.engine.has_work


def test_at_the_end_of_the_time_answers_end_as_they_are(llm: LLM) -> None:
    started = time.monotonic()
    answers = list(answer_all(llm, jobs(count()), lambda _: None, started + 0.3))
    assert 0.3 < time.monotonic() - started < 2
    reasons = [answer.finish_reason for answer in answers]
    cut = reasons.count("abort")
    assert 0 < cut <= 8
    assert "length" in reasons[:-cut]
    assert not llm.engine.has_work
    assert list(answer_all(llm, jobs(count()), lambda _: None, started)) == []


def test_leaving_early_frees_the_engine(llm: LLM) -> None:
    answers = answer_all(llm, jobs(count()), lambda _: None)
    next(answers)
    assert llm.engine.has_work
    answers.close()
    assert not llm.engine.has_work
