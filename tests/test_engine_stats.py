"""What an engine counts is what happened, and warming it up leaves nothing behind."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import EngineFactory, ids, run

from specserve.engine.engine import Engine
from specserve.engine.warm_up import warm_up, warmup_rounds
from specserve.models.fields import ModelError
from specserve.speculation.counts import DrafterCounts
from specserve.speculation.failures import MAX_FAILURES
from specserve.step import VerifyResult
from specserve.tree import MAX_NODES, PREDICTION_ID, build_tree, chain_tree
from specserve.types import Request, RequestError, SamplingParams, SpeculationParams

PROMPTS = [tuple(range(20, 60)), (1, 2, 3, 4) * 5, (1, 2, 3, 4) * 5, (7, 8, 9)]


def sampled(index: int, max_tokens: int = 40) -> SamplingParams:
    return SamplingParams(temperature=0.6, seed=index, max_tokens=max_tokens, ignore_eos=True)


def slots_by_block(engine: Engine) -> dict[int, int]:
    """Valid slots per block, by walking every table."""
    size = engine.kv.block_size
    return {
        block_id: min(size, max(0, seq.num_committed - index * size))
        for seq in engine.scheduler.running
        for index, block_id in enumerate(seq.table.block_ids)
    }


def test_kv_numbers_are_those_of_the_block_tables(make_engine: EngineFactory) -> None:
    """With shared prefixes, preemption and aborts, after every step."""
    engine = make_engine("ngram", kv_slots=192, max_num_batched_tokens=48)
    prefix = tuple(range(32))
    for index in range(8):
        engine.submit(Request(f"r{index}", (*prefix, index), sampled(index, 80)))
    num_shared = 0
    while engine.has_work:
        engine.step()
        if engine.stats().num_steps == 9:
            engine.abort("r2")
        held, stats = slots_by_block(engine), engine.stats()
        assert stats.kv_slots_allocated == len(held) * engine.kv.block_size
        assert stats.kv_slots_used == sum(held.values())
        tables = [seq.table.block_ids for seq in engine.scheduler.running]
        num_shared += sum(map(len, tables)) > len(held)
    assert num_shared > 5, "the test is meant to share blocks"
    stats = engine.stats()
    assert stats.num_preemptions > 0, "the test is meant to preempt"
    assert stats.prompt_tokens == stats.prefix_cache_queries == 8 * 33
    assert stats.prefix_cache_hits == 7 * 32
    assert (stats.num_running, stats.num_waiting, stats.kv_slots_used) == (0, 0, 0)


def test_totals_are_the_sum_over_the_requests(tiny_model: str, make_engine: EngineFactory) -> None:
    engine = make_engine(["ngram", str(tiny_model)], max_nodes=6)
    outputs = run(engine, PROMPTS, [sampled(index) for index in range(4)])
    total, each = engine.stats(), [own[-1].stats for own in outputs]
    assert total.generation_tokens == sum(len(ids(own)) for own in outputs) == 160
    assert total.num_draft_tokens == sum(s.num_draft_tokens for s in each if s)
    assert total.num_accepted_tokens == sum(s.num_accepted_draft_tokens for s in each if s)
    drafts = total.speculation.drafted_by_depth
    assert total.num_drafts == drafts[0] <= total.speculation.num_spec_steps
    used = [each for own in outputs for output in own for each in output.drafter_ids]
    for drafter_id, drafter in enumerate(total.drafters, start=1):
        assert drafter.num_accepted == used.count(drafter_id) > 0
        assert drafter.num_proposed >= drafter.num_verified
        pairs = zip(drafter.accepted_by_depth, drafter.verified_by_depth, strict=True)
        assert all(accepted <= verified for accepted, verified in pairs)
    assert sum(drafter.num_verified for drafter in total.drafters) == total.num_draft_tokens
    assert min(total.draft_seconds, total.forward_seconds, total.sample_seconds) > 0
    assert total.commit_seconds > 0


def test_nodes_are_counted_by_drafter_and_depth() -> None:
    tree = build_tree([9, 1, 2, 4, 3], [-1, 0, 1, 1, 0], [1, 0.9, 0.8, 0.1, 0.1], 1)
    tree = replace(tree, drafter_ids=np.array([0, 1, PREDICTION_ID, 1, 2], np.uint8))
    counts = DrafterCounts(2)
    counts.propose([chain_tree(9, [1, 2], [0.9, 0.8], 1), chain_tree(9, [1], [0.9], PREDICTION_ID)])
    assert list(counts.proposed.values()) == [0, 2, 0, 1]
    counts.record_outcome([tree], [VerifyResult((0, 1, 2), (1, 2, 7), (1, PREDICTION_ID, 0), 2)])
    assert [row[1:3] for row in counts.verified.values()] == [[0, 0], [1, 1], [1, 0], [0, 1]]
    assert [row[1:3] for row in counts.accepted.values()] == [[0, 0], [1, 0], [0, 0], [0, 1]]
    counts.record_outcome([], [])
    assert sum(map(sum, counts.verified.values())) == 4


def test_predicted_nodes_count_for_the_prediction(make_engine: EngineFactory) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=24, seed=0, ignore_eos=True)
    plain = ids(run(make_engine("none"), [PROMPTS[3]], params)[0])
    engine = make_engine("ngram")
    run(engine, [PROMPTS[3]], params, speculation=SpeculationParams(prediction=plain))
    stats = engine.stats()
    assert stats.predictions.num_accepted >= 18
    assert stats.predictions.num_accepted + stats.drafters[0].num_accepted == (
        stats.num_accepted_tokens
    )


def test_a_request_chooses_its_drafters(tiny_model: str, make_engine: EngineFactory) -> None:
    engine = make_engine(["ngram", str(tiny_model)])
    only = SpeculationParams(drafters=(Path(tiny_model).name,))
    outputs = run(engine, [PROMPTS[1]], sampled(1), speculation=only)[0]
    assert {each for output in outputs for each in output.drafter_ids} == {0, 2}
    assert engine.stats().drafters[0].num_proposed == 0


def test_failures_of_a_drafter_are_reported(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where nothing else can go on without it: when a request leaves."""
    engine = make_engine("ngram")
    drafter = engine.drafter.drafters["ngram"]
    monkeypatch.setattr(drafter, "propose", None)
    monkeypatch.setattr(drafter, "forget", None)
    for number in range(MAX_FAILURES):
        (told,) = engine.stats().drafters
        assert (told.active, told.num_failures) == (True, 2 * number)
        assert len(ids(run(engine, [PROMPTS[1]], sampled(1))[0])) == 40
    assert not engine.stats().drafters[0].active


