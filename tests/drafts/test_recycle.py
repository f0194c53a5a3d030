"""The top-k table and the drafter `recycle`: learning, look-up, salts, saving."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import EngineFactory, ids, run

from specserve.batch import ModelOutput
from specserve.cache.table import BlockTable
from specserve.engine.engine import Engine
from specserve.sequence import SequenceState, SequenceView
from specserve.speculation.drafter import DraftError
from specserve.speculation.registry import create_drafter
from specserve.tree import root_tree
from specserve.types import Request, SamplingParams, SpeculationParams
from specserve_drafts.recycle.drafter import RecycleDrafter
from specserve_drafts.recycle.topk_table import (
    REQUEST_RULE,
    SHARED_RULE,
    TopKTable,
    UpdateRule,
)
from specserve_kernels.host import HOST, HostCode, reference
from specserve_kernels.host.interface import ORDERS

GREEDY = SamplingParams(temperature=0.0, max_tokens=40, seed=0, ignore_eos=True)
PROMPT = tuple(range(20, 60))


def new_table(
    num_rows: int, vocab_size: int, rule: UpdateRule = SHARED_RULE
) -> reference.TopKTable:
    """A table of the reference code, whose parts can be called one by one."""
    table = TopKTable(num_rows, vocab_size, rule, reference)._table
    assert isinstance(table, reference.TopKTable)
    return table


def write(
    table: reference.TopKTable, context: tuple[int, ...], tokens: list[int], salt: int = 0
) -> None:
    """Successors of one context, each half as likely as the one before."""
    table.write(salt, context, tokens, [np.float32(2.0**-i) for i in range(1, 5)])


def likely_successors(tokens: list[int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Of one node, as `learn` takes it: each half as likely as the one before."""
    logits = -np.log(2) * np.arange(len(tokens))
    return np.array([tokens], np.int64), logits[None].astype(np.float32)


@given(st.lists(st.tuples(*[st.integers(0, 60)] * ORDERS), min_size=1, max_size=40, unique=True))
def test_a_context_is_found_by_all_its_tokens(contexts: list[tuple[int, ...]]) -> None:
    table = new_table(2**16, 100)
    for index, context in enumerate(contexts):
        write(table, context, [index, 97, 98, 99])
    for index, context in enumerate(contexts):
        tokens = dict(table.candidates([0], context))
        # Shorter contexts may say something else, but the whole one is believed more.
        assert tokens[index] >= max(tokens.get(other, 0) for other in range(40))


def test_shorter_contexts_are_used_for_unknown_longer_ones() -> None:
    table = new_table(2**10, 100)
    write(table, (5, 6, 7), [1, 2, 3, 4])
    assert [token for token, _ in table.candidates([0], (5, 6, 99))] == [1, 2, 3, 4]
    assert [token for token, _ in table.candidates([0], (5,))] == [1, 2, 3, 4]
    assert table.candidates([0], (6, 5, 7)) == []


def test_new_observations_weigh_more_for_longer_contexts() -> None:
    table = new_table(2**10, 100)
    for _ in range(6):
        write(table, (5, 6, 7), [1, 2, 3, 4])
    write(table, (5, 6, 7), [9, 2, 3, 4])
    short, long = (dict(table.candidates([0], context)) for context in ((5,), (5, 6, 7)))
    assert short[1] > short.get(9, 0.0)
    assert long[9] > short.get(9, 0.0)
    assert short[2] == pytest.approx(0.25, rel=0.05), "the same from both"


def test_salts_are_isolated_and_entries_without_one_are_shared() -> None:
    table = new_table(2**10, 100)
    write(table, (5, 6, 7), [1, 2, 3, 4], salt=11)
    assert table.candidates([12, 0], (5, 6, 7)) == []
    assert table.candidates([0], (5, 6, 7)) == []
    assert dict(table.candidates([11, 0], (5, 6, 7)))[1] > 0
    write(table, (5, 6, 7), [8, 2, 3, 4])
    assert 8 not in dict(table.candidates([11, 0], (5, 6, 7)))
    assert dict(table.candidates([12, 0], (5, 6, 7)))[8] > 0


@pytest.mark.parametrize("host", [HOST, reference])
def test_entries_of_a_salt_begin_with_the_shared_ones(host: HostCode) -> None:
    table = TopKTable(2**10, 100, host=host)
    table.learn(0, [6, 7], root_tree(5), *likely_successors([1, 2, 3, 4]))
    table.learn(11, [6, 7], root_tree(5), *likely_successors([9, 8, 3, 4]))
    tree = table.grow([11, 0], [5, 6, 7], 5, 0.0)
    mixed = {token: tree.path_probs[node] for token, node in tree.children(0).items()}
    assert mixed.keys() >= {1, 9}
    assert mixed[1] > 0.3
    assert 9 not in table.grow([12, 0], [5, 6, 7], 5, 0.0).children(0)


