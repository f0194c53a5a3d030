"""Drafters that modify every object they can reach, propose invalid trees and raise exceptions.

The output stays that of plain decoding, and the engine continues.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec import Struct
from tiny import TINY_VOCAB, EngineFactory, ids, run
from torch import Tensor

from specserve.sequence import SequenceView
from specserve.speculation.drafter import DraftContext, Feedback
from specserve.speculation.failures import MAX_FAILURES
from specserve.tree import DraftTree, chain_tree
from specserve.types import SamplingParams
from specserve_drafts.ngram import NgramDrafter

PROMPTS = [(1, 2, 3, 4, 1, 2, 3, 4, 1, 2), tuple(range(20, 60)), (7,)]
PARAMS = [
    SamplingParams(temperature=1.0, max_tokens=12, seed=11, ignore_eos=True),
    SamplingParams(
        temperature=0.9,
        min_p=0.02,
        presence_penalty=0.4,
        repetition_penalty=1.2,
        logit_bias={5: 3.0, 9: -20.0},
        min_tokens=6,
        stop_token_ids=(17, 40),
        max_tokens=12,
        seed=2**62,
    ),
    SamplingParams(temperature=0.0, max_tokens=12, seed=0),
]
REFUSED = (AttributeError, TypeError, ValueError)
JUNK: list[Any] = [None, 3, [], lambda *_, **__: torch.zeros(1, dtype=torch.int64)]
ERRORS = [RuntimeError, SystemExit, KeyboardInterrupt, GeneratorExit, BaseException]


def reachable(value: Any, seen: dict[int, Any]) -> Iterator[Any]:
    """`value` and all objects that its public attributes and items lead to."""
    if id(value) in seen or isinstance(value, str | int | float | bytes | type | torch.dtype):
        return
    seen[id(value)] = value  # kept alive, so that its id is not reused
    yield value
    inner: list[Any] = []
    if isinstance(value, dict | MappingProxyType):
        inner += value.values()
    elif isinstance(value, list | tuple):
        inner += value
    if not isinstance(value, np.ndarray | Tensor | torch.device) and not callable(value):
        for name in attributes(value):
            with suppress(Exception):
                inner.append(getattr(value, name))
    for one in inner:
        yield from reachable(one, seen)


def attributes(value: Any) -> list[str]:
    return [name for name in dir(value) if not name.startswith("_")]


def modifications(value: Any) -> list[Callable[[], Any]]:
    """Functions that try to modify an object by its public interface."""
    if isinstance(value, Tensor):
        return [lambda: value.fill_(3)]
    if isinstance(value, np.ndarray):
        return [lambda: value.fill(3), lambda: value.sort()]
    found: list[Callable[[], Any]] = [
        lambda: value.clear(),
        lambda: value.append(5),
        lambda: value.extend([5, 5]),
        lambda: value.pop(),
        lambda: value.update({"q0": None, 5: 50.0}),
        lambda: value.__setitem__(0, 5),
        lambda: value.__setitem__("q0", 5),
        lambda: value.__setitem__(slice(None), [5]),
        lambda: value.__delitem__(0),
    ]
    for name in attributes(value):
        for junk in JUNK:
            found.append(partial(setattr, value, name, junk))
        found.append(partial(delattr, value, name))
    return found


def modify_all(*values: Any) -> None:
    seen: dict[int, Any] = {}
    for one in [one for value in values for one in reachable(value, seen)]:
        for change in modifications(one):
            with suppress(Exception):
                change()


def invalid_tree(random: Random, root: int, budget: int) -> Any:
    n = random.choice([1, 2, min(budget, 4), budget, budget + 1, 65, 0])
    wild: list[Any] = [0, 5, -1, TINY_VOCAB, 2**31 - 1, np.nan, -np.inf, 0.5, 1.0, 2**40]
    tokens = [root] + [random.choice(wild[:5]) for _ in range(n - 1)]
    parents = [-1] + [random.choice([node, node - 1, -1, 0, n]) for node in range(1, n)]
    path_probs = [1.0] + [random.choice(wild) for _ in range(n - 1)]
    kind: Any = random.choice([np.int32, np.int64, np.float64, object, "U8"])
    tree: Any = DraftTree(
        np.array(tokens[:n], kind if random.random() < 0.3 else np.int64),
        np.array(parents[:n], np.int16),
        np.array(path_probs[:n], np.float64),
        np.array([random.randrange(256) for _ in range(n)], np.uint8),
    )
    return random.choice([tree, tree, tree, None, 7, tree.tokens, (), chain_tree(root, [], [], 1)])


class Hostile(NgramDrafter):
    """Drafts as its base class does; at random it modifies objects, proposes nonsense or raises."""

    random = Random(0)
    context: DraftContext
    kept: list[Any]

    def bind(self, context: DraftContext) -> None:
        super().bind(context)
        self.context, self.kept = context, []
        modify_all(*(getattr(context, field.name) for field in fields(context)))

    def propose(self, seqs: Any, budgets: Any) -> Any:
        trees: list[Any] = super().propose(seqs, budgets)
        for seq in seqs:
            state = self.context.sampling_state(seq)
            with suppress(Exception):
                state.advance([*seq.tokens, 5, 5, 5])
                for tensor in state.penalties(()):
                    tensor.fill_(1)
            self.misbehave(state)
        self.misbehave(seqs, budgets)
        for index, (seq, budget) in enumerate(zip(seqs, budgets, strict=True)):
            if self.random.random() < 0.2:
                trees[index] = invalid_tree(self.random, seq.tokens[-1], budget)
        if self.random.random() < 0.1:
            wrong: list[Any] = [[], trees * 2, trees[1:], {0: 1}]
            trees = self.random.choice(wrong)
        self.kept += trees
        return trees

    def observe(self, feedback: Feedback) -> None:
        self.misbehave(feedback)

    def forget(self, seq_id: str) -> None:
        super().forget(seq_id)
        self.misbehave()

    def misbehave(self, *values: Any) -> None:
        for tree in self.kept:  # trees that the engine has taken over
            for name in ("tokens", "parents", "path_probs", "drafter_ids"):
                with suppress(Exception):
                    array = getattr(tree, name)
                    array.setflags(write=True)
                    array.fill(77)
        if self.random.random() < 0.3:
            modify_all(*values)
        if self.random.random() < 0.05:
            raise self.random.choice(ERRORS)


@pytest.fixture
def hostile_engine(make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch) -> EngineFactory:
    monkeypatch.setattr("specserve_drafts.ngram.NgramDrafter", Hostile)
    return make_engine


@settings(  # a failing example is a seed, which cannot be shrunk
    max_examples=6,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.integers(0, 2**32))
def test_the_output_is_that_of_plain_decoding(hostile_engine: EngineFactory, seed: int) -> None:
    """Alone, and with a second drafter that gets the same feedback."""
    plain = run(hostile_engine("none"), PROMPTS, PARAMS)
    Hostile.random = Random(seed)
    for draft in (["ngram"], ["ngram", "recycle"]):
        engine = hostile_engine(draft, max_nodes=6)
        for _ in range(3):
            outputs = run(engine, PROMPTS, PARAMS)
            assert [ids(each) for each in outputs] == [ids(each) for each in plain]
            used = {each for own in outputs for output in own for each in output.drafter_ids}
            assert used <= {0, 1, 2}
        assert engine.kv.pool.num_available == engine.kv.pool.num_blocks
        assert set(engine.drafter.active) >= set(draft) - {"ngram"}
        assert engine.drafter.num_failures["ngram"] <= 4 * MAX_FAILURES * len(PROMPTS)


def test_objects_passed_to_a_drafter_are_read_only(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch, tiny_model: Path
) -> None:
    checked: list[str] = []

    def assert_read_only(value: Any) -> None:
        """Assert that assignments and methods of lists, dicts and arrays raise."""
        for one in reachable(value, {}):
            if isinstance(one, Tensor | torch.device) or callable(one):
                continue
            for change in modifications(one):
                with pytest.raises(REFUSED):
                    change()
            checked.append(type(one).__name__)

    class CheckingDrafter(NgramDrafter):
        def propose(self, seqs: Sequence[SequenceView], budgets: Sequence[int]) -> list[DraftTree]:
            assert_read_only((seqs, budgets))
            return super().propose(seqs, budgets)

        def observe(self, feedback: Feedback) -> None:
            assert isinstance(feedback.seqs[0].speculation, Struct)
            assert_read_only(feedback)

    monkeypatch.setattr("specserve_drafts.ngram.NgramDrafter", CheckingDrafter)
    engine = make_engine("ngram", max_nodes=4)
    run(engine, PROMPTS[:1], PARAMS[1])
    assert engine.drafter.num_failures == {"ngram": 0}
    assert {
        "SequenceView",
        "TableView",
        "ReadOnlyList",
        "VerifyResult",
        "DraftTree",
    } <= {*checked}
