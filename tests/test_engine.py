"""The engine with tiny models: stopping, isolation of failures, memory, queues."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY_EOS, TINY_VOCAB, EngineFactory, ids, run, write_tiny_llama

from specserve.config import ConfigError
from specserve.types import Request, RequestError, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, seed=0)
PROMPT = (1, 2, 3, 4, 1, 2, 3, 4, 1, 2)
OTHERS = [tuple(range(20, 60)), (7, 8, 9)]


def with_params(**changes: Any) -> SamplingParams:
    return SamplingParams(**({"temperature": 0.0, "max_tokens": 24, "seed": 0} | changes))


@pytest.fixture(params=["none", "self"])
def draft(request: pytest.FixtureRequest, tiny_model: Path) -> str:
    """Plain decoding, and a draft that is always right: long accepted runs to cut."""
    return "none" if request.param == "none" else str(tiny_model)


class TestStopping:
    """A request ends at the same token with and without speculation, and counts stop there."""

    def full(self, make_engine: EngineFactory, prompt: tuple[int, ...] = PROMPT) -> tuple[int, ...]:
        return ids(run(make_engine("none"), [prompt], with_params(ignore_eos=True))[0])

    def test_max_tokens_cuts_an_accepted_run(self, draft: str, make_engine: EngineFactory) -> None:
        full = self.full(make_engine)
        for count in (1, 2, 5, 7, 8, 9, 24):
            params = with_params(max_tokens=count, ignore_eos=True)
            outputs = run(make_engine(draft), [PROMPT], params)[0]
            assert ids(outputs) == full[:count]
            assert outputs[-1].finish == "length"
            stats = outputs[-1].stats
            assert stats is not None
            assert stats.num_emitted_tokens == count
            assert stats.num_accepted_draft_tokens <= count

    def test_stop_token_cuts_an_accepted_run(self, draft: str, make_engine: EngineFactory) -> None:
        full = self.full(make_engine)
        for index in (0, 3, 10):
            stop = full[index]
            expected = full[: full.index(stop) + 1]
            params = with_params(stop_token_ids=(stop,), ignore_eos=True)
            last = (outputs := run(make_engine(draft), [PROMPT], params)[0])[-1]
            assert ids(outputs) == expected
            assert (last.finish, last.stop_reason) == ("stop", stop)
            assert last.stats is not None
            assert last.stats.num_emitted_tokens == len(expected)

    def test_eos_ends_unless_ignored(self, draft: str, make_engine: EngineFactory) -> None:
        bias = {TINY_EOS: 100.0}
        ended = run(make_engine(draft), [PROMPT], with_params(logit_bias=bias))[0]
        assert ids(ended) == (TINY_EOS,)
        assert ended[-1].finish == "stop"
        ignoring = run(make_engine(draft), [PROMPT], with_params(logit_bias=bias, ignore_eos=True))[
            0
        ]
        assert ids(ignoring) == (TINY_EOS,) * 24

    def test_min_tokens_holds_eos_back(self, draft: str, make_engine: EngineFactory) -> None:
        params = with_params(logit_bias={TINY_EOS: 100.0}, min_tokens=7)
        outputs = run(make_engine(draft), [PROMPT], params)[0]
        assert ids(outputs).index(TINY_EOS) == 7
        assert len(ids(outputs)) == 8


def test_logprobs_are_the_models_own(draft: str, make_engine: EngineFactory) -> None:
    """Whatever the sampling, and equal with and without speculation, value by value."""
    params = with_params(temperature=0.8, top_k=5, logprobs=3, logit_bias={4: 2.0})
    plain = run(make_engine("none"), [PROMPT], params)[0]
    outputs = run(make_engine(draft), [PROMPT], params)[0]
    entries = [entry for output in outputs for entry in output.logprobs]
    assert entries == [entry for output in plain for entry in output.logprobs]
    assert tuple(entry.token_id for entry in entries) == ids(outputs)
    for entry in entries:
        assert len(entry.top) == 3
        assert list(entry.top) == sorted(entry.top, key=lambda pair: -pair[1])
        assert dict(entry.top).get(entry.token_id, entry.logprob) == entry.logprob
        assert sum(torch.tensor([logprob for _, logprob in entry.top]).exp()) <= 1.0


BAD_REQUESTS: list[tuple[str, dict[str, Any]]] = [
    ("temperature", {"temperature": float("nan")}),
    ("temperature", {"temperature": 1e-45}),
    ("top_p", {"top_p": 0.0}),
    ("top_k", {"top_k": TINY_VOCAB + 1}),
    ("repetition_penalty", {"repetition_penalty": 0.0}),
    ("logit_bias", {"logit_bias": {TINY_VOCAB: 1.0}}),
    ("stop_token_ids", {"stop_token_ids": (-1,)}),
    ("stop", {"stop": ("x",)}),  # this engine has no tokenizer
    ("max_tokens", {"max_tokens": 4096}),
    ("min_tokens", {"min_tokens": 25}),
    ("seed", {"seed": -1}),
    ("logprobs", {"logprobs": 21}),
]


@pytest.mark.parametrize(("field", "change"), BAD_REQUESTS)
def test_a_bad_parameter_is_named_and_others_finish(
    field: str, change: dict[str, Any], draft: str, make_engine: EngineFactory
) -> None:
    expected = [ids(outputs) for outputs in run(make_engine("none"), OTHERS, GREEDY)]
    engine = make_engine(draft)
    for index, prompt in enumerate(OTHERS):
        engine.submit(Request(f"good{index}", prompt, GREEDY))
    engine.step()
    with pytest.raises(RequestError) as error:
        engine.submit(Request("bad", PROMPT, with_params(**change)))
    assert error.value.param.startswith(field)
    assert "expected" in str(error.value) or "use" in str(error.value) or "ask" in str(error.value)
    got: dict[str, tuple[int, ...]] = {}
    first = {f"good{i}": expected[i] for i in range(len(OTHERS))}
    while engine.has_work:
        for output in engine.step():
            got[output.id] = got.get(output.id, ()) + output.ids
    for name, whole in first.items():
        assert got[name] == whole[len(whole) - len(got[name]) :]
    assert engine.kv.pool.num_available == engine.kv.pool.num_blocks


@pytest.mark.parametrize(
    ("prompt", "field", "message"),
    [
        ((), "prompt", "empty"),
        ((1, TINY_VOCAB), "prompt", f"token id {TINY_VOCAB} is not in the vocabulary"),
        ((1, -1), "prompt", "token id -1"),
        ((1,) * 512, "prompt", "context of 512; shorten it"),
        ((1,) * 500, "max_tokens", "ask for at most 12"),
        ((1,) * 200, "prompt", "KV pool of 160 tokens.*raise kv_memory"),
        ((1,) * 150, "max_tokens", "KV pool of 160 tokens"),
    ],
)
def test_a_prompt_that_cannot_be_served_is_refused(
    prompt: tuple[int, ...], field: str, message: str, make_engine: EngineFactory
) -> None:
    engine = make_engine("ngram", kv_slots=160)
    with pytest.raises(RequestError, match=message) as error:
        engine.submit(Request("bad", prompt, GREEDY))
    assert error.value.param == field
    assert ids(run(engine, [PROMPT], GREEDY)[0])


def test_a_failed_pass_ends_only_the_request_at_fault(
    draft: str, make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass raises while one request is in it: that request ends, the others continue."""
    expected = [ids(outputs) for outputs in run(make_engine("none"), OTHERS, GREEDY)]
    engine = make_engine(draft)
    forward = engine.runner.forward

    def failing(entries, trees):  # type: ignore[no-untyped-def]
        if any(entry.seq.id == "q0" and entry.seq.num_output >= 3 for entry in entries):
            raise RuntimeError("out of memory")
        return forward(entries, trees)

    monkeypatch.setattr(engine.runner, "forward", failing)
    poisoned, *others = run(engine, [PROMPT, *OTHERS], GREEDY)
    assert poisoned[-1].finish == "error"
    assert "out of memory" in (poisoned[-1].error or "")
    assert [ids(outputs) for outputs in others] == expected
    assert engine.kv.pool.num_available == engine.kv.pool.num_blocks