def test_the_request_table_is_mixed_in() -> None:
    """It prevails where it has seen a longer context, and has no effect where it has seen none."""
    table, own = new_table(2**10, 100), new_table(2**10, 100, REQUEST_RULE)
    write(table, (7, 6, 5), [1, 2, 3, 4])
    own.learn_text([5, 6, 7, 50])
    assert own.candidates([0], (7, 6, 5))[0][0] == 50
    mixed = dict(table.candidates([0], (7, 6, 5), own))
    assert mixed[50] > mixed[1] > 0
    assert dict(table.candidates([0], (8, 6, 5), own)) == {}
    empty = new_table(8, 100, REQUEST_RULE)
    assert table.candidates([0], (7, 6, 5), empty) == table.candidates([0], (7, 6, 5))
    assert empty.candidates([0], (50,), own) == [], "nothing follows the end"


def test_a_small_table_replaces_entries_and_never_confuses_contexts() -> None:
    table = new_table(8, 1000)
    for token in range(500):
        write(table, (token, token, token), [token + 1, 0, 1, 2])
    found = [token for token in range(500) if table.candidates([0], (token, token, token))]
    assert 0 < len(found) <= 8 + 2  # a tag may be shared now and then
    best = {token: table.candidates([0], (token,) * ORDERS)[0][0] for token in found}
    assert sum(best[token] == token + 1 for token in found) >= len(found) - 2


