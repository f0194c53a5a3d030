"""The conformance command, and that each of its checks finds the fault that it is for."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest

from specserve.sequence import SequenceView
from specserve.speculation.drafter import DraftContext, Feedback
from specserve.tree import DraftTree, build_tree, chain_tree, root_tree
from specserve_drafts.ngram import NgramDrafter
from specserve_evals import conformance
from specserve_evals.drafter_conformance import DrafterConformance

NGRAM = "specserve_drafts.ngram.NgramDrafter"
Propose = Callable[[Any, SequenceView, int], DraftTree]


def drafter(propose: Propose) -> type:
    return type("Faulty", (NgramDrafter,), {"propose_tree": propose})


def chain(seq: SequenceView, *tokens: int) -> DraftTree:
    return chain_tree(seq.tokens[-1], tokens, [0.5] * len(tokens))


def raises_on_short_texts(self: Any, seq: SequenceView, budget: int) -> DraftTree:
    return chain(seq, seq.tokens[-2]) if budget > 1 else root_tree(seq.tokens[-1])


def ignores_the_budget(self: Any, seq: SequenceView, budget: int) -> DraftTree:
    return chain(seq, *[5] * 8)


def leaves_the_vocabulary(self: Any, seq: SequenceView, budget: int) -> DraftTree:
    return chain(seq, seq.tokens[-1] + 1)


def reads_the_salt_of_others(self: Any, seq: SequenceView, budget: int) -> DraftTree:
    """The texts of all requests are kept in one place."""
    texts = self.__dict__.setdefault("texts", {})
    texts.setdefault(seq.id, []).append(len(seq.tokens))
    return chain(seq, len(texts))


def reads_a_private_attribute(self: Any, seq: SequenceView, budget: int) -> DraftTree:
    return chain(seq, seq._seq.request.prompt_ids[0])


def keeps_views(self: Any, seq: SequenceView, budget: int) -> DraftTree:
    self.__dict__.setdefault("views", []).append(seq)
    return root_tree(seq.tokens[-1])


def keeps_ids(self: Any, seq: SequenceView, budget: int) -> DraftTree:
    self.__dict__.setdefault("table", {})[seq.id, 0] = 1
    return root_tree(seq.tokens[-1])


def counts_calls(self: Any, seq: SequenceView, budget: int) -> DraftTree:
    counts = self.__dict__.setdefault("counts", {})
    counts[seq.id] = counts.get(seq.id, 0) + 1
    return chain(seq, counts[seq.id] % 90)


def draws_at_random(self: Any, seq: SequenceView, budget: int) -> DraftTree:
    return chain(seq, int(np.random.default_rng().integers(90)))


def writes_to_the_prompt(self: Any, seq: Any, budget: int) -> DraftTree:
    seq.tokens[0] = 5
    return root_tree(seq.tokens[-1])


class WritesToWeights(NgramDrafter):
    def bind(self, context: DraftContext) -> None:
        self._norm: Any = context.target.final_norm

    def observe(self, feedback: Feedback) -> None:
        self._norm.weight.neg_()


class ForgetsTwice(NgramDrafter):
    def propose(self, seqs: Sequence[SequenceView], budgets: Sequence[int]) -> list[DraftTree]:
        for seq in seqs:
            self._indexes.setdefault(seq.id, None)  # type: ignore[arg-type]
        return [root_tree(seq.tokens[-1]) for seq in seqs]

    def forget(self, seq_id: str) -> None:
        del self._indexes[seq_id]


class WrongNumber(NgramDrafter):
    def propose(self, seqs: Sequence[SequenceView], budgets: Sequence[int]) -> list[DraftTree]:
        return [root_tree(seqs[0].tokens[-1])]


class RepeatedToken(NgramDrafter):
    def propose_tree(self, seq: SequenceView, budget: int) -> DraftTree:
        tokens = [seq.tokens[-1], 5, 5][:budget]
        return build_tree(tokens, [-1, 0, 0][:budget], [1.0, 0.5, 0.5][:budget])


FAULTS = [
    ("odd_contexts", drafter(raises_on_short_texts), r"propose raised IndexError: .*\(test_conf"),
    ("tree_sizes", drafter(ignores_the_budget), "propose: ValueError: .* with {'max_nodes': 2}"),
    ("odd_contexts", drafter(leaves_the_vocabulary), "propose: ValueError: "),
    ("tree_sizes", RepeatedToken, "propose: ValueError: "),
    ("greedy", WrongNumber, "propose: ValueError: 1 trees for 4 sequences"),
    ("greedy", WritesToWeights, "prompt 0, output position"),
    ("greedy", drafter(writes_to_the_prompt), "propose raised TypeError: 'ReadOnlyList' object"),
    ("cache_salts", drafter(reads_the_salt_of_others), "other trees if requests of another cache"),
    ("repeated_calls", drafter(counts_calls), "other trees if `propose` and `observe` are called"),
    ("private_attributes", drafter(reads_a_private_attribute), "AttributeError: _seq of a Seq"),
    ("forget", drafter(keeps_views), "all requests were forgotten, views has a SequenceView"),
    ("forget", drafter(keeps_ids), "all requests were forgotten, table has the id 'request-"),
    ("forget", ForgetsTwice, "forget raised KeyError"),
]


class Ngram(DrafterConformance):
    drafter: ClassVar[str] = "ngram"


@pytest.mark.parametrize(("check", "faulty", "reason"), FAULTS)
def test_a_fault_is_found(
    check: str, faulty: type, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NGRAM, faulty)
    Ngram.setup_class()
    try:
        with pytest.raises(AssertionError, match=reason):
            getattr(Ngram(), f"test_{check}")()
    finally:
        Ngram.teardown_class()


def test_the_command_prints_a_line_per_check_and_the_times(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NGRAM, drafter(draws_at_random))
    checks = ["test_load", "test_repeated_calls", "test_cache_salts", "test_private_attributes"]
    monkeypatch.setattr(conformance, "CHECKS", checks)
    assert conformance.main(["--draft", "ngram", "--options", "ngram.max_match=3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "PASS  load: It loads, and has every method that the engine calls" in lines
    assert sum(line.startswith("SKIP  ") and "two runs" in line for line in lines) == 2
    assert any(
        line.startswith("time  ") and "propose for 1 sequence: median" in line for line in lines
    )
    assert lines[-1] == "2 passed, 2 could not be checked"


def test_the_command_fails_with_the_reason(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NGRAM, type("Other", (), {}))
    assert conformance.main(["--draft", "ngram"]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("FAIL  load: DraftError: draft: 'ngram': ")
    assert "expected a subclass of DraftOptions" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--draft", "ngramm"], "did you mean 'ngram'"),
        (["--draft", "auto"], "'auto' stands for several drafters; name one"),
        (["--draft", "ngram", "--options", "suffix.capacity=9"], "'suffix' does not run here"),
        (["--draft", "ngram", "--target", "no/such/model/here"], "no/such/model/here"),
    ],
)
def test_wrong_usage(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert conformance.main(arguments) == 2
    assert message in capsys.readouterr().err