@pytest.mark.parametrize(
    ("field", "speculation"),
    [
        ("prediction", SpeculationParams(prediction=(1, 97))),
        ("speculation.max_nodes", SpeculationParams(max_nodes=0)),
        ("speculation.max_nodes", SpeculationParams(max_nodes=65)),
    ],
)
def test_speculation_that_cannot_be_done_is_refused(
    field: str, speculation: SpeculationParams, make_engine: EngineFactory
) -> None:
    """A token outside the vocabulary would otherwise switch a drafter off for everybody."""
    with pytest.raises(RequestError) as error:
        make_engine("ngram").submit(Request("bad", (1, 2), sampled(0), speculation))
    assert error.value.param == field


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"max_model_len": 2},
        {"max_num_seqs": 1, "max_nodes": 1, "max_num_batched_tokens": 1},
        {"kv_slots": 16},
    ],
    ids=["defaults", "shortest context", "one row", "one block"],
)
def test_warming_up_leaves_an_engine_as_new(
    settings: dict[str, int],
    tiny_model: str,
    make_engine: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine(["ngram", str(tiny_model)], **settings)
    new, stages, proposed = engine.stats(), list[str](), set[str]()
    for name, drafter in engine.drafter.drafters.items():

        def spy(seqs, budgets, name=name, propose=drafter.propose):  # type: ignore[no-untyped-def]
            trees = propose(seqs, budgets)
            proposed.update(name for tree in trees if len(tree) > 1)
            return trees

        monkeypatch.setattr(drafter, "propose", spy)
    warm_up(engine.parts, stages.append)
    assert len(set(stages)) == len(stages) > 1
    assert engine.parts.cost_model.is_measured == (engine.parts.max_context > MAX_NODES)
    engine = Engine(engine.parts)
    assert engine.stats() == new
    assert not engine.has_work
    assert len(engine.kv.prefix) == 0
    assert engine.kv.pool.num_available == engine.kv.pool.num_blocks
    engine.check_integrity()
    if not settings:
        assert proposed == set(engine.drafter.names), "every drafter is warmed up"
        expected = run(make_engine("none"), PROMPTS, sampled(3))
        assert list(map(ids, run(engine, PROMPTS, sampled(3)))) == list(map(ids, expected))


def test_a_model_that_cannot_run_is_found_out(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("none")
    forward = engine.runner.forward

    def broken(entries, trees):  # type: ignore[no-untyped-def]
        out = forward(entries, trees)
        out.logits.fill_(torch.nan)
        return out

    monkeypatch.setattr(engine.runner, "forward", broken)
    with pytest.raises(ModelError, match=r"warm-up.*not numbers"):
        warm_up(engine.parts)


@settings(max_examples=200)
@given(
    row_multiple=st.sampled_from([1, 8]),
    max_rows=st.integers(1, 600),
    max_seqs=st.integers(1, 64),
    max_nodes=st.integers(1, 64),
    max_tokens=st.integers(2, 2048),
)
def test_warm_up_requests_fit(
    row_multiple: int, max_rows: int, max_seqs: int, max_nodes: int, max_tokens: int
) -> None:
    max_seqs = min(max_seqs, max_rows)
    rounds = list(
        warmup_rounds(
            row_multiple=row_multiple,
            max_rows=max_rows,
            max_seqs=max_seqs,
            max_nodes=max_nodes,
            max_tokens=max_tokens,
        )
    )
    num_trees = 1 if min(max_seqs, max_rows // max_nodes) < 2 else 2
    prompts, trees = rounds[:-num_trees], rounds[-num_trees:]
    for requests in rounds:
        assert len(requests) <= max_seqs
        for request in requests:
            assert request.prompt_ids
            assert len(request.prompt_ids) + request.sampling.max_tokens <= max_tokens
    most = min(max_rows, max_seqs * (max_tokens - 1))
    assert sum(len(request.prompt_ids) for request in prompts[-1]) == most
    assert len(trees[0]) == 1
    assert all(len(requests) * max_nodes <= max_rows for requests in trees[1:])
