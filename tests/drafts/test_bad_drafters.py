"""Drafters that are wrong or fail: 39, 40 and 42 of tests/server/BAD_INPUTS.md.

The output stays that of plain decoding, and requests for which the drafter works are still drafted
for.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny import TINY_VOCAB, EngineFactory, ids, run, write_tiny_llama

from specserve.engine.engine import Engine
from specserve.sequence import SequenceView
from specserve.speculation.drafter import DraftError, Feedback
from specserve.speculation.failures import MAX_FAILURES
from specserve.tree import DraftTree, build_tree, chain_tree
from specserve.types import Request, SamplingParams

PROMPTS = [(1, 2, 3, 4, 1, 2, 3, 4, 1, 2), tuple(range(20, 60)), (7,)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, seed=0)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=8, seed=11, ignore_eos=True)


@pytest.fixture
def plain(make_engine: EngineFactory) -> list[tuple[int, ...]]:
    return [ids(outputs) for outputs in run(make_engine("none"), PROMPTS, SAMPLED)]


def _token_outside_the_vocabulary(root: int, budget: int) -> DraftTree:
    return chain_tree(root, [TINY_VOCAB], [0.5], 1)


def _negative_token(root: int, budget: int) -> DraftTree:
    return chain_tree(root, [-1], [0.5], 1)


def _more_nodes_than_the_budget(root: int, budget: int) -> DraftTree:
    return chain_tree(root, [5] * budget, [0.5] * budget, 1)


def _wrong_root(root: int, budget: int) -> DraftTree:
    return chain_tree((root + 1) % TINY_VOCAB, [5], [0.5], 1)


def _node_is_its_own_parent(root: int, budget: int) -> DraftTree:
    return replace(chain_tree(root, [5], [0.5], 1), parents=np.array([-1, 1], np.int16))


def _nan_probability(root: int, budget: int) -> DraftTree:
    return replace(chain_tree(root, [5], [0.5], 1), path_probs=np.array([1, np.nan], np.float32))


def _equal_siblings(root: int, budget: int) -> DraftTree:
    return build_tree([root, 5, 5], [-1, 0, 0], [1.0, 0.5, 0.5], 1)


def _list_instead_of_a_tree(root: int, budget: int) -> Any:
    return [root, 5]


INVALID_TREES = [
    *(
        _token_outside_the_vocabulary,
        _negative_token,
        _more_nodes_than_the_budget,
        _wrong_root,
        _node_is_its_own_parent,
    ),
    *(_nan_probability, _equal_siblings, _list_instead_of_a_tree),
]


@pytest.mark.parametrize("propose", INVALID_TREES)
def test_invalid_trees_do_not_change_the_output(
    propose: Callable[[int, int], DraftTree],
    plain: list[tuple[int, ...]],
    make_engine: EngineFactory,
) -> None:
    """No node of them is verified, and after MAX_FAILURES calls the drafter is switched off."""
    engine = make_engine("ngram")
    _replace(engine, "propose", lambda seqs, budgets: list(map(_for_each(propose), seqs, budgets)))
    for _ in range(MAX_FAILURES):
        assert engine.drafter.active == ["ngram"]
        assert [ids(outputs) for outputs in run(engine, PROMPTS, SAMPLED)] == plain
    assert engine.drafter.active == []
    assert not any(engine.drafter.counts.proposed.values())


@pytest.mark.parametrize("trees", [None, [], 5])
def test_a_wrong_number_of_trees_does_not_change_the_output(
    trees: Any, plain: list[tuple[int, ...]], make_engine: EngineFactory
) -> None:
    engine = make_engine("ngram")
    _replace(engine, "propose", lambda seqs, budgets: trees)
    assert [ids(outputs) for outputs in run(engine, PROMPTS, SAMPLED)] == plain
    assert engine.drafter.num_failures == {"ngram": 1}, (
        "one call failed, and all three requests are left out"
    )


ERRORS = [RuntimeError, SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, BaseException]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("method", ["propose", "observe", "forget"])
def test_exceptions_of_a_drafter_do_not_change_the_output(
    method: str,
    error: type[BaseException],
    plain: list[tuple[int, ...]],
    make_engine: EngineFactory,
) -> None:
    """Neither does switching the drafter off after MAX_FAILURES calls."""
    engine = make_engine("ngram")

    def broken(*_: object) -> Any:
        raise error

    _replace(engine, method, broken)
    for _ in range(MAX_FAILURES + 1):
        assert [ids(outputs) for outputs in run(engine, PROMPTS, SAMPLED)] == plain
    assert engine.drafter.active == []
    assert engine.kv.pool.num_available == engine.kv.pool.num_blocks


@pytest.mark.parametrize("method", ["propose", "observe"])
@pytest.mark.parametrize("wrong", [*INVALID_TREES[:2], RuntimeError, SystemExit])
def test_a_failure_for_one_request_does_not_affect_the_others(
    method: str, wrong: Any, make_engine: EngineFactory
) -> None:
    """The drafter stays active after MAX_FAILURES failed requests: calls between succeed."""
    others = [PROMPTS[0], PROMPTS[1]]
    expected = [_counted(make_engine("ngram"), name, others) for name in ("a", "b")]
    engine = make_engine("ngram")
    drafter = engine.drafter.drafters["ngram"]
    original = getattr(drafter, method)

    def bad(seq: SequenceView) -> bool:
        return seq.id.startswith("bad")

    def propose(seqs: Sequence[SequenceView], budgets: Sequence[int]) -> list[DraftTree]:
        if isinstance(wrong, type) and any(map(bad, seqs)):
            raise wrong
        trees = original(seqs, budgets)
        return [
            wrong(seq.tokens[-1], budget) if bad(seq) else tree
            for seq, budget, tree in zip(seqs, budgets, trees, strict=True)
        ]

    def observe(feedback: Feedback) -> None:
        if any(map(bad, feedback.seqs)):
            raise wrong if isinstance(wrong, type) else ValueError
        original(feedback)

    wrapped: dict[str, Callable[..., Any]] = {"propose": propose, "observe": observe}
    _replace(engine, method, wrapped[method])
    for name, before in zip(("a", "b"), expected, strict=True):
        for index in range(MAX_FAILURES):
            engine.submit(Request(f"bad-{name}{index}", PROMPTS[1], SAMPLED))
        assert _counted(engine, name, others) == before
    assert engine.drafter.active == ["ngram"]


def _counted(engine: Engine, name: str, prompts: list[tuple[int, ...]]) -> list[Any]:
    """Token ids and statistics of new requests, which run beside those already submitted."""
    names = [f"{name}{index}" for index in range(len(prompts))]
    for request_id, prompt in zip(names, prompts, strict=True):
        engine.submit(Request(request_id, prompt, SAMPLED))
    found: dict[str, list[Any]] = {request_id: [] for request_id in names}
    while engine.has_work:
        for output in engine.step():
            if output.id in found:
                found[output.id] += [*output.ids, output.stats]
        engine.check_integrity()
    return list(found.values())


def test_a_call_that_succeeds_when_repeated_changes_nothing(make_engine: EngineFactory) -> None:
    expected = _counted(make_engine("ngram"), "a", PROMPTS)
    engine = make_engine("ngram")
    propose, calls = engine.drafter.drafters["ngram"].propose, iter(range(1000))

    def fail_every_other_call(
        seqs: Sequence[SequenceView], budgets: Sequence[int]
    ) -> list[DraftTree]:
        if len(seqs) > 1 and next(calls) % 2:
            raise RuntimeError("boom")
        return propose(seqs, budgets)

    _replace(engine, "propose", fail_every_other_call)
    assert _counted(engine, "a", PROMPTS) == expected
    assert engine.drafter.num_failures["ngram"] > 1
    assert engine.drafter.active == ["ngram"]


@pytest.fixture
def default_sigint_handler() -> Iterator[None]:
    """The shell may have started the tests with SIGINT ignored, as it does for background jobs."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_sigint_handler")
