"""Drafters that are wrong or fail: 39, 40 and 42 of tests/server/BAD_INPUTS.md.

Whatever they do, the output is that of plain decoding.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tiny import TINY_VOCAB, EngineFactory, ids, run, write_tiny_llama

from specserve.engine.engine import Engine
from specserve.sequence import Sequence
from specserve.tree import DraftTree, build_tree, chain_tree
from specserve.types import SamplingParams

PROMPTS = [(1, 2, 3, 4, 1, 2, 3, 4, 1, 2), tuple(range(20, 60)), (7,)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, seed=0)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=24, seed=11, ignore_eos=True)


@pytest.fixture
def plain(make_engine: EngineFactory) -> list[tuple[int, ...]]:
    return [ids(outputs) for outputs in run(make_engine("none"), PROMPTS, SAMPLED)]


def _outside(root: int, budget: int) -> DraftTree:
    return chain_tree(root, [TINY_VOCAB], [0.5], 1)


def _negative(root: int, budget: int) -> DraftTree:
    return chain_tree(root, [-1], [0.5], 1)


def _too_large(root: int, budget: int) -> DraftTree:
    return chain_tree(root, [5] * budget, [0.5] * budget, 1)


def _another_root(root: int, budget: int) -> DraftTree:
    return chain_tree((root + 1) % TINY_VOCAB, [5], [0.5], 1)


def _its_own_parent(root: int, budget: int) -> DraftTree:
    return replace(chain_tree(root, [5], [0.5], 1), parents=np.array([-1, 1], np.int16))


def _not_a_score(root: int, budget: int) -> DraftTree:
    return replace(chain_tree(root, [5], [0.5], 1), scores=np.array([1, np.nan], np.float32))


def _twins(root: int, budget: int) -> DraftTree:
    return build_tree([root, 5, 5], [-1, 0, 0], [1.0, 0.5, 0.5], 1)


@pytest.mark.parametrize(
    "propose",
    [
        *(_outside, _negative, _too_large, _another_root),
        *(_its_own_parent, _not_a_score, _twins),
    ],
)
def test_a_wrong_tree_costs_speed_and_nothing_else(
    propose: Callable[[int, int], DraftTree],
    plain: list[tuple[int, ...]],
    make_engine: EngineFactory,
) -> None:
    """Its nodes never reach the target; after a few times it is not asked again."""
    engine = make_engine("ngram")
    _replace(engine, "propose", lambda seqs, budgets: list(map(_for_each(propose), seqs, budgets)))
    assert [ids(outputs) for outputs in run(engine, PROMPTS, SAMPLED)] == plain
    assert engine.drafter.active == []
    assert not any(engine.drafter.counts.proposed)


@pytest.mark.parametrize("trees", [None, [], 5])
def test_a_drafter_without_trees_costs_nothing(
    trees: Any, plain: list[tuple[int, ...]], make_engine: EngineFactory
) -> None:
    engine = make_engine("ngram")
    _replace(engine, "propose", lambda seqs, budgets: trees)
    assert [ids(outputs) for outputs in run(engine, PROMPTS, SAMPLED)] == plain
    assert engine.drafter.active == []


@pytest.mark.parametrize("method", ["observe", "forget"])
def test_a_drafter_that_fails_afterwards_costs_nothing(
    method: str, plain: list[tuple[int, ...]], make_engine: EngineFactory
) -> None:
    engine = make_engine("ngram")

    def broken(argument: object) -> None:
        raise RuntimeError("boom")

    _replace(engine, method, broken)
    assert [ids(outputs) for outputs in run(engine, PROMPTS, SAMPLED)] == plain
    assert engine.drafter.active == []
    assert engine.kv.pool.num_available == engine.kv.pool.num_blocks


def _for_each(propose: Callable[[int, int], DraftTree]) -> Callable[[Sequence, int], DraftTree]:
    return lambda seq, budget: propose(seq.tokens[-1], budget)


def _replace(engine: Engine, method: str, function: Callable[..., Any]) -> None:
    setattr(engine.drafter.drafters["ngram"], method, function)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_draft_of_no_numbers_costs_nothing(
    value: float, tmp_path: Path, make_engine: EngineFactory
) -> None:
    """A checkpoint that is damaged, but of the right shape."""
    broken = write_tiny_llama(tmp_path / "broken", seed=2)
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"].fill_(value)
    save_file(weights, broken / "model.safetensors")
    for params in (GREEDY, SAMPLED):
        plain = [ids(outputs) for outputs in run(make_engine("none"), PROMPTS, params)]
        for draft in ([str(broken)], [str(broken), "ngram"]):
            outputs = run(make_engine(draft), PROMPTS, params)
            assert [ids(each) for each in outputs] == plain
