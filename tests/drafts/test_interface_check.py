"""A drafter with a missing method or one of the wrong form is refused when it is loaded."""

from collections.abc import Sequence
from typing import Any, cast

import pytest
from tiny import EngineFactory, ids, run

from specserve.sequence import SequenceView
from specserve.speculation.drafter import Drafter, DraftError, DraftOptions, NoModelDrafter
from specserve.tree import DraftTree, root_tree
from specserve.types import SamplingParams

NAME = r"draft: 'ngram': .*test_interface_check\."


class Plain:
    """All that the engine calls, without a base class, and in forms that it can call too."""

    Options = DraftOptions
    aux_layers = ()
    needs_topk = 0

    def __init__(self, *_: Any) -> None: ...

    @staticmethod
    def kv_spec(dtype: Any) -> None: ...

    def bind(self, context: Any, extra: int = 0) -> None: ...

    def propose(self, *arguments: Any) -> list[DraftTree]:
        return [root_tree(seq.tokens[-1]) for seq in arguments[0]]

    @classmethod
    def observe(cls, anything: Any) -> None: ...

    forget = len


class Inherits(Drafter):
    """A class that inherits the protocol inherits methods that do nothing."""

    Options = DraftOptions
    aux_layers = ()
    needs_topk = 0

    def observe(self, feedback: Any) -> None: ...


class NoInit(Plain):
    def __init__(self) -> None: ...


class Keywords(Plain):
    def bind(self, *, context: Any) -> None: ...  # type: ignore[override]


class OldPropose(NoModelDrafter):
    def propose(self, seqs: Sequence[SequenceView]) -> Any: ...  # type: ignore[override]


class NoBudget(NoModelDrafter):
    def propose_tree(self, seq: SequenceView) -> Any: ...  # type: ignore[override]


class Misspelt(NoModelDrafter):
    def propose_trees(self, seq: SequenceView, budget: int) -> Any: ...


def plain(**attributes: Any) -> type:
    return type("Changed", (Plain,), attributes)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (len, "draft: 'ngram': .*len.* is no class; expected one with .*drafter.Drafter"),
        (plain(Options=None), "Changed Options: None; expected a subclass of DraftOptions"),
        (plain(Options=dict), "Changed Options: .*dict.*; expected a subclass of DraftOptions"),
        (NoInit, r"has __init__\(self\); expected __init__\(self, options, path, target\)"),
        (plain(forget=None), r"Changed has no method forget; expected forget\(self, seq_id\)"),
        (Inherits, r"Inherits has no method kv_spec; expected kv_spec\(self, dtype\)"),
        (Keywords, r"Keywords has bind\(self, \*, context\); expected bind\(self, context\)"),
        (OldPropose, r"has propose\(self, seqs\); expected propose\(self, seqs, budgets\)"),
        (NoBudget, r"has propose_tree\(self, seq\); expected propose_tree\(self, seq, budget\)"),
        (Misspelt, r"Misspelt proposes nothing; expected propose_tree\(self, seq, budget\), or"),
        (plain(aux_layers=[1]), r"Changed aux_layers: \[1\]; expected a tuple of layers, 0 to 2"),
        (plain(aux_layers=(0, 3)), r"aux_layers: \(0, 3\); expected a tuple of layers, 0 to 2"),
        (plain(needs_topk=65), "needs_topk: 65; expected a number of tokens, 0 to 64"),
        (plain(needs_topk=True), "needs_topk: True; expected a number of tokens, 0 to 64"),
        (plain(kv_spec=lambda *_: 64), "Changed kv_spec returned 64; expected a KVSpec or None"),
    ],
)
def test_the_error_names_the_class_and_what_is_expected(
    found: Any, message: str, make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specserve_drafts.ngram.NgramDrafter", found)
    with pytest.raises(DraftError, match=message if found is len else f"{NAME}.*{message}"):
        make_engine("ngram")


def test_methods_that_the_engine_can_call_are_accepted(
    make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specserve_drafts.ngram.NgramDrafter", cast(type[Drafter], Plain))
    params = SamplingParams(temperature=0.0, max_tokens=8, seed=0)
    (expected,) = run(make_engine("none"), [(1, 2, 3)], params)
    engine = make_engine("ngram")
    (outputs,) = run(engine, [(1, 2, 3)], params)
    assert ids(outputs) == ids(expected)
    assert engine.drafter.num_failures == {"ngram": 0}