def test_repeated_contexts_outlive_single_ones() -> None:
    """With as many new contexts as rows, a row is hit once on average, and e^-1 of them never."""
    shares = {}
    for times in (1, 2):
        table = new_table(2**12, 100_000)
        for _ in range(times):
            for token in range(200):
                write(table, (token, token, token), [token + 1, 0, 0, 0])
        for token in range(1000, 1000 + 2**12 // ORDERS):
            write(table, (token, token, token), [7, 7, 7, 7])
        found = [dict(table.candidates([0], (token,) * ORDERS)) for token in range(200)]
        shares[times] = sum(token + 1 in tokens for token, tokens in enumerate(found)) / 200
    assert shares[2] > shares[1] + 0.05
    assert shares[2] > 0.9  # by one of its three lengths


@pytest.mark.parametrize("vocab_size", [100, 70_000])
def test_a_saved_table_is_the_same(vocab_size: int, tmp_path: Path) -> None:
    table = TopKTable(2**10, vocab_size)
    table.learn(0, [6, 7], root_tree(5), *likely_successors([1, 2, 3, vocab_size - 1]))
    table.save(tmp_path / "table")
    again = TopKTable.load(tmp_path / "table", vocab_size)
    np.testing.assert_array_equal(again._rows, table._rows)
    assert again.num_filled == ORDERS
    assert [file.name for file in tmp_path.iterdir()] == ["table"]


def test_an_invalid_table_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    table = TopKTable(8, 100)
    table.learn(0, [6, 7], root_tree(5), *likely_successors([1, 2, 3, 99]))
    table.save(tmp_path / "table")
    with pytest.raises(ValueError, match="cannot be read"):
        TopKTable.load(tmp_path / "nothing", 100)
    with pytest.raises(ValueError, match="cannot be read"):
        TopKTable.load(tmp_path / "text", 100)
    with pytest.raises(ValueError, match="outside the vocabulary of 50"):
        TopKTable.load(tmp_path / "table", 50)
    with pytest.raises(ValueError, match=r"tokens is .*expected"):
        TopKTable.load(tmp_path / "table", 70_000)


def recycled(engine: Engine) -> RecycleDrafter:
    drafter = engine.drafter.drafters["recycle"]
    assert isinstance(drafter, RecycleDrafter)
    return drafter


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_repeated_answer_is_drafted_completely(
    temperature: float, make_engine: EngineFactory
) -> None:
    """At temperature > 0, too: the table holds the alternatives of each position."""
    params = SamplingParams(temperature=temperature, max_tokens=40, seed=3, ignore_eos=True)
    engine = make_engine("recycle", max_nodes=8)
    first, second = (run(engine, [PROMPT], params)[0] for _ in range(2))
    assert ids(first) == ids(second)
    before, after = first[-1].stats, second[-1].stats
    assert before is not None
    assert after is not None
    assert after.num_spec_steps < 0.6 * before.num_spec_steps


def test_rejected_nodes_are_learned_from(make_engine: EngineFactory) -> None:
    engine = make_engine("recycle", max_nodes=8)
    contexts = set()
    for prompt in (PROMPT, PROMPT[::-1]):
        (outputs,) = run(engine, [prompt], GREEDY)
        text = (*prompt, *ids(outputs))
        for end in range(len(prompt), len(text)):
            contexts |= {text[end - order : end] for order in range(1, ORDERS + 1)}
    stats = outputs[-1].stats
    assert stats is not None
    assert stats.num_draft_tokens > stats.num_accepted_draft_tokens, "nothing was rejected"
    assert recycled(engine).table.num_filled > len(contexts)


def test_prompt_text_is_drafted_only_for_its_request(
    make_engine: EngineFactory,
) -> None:
    drafter = recycled(make_engine("recycle", max_nodes=8))
    prompt = (*PROMPT, 9, *PROMPT[:4])
    seqs = [
        SequenceView(SequenceState(Request(name, tokens, GREEDY), list(tokens), BlockTable(16)))
        for name, tokens in (("a", prompt), ("b", PROMPT[:4]))
    ]
    own, others = drafter.propose(seqs, [8, 8])
    assert own.tokens.tolist() == list(PROMPT[3:11])
    assert others.tokens.tolist() == [PROMPT[3]]
    assert drafter.table.num_filled == 0
    for seq in seqs:
        drafter.forget(seq.id)
    assert not drafter._request_tables


def test_tokens_emitted_without_proposals_are_learned_later(make_engine: EngineFactory) -> None:
    drafter = recycled(make_engine("recycle", max_nodes=8))
    owned = SequenceState(Request("a", PROMPT, GREEDY), list(PROMPT), BlockTable(16))
    seq = SequenceView(owned)
    (before,) = drafter.propose([seq], [8])
    assert len(before) == 1, "the prompt repeats nothing"
    owned.tokens += [70, 71, 72, 73, 74, 5, 71]
    (after,) = drafter.propose([seq], [8])
    assert after.tokens.tolist()[:4] == [71, 72, 73, 74]


def test_requests_without_proposals_are_not_learned_from(make_engine: EngineFactory) -> None:
    engine = make_engine("recycle", max_nodes=8)
    run(engine, [PROMPT], GREEDY, speculation=SpeculationParams(enabled=False))
    assert recycled(engine).table.num_filled == 0
    run(engine, [PROMPT], GREEDY)
    assert recycled(engine).table.num_filled > 0


def test_requests_of_other_salts_learn_nothing(make_engine: EngineFactory) -> None:
    engine = make_engine("recycle", max_nodes=8)
    steps = []
    for name, salt in (("a", "one"), ("b", "two"), ("c", "one")):
        engine.submit(Request(name, PROMPT, GREEDY, cache_salt=salt))
        outputs = [output for _ in range(60) for output in engine.step()]
        stats = outputs[-1].stats
        assert stats is not None
        steps.append(stats.num_spec_steps)
    assert steps[0] == steps[1] > steps[2]


def test_a_table_is_kept_between_runs(
    make_engine: EngineFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specserve_drafts.recycle.drafter._SAVE_INTERVAL", 0.0)
    file = tmp_path / "table.safetensors"
    options = {"recycle": {"file": str(file), "contexts": 2**12}}
    engine = make_engine("recycle", options=options)
    run(engine, [PROMPT], GREEDY)
    again = make_engine("recycle", options=options)
    assert recycled(again).table.num_filled == recycled(engine).table.num_filled > 0


def test_drafting_continues_if_the_table_cannot_be_saved(
    make_engine: EngineFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("specserve_drafts.recycle.drafter._SAVE_INTERVAL", 0.0)
    folder = tmp_path / "gone"
    folder.mkdir()
    options = {"recycle": {"file": str(folder / "table.safetensors"), "contexts": 2**12}}
    engine = make_engine("recycle", options=options)
    folder.rmdir()
    run(engine, [PROMPT], GREEDY)
    assert engine.drafter.active == ["recycle"]
    assert "draft.options.recycle.file: " in caplog.text


def test_non_finite_logits_are_not_learned_from(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine("recycle")
    forward = engine.runner.forward

    def broken(*arguments: Any) -> ModelOutput:
        output = forward(*arguments)
        output.logits[:] = torch.nan
        return output

    monkeypatch.setattr(engine.runner, "forward", broken)
    (outputs,) = run(engine, [PROMPT], GREEDY)
    assert outputs[-1].finish == "error"
    assert recycled(engine).table.num_filled == 0
    assert engine.drafter.active == ["recycle"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": 1000}, r"draft\.options\.recycle\.contexts: 1000; expected a power of two"),
        ({"contexts": 2**30}, r"contexts: 1073741824 is out of range; expected 8 to 67108864"),
        ({"min_probability": 2.0}, r"min_probability: 2.0 is out of range; expected 0 to 1"),
        ({"file": "/nowhere/table"}, r"recycle\.file: /nowhere is no directory; make it first"),
        ({"file": __file__}, r"draft\.options\.recycle\.file: .*cannot be read"),
        ({"context": 8}, r"draft\.options\.recycle\.context: unknown option; .* 'contexts'"),
    ],
)
def test_errors_of_options_name_the_allowed_range(
    options: dict[str, Any], message: str, tiny_model: Path
) -> None:
    with pytest.raises(DraftError, match=message):
        create_drafter("recycle", {"recycle": options}, tiny_model, Path)


def test_a_table_of_another_target_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    config = '{"specserve_method": "recycle", "target": {"hidden_size": 8, "num_layers": 1, '
    (tmp_path / "config.json").write_text(config + '"vocab_size": 9, "vocabulary": "0"}}')
    with pytest.raises(DraftError, match="was made for a target with hidden_size 8"):
        create_drafter(str(tmp_path), {}, tiny_model, Path)
