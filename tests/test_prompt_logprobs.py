"""Logprobs of the prompt: the same bits for any chunks, cache, draft and load."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY_VOCAB, EngineFactory, ids, run, write_tiny_llama
from torch import Tensor
from transformers import AutoModelForCausalLM

from specserve import LLM
from specserve.engine.engine import Engine
from specserve.types import (
    PromptLogprobs,
    Request,
    RequestError,
    SamplingParams,
    StepOutput,
    TokenLogprobs,
)

NUM_TOP = 3
PROMPT = tuple(random.Random(0).choices(range(TINY_VOCAB - 1), k=150))


def params(**changes: Any) -> SamplingParams:
    fields = {"temperature": 0.0, "max_tokens": 6, "seed": 0, "prompt_logprobs": NUM_TOP}
    return SamplingParams(**(fields | {"ignore_eos": True} | changes))


def scores(outputs: list[StepOutput]) -> PromptLogprobs:
    return sum((output.prompt_logprobs for output in outputs), ())


@pytest.fixture
def expected(make_engine: EngineFactory) -> PromptLogprobs:
    """In one chunk, on an engine of its own."""
    (outputs,) = run(make_engine(max_num_batched_tokens=256), [PROMPT], params())
    return scores(outputs)


def test_they_are_those_of_the_model(expected: PromptLogprobs, tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.inference_mode():
        logprobs = model(torch.tensor([PROMPT])).logits[0].log_softmax(-1)
    assert len(expected) == len(PROMPT)
    assert expected[0] is None
    for at, entry in enumerate(expected[1:], start=1):
        assert isinstance(entry, TokenLogprobs)
        assert entry.token_id == PROMPT[at]
        assert entry.logprob == pytest.approx(float(logprobs[at - 1, PROMPT[at]]), abs=1e-4)
        values, best = logprobs[at - 1].topk(NUM_TOP)
        assert [token for token, _ in entry.top] == best.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_they_are_the_logprobs_of_generation(make_engine: EngineFactory) -> None:
    """Bit for bit: a text scored as a prompt, and the same text generated."""
    generating = params(max_tokens=40, logprobs=NUM_TOP, prompt_logprobs=None, temperature=0.9)
    (outputs,) = run(make_engine(), [PROMPT[:20]], generating)
    (scored,) = run(make_engine(), [PROMPT[:20] + ids(outputs)], params(max_tokens=0))
    generated = tuple(entry for output in outputs for entry in output.logprobs)
    assert scores(scored)[20:] == generated


@pytest.mark.parametrize("seed", range(8))
def test_neither_chunks_nor_cache_nor_load_nor_draft_changes_them(
    seed: int, expected: PromptLogprobs, make_engine: EngineFactory, tiny_model: Path
) -> None:
    """Scored prompts among others, with little room: cached prefixes, preemption, speculation."""
    rng = random.Random(seed)
    engine = make_engine(
        rng.choice(["none", "ngram", str(tiny_model)]),
        kv_slots=rng.choice([288, 336, 2048]),
        block_size=16,
        max_num_seqs=8,
        max_num_batched_tokens=rng.choice([8, 13, 32, 64, 200]),
        cost_aware=False,
    )
    unscored = params(prompt_logprobs=None, max_tokens=24)
    requests = [(PROMPT[: rng.randint(20, 150)], unscored) for _ in range(3)]
    for _ in range(4):
        sampling = params(max_tokens=rng.choice([0, 1, 24]))
        requests.append((PROMPT[: rng.randint(1, 150)], sampling))
    requests += [(PROMPT, params(max_tokens=30))] * 2
    rng.shuffle(requests)
    prompts, sampling_params = map(list, zip(*requests, strict=True))
    outputs = run(engine, prompts, sampling_params)
    for (prompt, sampling), each in zip(requests, outputs, strict=True):
        assert scores(each) == (() if sampling is unscored else expected[: len(prompt)])
        assert len(ids(each)) == sampling.max_tokens
        assert each[-1].finish == "length"


def test_a_preemption_in_the_prompt_and_after_it(
    expected: PromptLogprobs, make_engine: EngineFactory
) -> None:
    """Nothing is returned twice. What is scored already may come from the cache afterwards."""
    for max_rows, num_top in ((4, NUM_TOP), (64, NUM_TOP)):
        engine = make_engine(
            kv_slots=208, block_size=16, max_num_seqs=2, max_num_batched_tokens=max_rows
        )
        growing = params(max_tokens=100, prompt_logprobs=num_top)
        first, second = run(engine, [PROMPT[:20], PROMPT], [growing, params(max_tokens=40)])
        assert engine.scheduler.num_preemptions > 0, "the test is meant to preempt"
        assert scores(first) == expected[:20]
        assert scores(second) == expected
        assert len(ids(second)) == 40


def test_a_scored_prompt_fills_the_prefix_cache_and_does_not_use_it(
    make_engine: EngineFactory,
) -> None:
    engine = make_engine(block_size=16)
    for sampling, cached in ((params(), 0), (params(), 0), (params(prompt_logprobs=None), 144)):
        (outputs,) = run(engine, [PROMPT], sampling)
        assert outputs[-1].num_cached_tokens == cached


def test_samples_of_a_prompt_compute_it_once(make_engine: EngineFactory) -> None:
    engine = make_engine(block_size=16)
    samples = params(n=4).samples()
    assert [each.prompt_logprobs for each in samples] == [NUM_TOP, None, None, None]
    outputs = run(engine, [PROMPT] * 4, samples)
    assert [each[-1].num_cached_tokens for each in outputs] == [0, 144, 144, 144]


@pytest.mark.parametrize("draft", ["none", "self"])
@pytest.mark.parametrize("prompt_logprobs", [None, 0])
def test_no_tokens_are_generated_if_none_are_wanted(
    draft: str, prompt_logprobs: int | None, make_engine: EngineFactory, tiny_model: Path
) -> None:
    engine = make_engine(str(tiny_model) if draft == "self" else draft)
    prompts = [PROMPT, PROMPT[:1]]
    for prompt, outputs in zip(
        prompts,
        run(engine, prompts, params(max_tokens=0, prompt_logprobs=prompt_logprobs)),
        strict=True,
    ):
        assert ids(outputs) == ()
        assert outputs[-1].finish == "length"
        assert outputs[-1].stats is not None
        assert outputs[-1].stats.num_spec_steps == 0
        entries = scores(outputs)
        assert len(entries) == (0 if prompt_logprobs is None else len(prompt))
        assert all(entry is not None and entry.top == () for entry in entries[1:])


def test_a_prompt_that_fills_the_context(make_engine: EngineFactory) -> None:
    engine = make_engine(kv_slots=512)
    prompt = tuple(at % 90 for at in range(512))
    (outputs,) = run(engine, [prompt], params(max_tokens=0))
    assert len(scores(outputs)) == 512
    with pytest.raises(RequestError, match="leave no room"):
        engine.submit(Request("long", (*prompt, 1), params(max_tokens=0)))


def test_logits_of_few_rows_are_in_memory_at_once(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, num_rows = make_engine(max_num_batched_tokens=256), list[int]()
    logits = engine.parts.model.logits

    def counted(x: Tensor) -> Tensor:
        num_rows.append(len(x))
        return logits(x)

    monkeypatch.setattr(engine.parts.model, "logits", counted)
    run(engine, [PROMPT], params(max_tokens=0))
    assert sum(num_rows) >= len(PROMPT) - 1
    assert max(num_rows) <= 64


def test_a_prompt_that_cannot_be_scored_fails_alone(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine()
    others = [PROMPT[:30], PROMPT[30:60]]
    expected = [ids(each) for each in run(engine, others, params(prompt_logprobs=None))]

    def nan(x: Tensor) -> Tensor:
        return torch.full((len(x), TINY_VOCAB), torch.nan)

    monkeypatch.setattr(engine.scorer, "model", type("Nan", (), {"logits": staticmethod(nan)}))
    sampling = [params(prompt_logprobs=None), params(), params(prompt_logprobs=None)]
    first, bad, last = run(engine, [others[0], PROMPT, others[1]], sampling)
    assert [ids(first), ids(last)] == expected
    assert bad[-1].finish == "error"
    assert "not numbers" in (bad[-1].error or "")
    assert engine.kv.pool.num_available == engine.kv.pool.num_blocks


@pytest.mark.parametrize("kind", ["int8", "floats", "heads"])
def test_models_in_one_native_call_and_heads_that_need_hidden_states(
    kind: str, tmp_path: Path, tiny_heads: list[Path], make_engine: EngineFactory
) -> None:
    """The hidden states of a scored pass reach the drafters as in any other."""
    target, drafts = None, ["none", *map(str, tiny_heads)]
    if kind != "heads":
        target, drafts = write_tiny_llama(tmp_path / "wide", seed=3, head_dim=16), ["none"]
    quantization = "int8" if kind == "int8" else "none"

    def engine(draft: str, max_rows: int) -> Engine:
        settings = {"quantization": quantization, "cost_aware": False, "max_num_seqs": 4}
        return make_engine(draft, target=target, max_num_batched_tokens=max_rows, **settings)

    results = []
    for draft in drafts:
        for max_rows in (16, 256):
            used = engine(draft, max_rows)
            results.append(run(used, [PROMPT], params(logprobs=1, prompt_logprobs=1))[0])
            assert not any(each.num_failures for each in used.stats().drafters)
    assert len({scores(each) for each in results}) == len({ids(each) for each in results}) == 1
    text = PROMPT + ids(results[0])
    (scored,) = run(engine("none", 64), [text], params(max_tokens=0, prompt_logprobs=1))
    generated = tuple(entry for output in results[0] for entry in output.logprobs)
    assert scores(scored)[len(PROMPT) :] == generated


def test_from_python(tiny_model: Path, expected: PromptLogprobs) -> None:
    llm = LLM(str(tiny_model), draft="none", dtype="float32", kv_memory="4MiB")
    first, second = llm.generate(
        [PROMPT, PROMPT[:9]], [params(n=2), params(max_tokens=0, prompt_logprobs=None)]
    )
    assert first.prompt_logprobs == expected
    assert len(first.completions) == 2
    assert second.prompt_logprobs is None
    assert (second.token_ids, second.finish_reason) == ((), "length")