@pytest.mark.parametrize("num_bad", [1, TINY_VOCAB])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_end_only_their_request(
    value: float,
    num_bad: int,
    draft: str,
    make_engine: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """-inf for a single token is allowed: the model excludes that token."""
    expected = [ids(outputs) for outputs in run(make_engine("none"), OTHERS, GREEDY)]
    engine = make_engine(draft)
    forward = engine.runner.forward

    def poisoned_forward(entries, trees):  # type: ignore[no-untyped-def]
        out = forward(entries, trees)
        row = 0
        for entry in entries:
            rows = len(trees[entry.seq.id]) if entry.num_nodes else 0
            if entry.seq.id == "q0" and entry.seq.num_output >= 2:
                out.logits[row : row + rows, :num_bad] = value
            row += rows
        return out

    monkeypatch.setattr(engine.runner, "forward", poisoned_forward)
    poisoned, *others = run(engine, [PROMPT, *OTHERS], GREEDY)
    if num_bad == 1 and value == -torch.inf:
        assert poisoned[-1].finish == "length"
    else:
        assert poisoned[-1].finish == "error"
        assert "not numbers" in (poisoned[-1].error or "")
    assert [ids(outputs) for outputs in others] == expected
    assert engine.kv.pool.num_available == engine.kv.pool.num_blocks


def test_a_sampling_error_ends_only_its_request(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [ids(outputs) for outputs in run(make_engine("none"), OTHERS, GREEDY)]
    engine = make_engine("ngram")
    sampler = engine.verifier.sampler
    process = sampler.process

    def failing(logits, rows):  # type: ignore[no-untyped-def]
        if any(row.state.num_prompt == len(PROMPT) and row.position > 12 for row in rows):
            raise ValueError("bad state")
        return process(logits, rows)

    monkeypatch.setattr(sampler, "process", failing)
    poisoned, *others = run(engine, [PROMPT, *OTHERS], GREEDY)
    assert poisoned[-1].finish == "error"
    assert "bad state" in (poisoned[-1].error or "")
    assert [ids(outputs) for outputs in others] == expected


def test_a_shared_prefix_is_stored_once(tmp_path: Path, make_engine: EngineFactory) -> None:
    """64 requests that arrive together with the same 512 tokens: one copy, computed once."""
    prefix = tuple((i * 31 + i // 7) % TINY_VOCAB for i in range(512))
    target = write_tiny_llama(tmp_path, seed=1, context=1024)
    engine = make_engine("ngram", target=target, max_num_seqs=64, kv_slots=4096)
    for index in range(64):
        params = SamplingParams(temperature=0.0, max_tokens=8, seed=index, ignore_eos=True)
        engine.submit(Request(f"r{index}", (*prefix, index, index), params))
    peak, cached = 0, []
    while engine.has_work:
        for output in engine.step():
            if output.finish:
                cached.append(output.num_cached_tokens)
        engine.check_integrity()
        peak = max(peak, engine.stats().kv_slots_allocated)
    assert sorted(cached) == [0] + [512] * 63
    assert peak <= 512 + 64 * 16


def test_prefixes_are_shared_at_equal_salt_only(make_engine: EngineFactory) -> None:
    engine = make_engine("none")
    prompt = tuple(range(64))
    cached = []
    for index, salt in enumerate(["a", "b", "a"]):
        engine.submit(Request(f"r{index}", prompt, GREEDY, cache_salt=salt))
        while engine.has_work:
            cached += [o.num_cached_tokens for o in engine.step() if o.finish]
    assert cached == [0, 0, 48]


def test_most_allocated_kv_slots_are_used(make_engine: EngineFactory) -> None:
    """200-token sequences at block size 16: above 0.9 of the allocated slots hold KV."""
    engine = make_engine("ngram", max_num_seqs=16, kv_slots=16 * 320)
    for index in range(16):
        prompt = tuple((index * 7 + i) % TINY_VOCAB for i in range(150 + index))
        params = SamplingParams(temperature=1.0, max_tokens=80, seed=index, ignore_eos=True)
        engine.submit(Request(f"r{index}", prompt, params))
    measured = []
    while engine.has_work:
        engine.step()
        lengths = [seq.num_tokens for seq in engine.scheduler.running]
        if len(lengths) >= 8 and min(lengths) >= 180 and max(lengths) <= 230:
            stats = engine.stats()
            measured.append(stats.kv_slots_used / stats.kv_slots_allocated)
    assert len(measured) >= 5
    assert min(measured) > 0.9


def test_abort_releases_all_blocks(draft: str, make_engine: EngineFactory) -> None:
    engine = make_engine(draft, max_num_seqs=2)
    for index in range(4):  # two run, two wait
        engine.submit(Request(f"r{index}", OTHERS[0], GREEDY))
    engine.step()
    for index in range(4):
        engine.abort(f"r{index}")
    engine.abort("never heard of")
    outputs = engine.step()
    assert [output.finish for output in outputs] == ["abort"] * 4
    assert not engine.has_work
    assert engine.kv.pool.num_available == engine.kv.pool.num_blocks


def test_a_deadline_ends_a_waiting_request(make_engine: EngineFactory) -> None:
    engine = make_engine("none", max_num_seqs=1)
    late = time.monotonic() - 1
    engine.submit(Request("runs", PROMPT, GREEDY))
    engine.step()
    engine.submit(Request("waits", PROMPT, GREEDY, deadline=late))
    outputs = engine.step()
    assert [(o.id, o.finish) for o in outputs if o.finish] == [("waits", "abort")]
    assert "deadline" in (outputs[0].error or "")


def test_higher_priority_runs_first(make_engine: EngineFactory) -> None:
    engine = make_engine("none", max_num_seqs=1)
    for name, priority in (("low", 0), ("high", 5), ("middle", 3)):
        engine.submit(Request(name, PROMPT, GREEDY, priority=priority))
    finished = []
    while engine.has_work:
        finished += [output.id for output in engine.step() if output.finish]
    assert finished == ["high", "middle", "low"]


def test_a_duplicate_id_is_refused(make_engine: EngineFactory) -> None:
    engine = make_engine("none")
    engine.submit(Request("same", PROMPT, GREEDY))
    with pytest.raises(RequestError, match="id"):
        engine.submit(Request("same", PROMPT, GREEDY))
    engine.step()
    with pytest.raises(RequestError, match="id"):
        engine.submit(Request("same", PROMPT, GREEDY))


def test_settings_out_of_range_are_refused(make_engine: EngineFactory) -> None:
    with pytest.raises(ConfigError, match=r"kv_memory.*give at least"):
        make_engine("none", kv_memory="1KiB")
    with pytest.raises(ConfigError, match=r"max_model_len.*use at most 512"):
        make_engine("none", max_model_len=513)
    with pytest.raises(ConfigError, match="device"):
        make_engine("none", device="tpu")
