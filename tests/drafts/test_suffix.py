"""The suffix drafter: which texts it searches, and the trees it makes of the matches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import TINY_VOCAB, EngineFactory, ids

from specserve.cache.table import BlockTable
from specserve.sequence import SequenceState, SequenceView, Status
from specserve.speculation.drafter import DraftError, Feedback
from specserve.speculation.registry import create_drafter
from specserve.tree import DraftTree
from specserve.types import Request, SamplingParams
from specserve_drafts.suffix import drafter as suffix
from specserve_drafts.suffix.drafter import PastOutputs, SuffixDrafter, SuffixOptions
from specserve_kernels.host.reference import TokenLog

TokenPath = tuple[int, ...]
ANSWER = [30, 31, 32, 33, 34, 35]


def drafter(**options: Any) -> SuffixDrafter:
    return SuffixDrafter(SuffixOptions(**options), None, Path())


def sequence(
    name: str, prompt: Sequence[int], output: Sequence[int] = (), salt: str = ""
) -> SequenceState:
    request = Request(name, tuple(prompt), SamplingParams(seed=0), cache_salt=salt)
    return SequenceState(request, [*prompt, *output], BlockTable(8))


def observe(draft: SuffixDrafter, seq: SequenceState) -> None:
    draft.observe(Feedback((SequenceView(seq),), {}, {}, cast(Any, None), (), {}))


def finish(draft: SuffixDrafter, seq: SequenceState) -> None:
    observe(draft, seq)
    seq.status = Status.FINISHED
    draft.forget(seq.id)


def answered(draft: SuffixDrafter, *outputs: Sequence[int], salt: str = "") -> SuffixDrafter:
    """The drafter, after requests that had these outputs."""
    for index, output in enumerate(outputs):
        finish(draft, sequence(f"past-{index}", [1], output, salt))
    return draft


def propose(
    draft: SuffixDrafter, tokens: Sequence[int], budget: int = 8, salt: str = ""
) -> DraftTree:
    """The tree proposed for a new request, which is forgotten afterwards."""
    (tree,) = draft.propose([SequenceView(sequence("new", tokens, salt=salt))], [budget])
    draft.forget("new")
    tree.validate(10_000, budget)
    assert tree.tokens[0] == tokens[-1]
    return tree


def paths(tree: DraftTree) -> dict[TokenPath, float]:
    """By the tokens on the path to a node, without the root: its path probability."""
    ways: list[TokenPath] = [()]
    for token, parent in zip(tree.tokens[1:].tolist(), tree.parents[1:].tolist(), strict=True):
        ways.append((*ways[parent], token))
    return dict(zip(ways, tree.path_probs.tolist(), strict=True))


def test_the_longest_match_has_the_highest_probability() -> None:
    text = [5, 6, 7, 8, 1, 9, 7, 8, 2, 9, 8, 3, 5, 6, 7, 8]
    tree = propose(drafter(), text)
    assert tree.tokens[1] == 1
    assert tree.drafter_ids.tolist() == [0] + [1] * (len(tree) - 1)


def test_the_most_frequent_continuation_is_the_most_likely() -> None:
    text = [
        x for index, token in enumerate([2] * 5 + [3] * 3 + [4]) for x in (50 + index, 1, token)
    ]
    path_probs = paths(propose(drafter(min_probability=0.0), [*text, 99, 1], 30))
    assert path_probs[2,] == pytest.approx(5 / 9 * 5 / 6)
    assert path_probs[3,] == pytest.approx(3 / 9 * 3 / 4)
    assert path_probs[4,] == pytest.approx(1 / 9 * 1 / 2)
    assert set(paths(propose(drafter(min_probability=0.2), [*text, 99, 1], 30))) >= {(2,), (3,)}
    assert (4,) not in paths(propose(drafter(min_probability=0.2), [*text, 99, 1], 30))


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=30),
    st.integers(1, 12),
    st.integers(1, 5),
    st.integers(0, 8),
)
def test_the_tree_has_the_most_probable_of_all_paths(
    text: list[int], budget: int, min_match: int, more: int
) -> None:
    """Compared with a search over every position and every path."""
    options = {"min_match": min_match, "max_match": min_match + more, "min_probability": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suffix, "_MAX_MATCHED", 10_000)  # all of them count
        found = paths(propose(drafter(**options), text, budget))
    expected = all_paths(text, budget - 1, min_match, min_match + more)
    for path, path_prob in found.items():
        assert path_prob == pytest.approx(expected[path], rel=1e-4)
    best = sorted(expected.values(), reverse=True)[:budget]
    assert sorted(found.values(), reverse=True) == pytest.approx(best, rel=1e-4)


def all_paths(
    text: list[int], depth: int, min_match: int, max_match: int
) -> dict[TokenPath, float]:
    followers: list[tuple[int, list[int]]] = []
    for position in range(1, len(text)):
        matched = 0
        while (
            matched < min(position, max_match)
            and text[position - 1 - matched] == text[len(text) - 1 - matched]
        ):
            matched += 1
        if matched >= min_match:
            followers.append((matched, (text[position:] * (depth + 1))[:depth]))
    path_probs: dict[TokenPath, float] = {(): 1.0}
    for length in range(1, depth + 1):
        for path in {tuple(after[:length]) for _, after in followers}:
            above = [m for m, after in followers if tuple(after[: length - 1]) == path[:-1]]
            here = [m for m, after in followers if tuple(after[:length]) == path]
            prob = sum(4.0**m for m in here) / sum(4.0**m for m in above)
            seen = sum(m + length - 1 for m in here)
            path_probs[path] = path_probs[path[:-1]] * prob * seen / (seen + 1)
    return path_probs


def test_a_repetition_is_continued_beyond_the_end_of_the_text() -> None:
    tree = propose(drafter(), [1, 2, 3, 4, 1, 2])
    assert tree.tokens.tolist() == [2, 3, 4, 1, 2, 3, 4, 1]


def test_outputs_of_earlier_requests_are_searched() -> None:
    tree = propose(answered(drafter(), ANSWER), [7, 30, 31])
    assert tree.tokens.tolist() == [31, 32, 33, 34, 35]
    assert len(propose(answered(drafter(shared=False), ANSWER), [7, 30, 31])) == 1


def test_prompts_of_other_requests_are_not_searched() -> None:
    draft = drafter()
    finish(draft, sequence("past", ANSWER, [8, 9]))
    assert len(propose(draft, [30, 31])) == 1
    assert propose(draft, [8]).tokens.tolist() == [8, 9]


def test_outputs_are_searched_at_the_same_salt_only() -> None:
    draft = answered(drafter(), ANSWER, salt="ours")
    answered(draft, [30, 31, 40, 41], salt="theirs")
    assert len(propose(draft, [30, 31], salt="nobody's")) == 1
    assert len(propose(draft, [30, 31])) == 1
    assert propose(draft, [30, 31], salt="ours").tokens.tolist() == [31, 32, 33, 34, 35]
    assert propose(draft, [30, 31], salt="theirs").tokens.tolist() == [31, 40, 41]


def test_no_match_spans_two_outputs() -> None:
    draft = answered(drafter(min_probability=0.0), [1, 2, 3], [4, 5, 6], [7])
    assert propose(draft, [1, 2]).tokens.tolist() == [2, 3]
    assert len(propose(draft, [2, 3])) == 1
    # No match extends into the previous output.
    assert paths(propose(draft, [2, 3, 4])) == paths(propose(draft, [9, 9, 4]))


def test_the_output_of_a_preempted_request_is_added_once() -> None:
    draft = drafter()
    seq = sequence("a", [1], ANSWER[:3])
    observe(draft, seq)
    draft.forget("a")  # preempted: it is waiting
    assert len(propose(draft, [30])) == 1
    seq.tokens.extend(ANSWER[3:])
    finish(draft, seq)
    draft.forget("a")
    assert paths(propose(draft, [30])) == paths(propose(answered(drafter(), ANSWER), [30]))


def test_each_output_is_added_once_in_spite_of_preemptions(
    make_engine: EngineFactory,
) -> None:
    engine = make_engine("suffix", kv_slots=192, max_num_batched_tokens=48)
    past = cast(SuffixDrafter, engine.drafter.drafters["suffix"])._past
    added: list[tuple[str, TokenPath]] = []
    cast(Any, past).add = lambda salt, output: added.append((salt, tuple(output)))
    expected: dict[str, list[int]] = {}
    for index in range(4):
        params = SamplingParams(temperature=1.0, max_tokens=64, seed=index, ignore_eos=True)
        prompt = tuple(range(index, index + 40))
        engine.submit(Request(f"q{index}", prompt, params, cache_salt=f"q{index}"))
    while engine.has_work:
        for output in engine.step():
            expected.setdefault(output.id, []).extend(output.ids)
    assert engine.scheduler.num_preemptions > 0, "the test is meant to preempt"
    assert sorted(added) == sorted((salt, tuple(tokens)) for salt, tokens in expected.items())


def test_a_repeated_request_accepts_more_tokens(make_engine: EngineFactory) -> None:
    """At another salt it does not."""
    engine = make_engine("suffix", max_nodes=8)
    params = SamplingParams(temperature=1.0, max_tokens=48, seed=3, ignore_eos=True)
    answers, lengths = [], []
    for index, salt in enumerate(("a", "a", "b")):
        engine.submit(Request(f"q{index}", tuple(range(20, 40)), params, cache_salt=salt))
        outputs = []
        while engine.has_work:
            outputs += engine.step()
        answers.append(ids(outputs))
        assert outputs[-1].stats is not None
        lengths.append(outputs[-1].stats.mean_acceptance_length)
    assert answers[0] == answers[1] == answers[2]
    assert lengths[2] == lengths[0] < 3 < 5 < lengths[1]


def test_memory_is_bounded_and_the_oldest_outputs_are_removed_first() -> None:
    made: list[TokenLog] = []

    def new_log() -> TokenLog:
        made.append(TokenLog((4, 2, 1)))
        return made[-1]

    past = PastOutputs(1000, new_log)
    for index in range(2000):
        salt = f"salt-{index % 37}" if index % 2 else f"fresh-{index}"
        past.add(salt, [10 * index + offset for offset in range(index % 23)])
        logs = [*past._young.values(), *past._old.values()]
        assert sum(len(log) for log in logs) <= 1000
        assert len(logs) <= 1000 // 64
        kept = [log for log in made if log in logs]
        entries = [len(latest) for log in kept for latest, _ in log._chains.values()]
        assert sum(entries) <= 3 * 1000
        assert len(past.logs(salt)) >= 1
    assert not past.logs("fresh-1900")


def test_the_latest_outputs_are_kept() -> None:
    draft = drafter(capacity=1000)
    for index in range(300):
        answered(draft, range(100 + 10 * index, 108 + 10 * index))
    for index in range(290, 300):
        first = 100 + 10 * index
        assert propose(draft, [first]).tokens.tolist() == list(range(first, first + 8))
    assert len(propose(draft, [100])) == 1


def test_the_end_of_an_output_over_the_capacity_is_kept() -> None:
    draft = answered(drafter(capacity=1000), range(5000))
    assert len(propose(draft, [10])) == 1
    assert propose(draft, [4990]).tokens.tolist() == list(range(4990, 4998))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_match": 65}, r"draft\.options\.suffix\.max_match: 65 is out .* expected 1 to 64$"),
        ({"min_match": 0}, r"suffix\.min_match: 0 is out of range; expected 1 to 64$"),
        ({"min_match": 5, "max_match": 2}, r"suffix\.min_match: 5; expected 1 to max_match \(2\)$"),
        ({"capacity": 10}, r"suffix\.capacity: 10 is .* expected 1000 to 100000000$"),
        ({"min_probability": 1.5}, r"suffix\.min_probability: 1\.5 is .* expected 0 to 1$"),
        ({"min_probability": float("nan")}, r"suffix\.min_probability: nan is .* expected 0 to 1$"),
        ({"min_probabilty": 0.1}, r"draft\.options\.suffix.*min_probability"),
    ],
)
def test_errors_of_options_name_the_allowed_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(DraftError, match=message):
        create_drafter("suffix", {"suffix": options}, Path(), Path)


def test_trees_are_valid_and_within_the_budget() -> None:
    draft = answered(drafter(), [0] * 200, list(range(TINY_VOCAB)) * 3, [5, 5, 6] * 40)
    for budget in (1, 2, 7, 64):
        for tokens in ([0], [0] * 100, [5, 5, 6, 5, 5], list(range(TINY_VOCAB)), [9_999]):
            assert len(propose(draft, tokens, budget)) <= budget