@pytest.mark.parametrize("method", ["propose", "observe"])
def test_ctrl_c_in_a_drafter_ends_the_engine(method: str, make_engine: EngineFactory) -> None:
    engine = make_engine("ngram")

    def wait_for_ctrl_c(*_: object) -> Any:
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
        end = time.monotonic() + 30
        while time.monotonic() < end:
            sum(range(100))

    _replace(engine, method, wait_for_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        run(engine, PROMPTS, SAMPLED)


@pytest.fixture
def sigterm_raises_system_exit() -> Iterator[None]:
    def end(*_: object) -> None:
        raise SystemExit(3)

    before = signal.signal(signal.SIGTERM, end)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("sigterm_raises_system_exit")
def test_an_exception_of_a_signal_handler_is_not_a_failure_of_the_drafter(
    make_engine: EngineFactory,
) -> None:
    engine = make_engine("ngram")
    _replace(engine, "propose", lambda *_: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit, match="3"):
        run(engine, PROMPTS, SAMPLED)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("method", ["__init__", "kv_spec", "bind"])
def test_the_error_names_a_drafter_that_cannot_be_loaded(
    method: str,
    error: type[BaseException],
    make_engine: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> Any:
        raise error("boom")

    monkeypatch.setattr(f"specserve_drafts.ngram.NgramDrafter.{method}", broken)
    with pytest.raises(DraftError, match=rf"draft: 'ngram' .* loaded: {error.__name__}: boom"):
        make_engine("ngram")


def _for_each(propose: Callable[[int, int], DraftTree]) -> Callable[[SequenceView, int], DraftTree]:
    return lambda seq, budget: propose(seq.tokens[-1], budget)


def _replace(engine: Engine, method: str, function: Callable[..., Any]) -> None:
    setattr(engine.drafter.drafters["ngram"], method, function)


def test_nan_logits_of_a_draft_do_not_change_the_output(
    tmp_path: Path, make_engine: EngineFactory
) -> None:
    """The weights are finite, but the hidden states overflow."""
    broken = write_tiny_llama(tmp_path / "broken", seed=2)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.0.input_layernorm.weight"].fill_(3e38)
    save_file(weights, broken / "model.safetensors")
    for params in (GREEDY, SAMPLED):
        plain = [ids(outputs) for outputs in run(make_engine("none"), PROMPTS, params)]
        for draft in ([str(broken)], [str(broken), "ngram"]):
            outputs = run(make_engine(draft), PROMPTS, params)
            assert [ids(each) for each in outputs] == plain
