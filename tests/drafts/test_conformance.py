"""The requirements on every drafter, tested with all registered ones."""

import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
from tiny import TINY_VOCAB, EngineFactory, ids, run, write_tiny_llama, write_tiny_tokenizer

from specserve.engine.engine import Engine
from specserve.speculation.cost_model import CostModel
from specserve.speculation.drafter import DraftError
from specserve.speculation.failures import MAX_FAILURES
from specserve.speculation.registry import BUILTIN, create_drafter, load_drafter, public_names
from specserve.types import Request, SamplingParams, SpeculationParams

PROMPTS = [
    (1, 2, 3, 4, 1, 2, 3, 4, 1, 2),
    tuple(range(20, 60)),
    (7,),
    tuple((11 * i) % 90 for i in range(150)),
]
SETTINGS = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=32, seed=0),
    "sampled": SamplingParams(temperature=1.0, max_tokens=32, seed=11, ignore_eos=True),
    "nucleus": SamplingParams(temperature=0.7, top_p=0.9, top_k=20, max_tokens=32, seed=5),
    "everything": SamplingParams(
        temperature=0.9,
        min_p=0.02,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        repetition_penalty=1.2,
        logit_bias={5: 3.0, 9: -20.0},
        min_tokens=6,
        stop_token_ids=(17, 40),
        max_tokens=32,
        seed=2**62,
    ),
}
# How to build each registered drafter in a test; a new one fails here until it is added.
NAMES = sorted(BUILTIN)
PAIRS = list(combinations([name for name in NAMES if name != "none"], 2))


def specs(
    name: str, tiny_model: Path, tiny_draft: Path, tiny_heads: list[Path], tiny_medusa: Path
) -> list[str]:
    """`--draft` values that exercise a drafter: good and bad checkpoints where it takes one."""
    builders = {
        "none": ["none"],
        "ngram": ["ngram"],
        "recycle": ["recycle"],
        "suffix": ["suffix"],
        "draft_lm": [str(tiny_draft), str(tiny_model)],
        "eagle": [str(head) for head in tiny_heads],
        "medusa": [str(tiny_medusa)],
    }
    return builders[name]


@pytest.fixture(params=NAMES)
def drafts(
    request: pytest.FixtureRequest,
    tiny_model: Path,
    tiny_draft: Path,
    tiny_heads: list[Path],
    tiny_medusa: Path,
) -> list[str]:
    return specs(request.param, tiny_model, tiny_draft, tiny_heads, tiny_medusa)


@pytest.mark.parametrize("setting", SETTINGS)
def test_output_equals_plain_decoding(
    drafts: list[str], setting: str, make_engine: EngineFactory
) -> None:
    """With every drafter, at several budgets, batch sizes and sizes of the KV cache."""
    params = SETTINGS[setting]
    plain = [ids(outputs) for outputs in run(make_engine("none"), PROMPTS, params)]
    for draft in drafts:
        for more in (
            {"max_nodes": 8},
            {"max_nodes": 3, "max_num_seqs": 1},
            {"max_nodes": 17, "kv_slots": 192, "max_num_batched_tokens": 48},
        ):
            outputs = run(make_engine(draft, **more), PROMPTS, params)
            assert [ids(each) for each in outputs] == plain, (draft, more)


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
@pytest.mark.parametrize("setting", ["greedy", "everything"])
def test_output_of_two_drafters_equals_plain_decoding(
    pair: tuple[str, str],
    setting: str,
    tiny_model: Path,
    tiny_draft: Path,
    tiny_heads: list[Path],
    tiny_medusa: Path,
    make_engine: EngineFactory,
) -> None:
    params = SETTINGS[setting]
    plain = [ids(outputs) for outputs in run(make_engine("none"), PROMPTS, params)]
    checkpoints = (tiny_model, tiny_draft, tiny_heads, tiny_medusa)
    together = [specs(name, *checkpoints)[0] for name in pair]
    outputs = run(make_engine(together, max_nodes=12), PROMPTS, params)
    assert [ids(each) for each in outputs] == plain


def run_and_record(engine: Engine, max_steps: int = 40) -> Iterator[list[tuple[int, int]]]:
    """Run the prompts; yields after each step the (tree size, budget) of all proposals so far."""
    for index, prompt in enumerate(PROMPTS):
        params = SamplingParams(temperature=0.8, max_tokens=24, seed=index, ignore_eos=True)
        engine.submit(Request(f"q{index}", prompt, params))
    compose = engine.drafter
    seen: list[tuple[int, int]] = []
    original = compose.propose

    def spy(seqs, budgets):  # type: ignore[no-untyped-def]
        trees = original(seqs, budgets)
        for seq, tree, budget in zip(seqs, trees, budgets, strict=True):
            tree.validate(TINY_VOCAB, budget)
            assert tree.tokens[0] == seq.tokens[-1]
            seen.append((len(tree), budget))
        return trees

    compose.propose = spy  # type: ignore[method-assign]
    for _ in range(max_steps):
        if not engine.has_work:
            return
        engine.step()
        engine.check_integrity()
        yield seen


@pytest.mark.parametrize("max_nodes", [1, 2, 5, 64])
def test_trees_are_valid_and_within_budget(
    drafts: list[str], max_nodes: int, make_engine: EngineFactory
) -> None:
    for draft in drafts:
        engine = make_engine(draft, max_nodes=max_nodes)
        for seen in run_and_record(engine):
            assert all(size <= budget <= max_nodes for size, budget in seen)
        assert engine.drafter.active == list(engine.drafter.names), "the drafter raised"


def test_forget_frees_everything(drafts: list[str], make_engine: EngineFactory) -> None:
    """Finished, aborted and preempted requests leave no state behind in the drafter."""
    for draft in drafts:
        engine = make_engine(draft, kv_slots=192, max_num_batched_tokens=48)
        before = _state_size(engine)
        for index in range(4):
            prompt = tuple(range(index, index + 40))
            params = SamplingParams(temperature=1.0, max_tokens=64, seed=index, ignore_eos=True)
            engine.submit(Request(f"q{index}", prompt, params))
        for _ in range(6):
            engine.step()
        engine.abort("q1")
        while engine.has_work:
            engine.step()
        assert engine.scheduler.num_preemptions > 0, "the test is meant to preempt"
        assert _state_size(engine) == before
        assert engine.kv.pool.num_available == engine.kv.pool.num_blocks


def test_output_of_two_tenants_equals_plain_decoding(
    drafts: list[str], make_engine: EngineFactory
) -> None:
    """Although sequences are preempted, take turns, and have their prompts computed in chunks."""
    prompts = [tuple(range(index, index + 40)) for index in range(8)]
    params = [
        SamplingParams(temperature=1.0, max_tokens=40, seed=index, ignore_eos=True)
        for index in range(8)
    ]
    plain = [ids(outputs) for outputs in run(make_engine("none"), prompts, params)]
    for draft in drafts:
        engine = make_engine(draft, max_num_seqs=4, max_num_batched_tokens=48, max_nodes=4)
        got: dict[str, tuple[int, ...]] = {}
        in_turns = False
        for index in range(8):
            tenant = "second" if index > 6 else "first"
            request = Request(f"q{index}", prompts[index], params[index], tenant=tenant)
            engine.submit(request)
            while index == 6 and len(got) < 4:
                for output in engine.step():
                    got[output.id] = got.get(output.id, ()) + output.ids
        shares = engine.scheduler.tenants
        shares._costs, shares._all["first"].credit = CostModel({1: 1.0, 64: 64.0}), 0.0
        while engine.has_work:
            outputs = engine.step()
            running = {seq.id for seq in engine.scheduler.running if seq.num_pending == 1}
            in_turns = in_turns or bool(running - {output.id for output in outputs})
            for output in outputs:
                got[output.id] = got.get(output.id, ()) + output.ids
        assert engine.scheduler.num_preemptions > 0, "the test is meant to preempt"
        assert in_turns, "the test is meant to leave a sequence out of a step"
        assert engine.drafter.active == list(engine.drafter.names), "the drafter raised"
        assert [got[f"q{index}"] for index in range(8)] == plain


def _state_size(engine: Engine) -> int:
    """Entries kept per sequence, in any container of the drafter keyed by sequence id."""
    (drafter,) = engine.drafter.drafters.values()
    return sum(
        sum(1 for key in value if isinstance(key, str) and re.fullmatch(r"q\d+", key))
        for value in vars(drafter).values()
        if isinstance(value, dict)
    )


@pytest.mark.parametrize("name", [name for name in NAMES if name != "none"])
def test_tokens_outside_the_drafts_vocabulary_do_not_affect_other_requests(
    name: str,
    tiny_model: Path,
    tiny_draft: Path,
    tiny_heads: list[Path],
    tiny_medusa: Path,
    tmp_path: Path,
    make_engine: EngineFactory,
) -> None:
    """Models with the same tokenizer may have embeddings padded to different sizes.

    The tokens are in prompts and in answers, of more requests than a drafter may fail for.
    """
    draft = specs(name, tiny_model, tiny_draft, tiny_heads, tiny_medusa)[0]
    if name == "draft_lm":
        short = write_tiny_llama(tmp_path / "short", seed=2, vocab_size=60)
        (short / "tokenizer.json").write_bytes((tiny_model / "tokenizer.json").read_bytes())
        draft = str(short)
    known, foreign = (
        SamplingParams(
            temperature=0.0, max_tokens=16, seed=0, logit_bias=dict.fromkeys(unwanted, -100.0)
        )
        for unwanted in (range(60, 97), range(60))
    )
    prompts, params = [PROMPTS[0], (1, 2, 1), (1, 70, 96)], [known, foreign, foreign]
    plain = [ids(outputs) for outputs in run(make_engine("none"), prompts, params)]
    assert max(plain[0]) < 60 <= min(plain[1] + plain[2])
    engine = make_engine(draft, max_nodes=6)
    for _ in range(MAX_FAILURES + 1):
        answers = run(engine, prompts, params)
        assert [ids(outputs) for outputs in answers] == plain
        stats = answers[0][-1].stats
        assert stats is not None
        assert stats.num_draft_tokens > 0
    assert set(engine.drafter.num_failures.values()) == {0}


def test_speculation_can_be_switched_off_per_request(
    drafts: list[str], make_engine: EngineFactory
) -> None:
    params = SETTINGS["greedy"]
    for draft in drafts:
        engine = make_engine(draft)
        for outputs in run(engine, PROMPTS, params, speculation=SpeculationParams(enabled=False)):
            stats = outputs[-1].stats
            assert stats is not None
            assert stats.num_draft_tokens == 0


def test_a_target_that_is_its_own_draft_accepts_every_token(
    tiny_model: Path, make_engine: EngineFactory
) -> None:
    """Rows are exact and the noise is shared, so no chain token is ever rejected."""
    chain = {"draft_lm": {"branching": 1, "beam": 1}}
    for setting in SETTINGS:
        engine = make_engine(str(tiny_model), options=chain, max_nodes=6)
        for outputs in run(engine, PROMPTS, SETTINGS[setting]):
            for output in outputs[:-1]:  # the last pass may be cut by the end of the request
                assert len(output.ids) == 6, setting
                assert output.drafter_ids == (1, 1, 1, 1, 1, 0)


@pytest.mark.parametrize("draft", ["ngram", "suffix"])
def test_a_prediction_is_used_with_every_drafter(make_engine: EngineFactory, draft: str) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=40, seed=0)
    plain = ids(run(make_engine("none"), [PROMPTS[1]], params)[0])
    predicted = run(
        make_engine(draft, max_nodes=8),
        [PROMPTS[1]],
        params,
        speculation=SpeculationParams(prediction=plain),
    )[0]
    assert ids(predicted) == plain
    stats = predicted[-1].stats
    assert stats is not None
    assert stats.mean_acceptance_length > 7, stats  # all but the last pass take 8 tokens


def test_a_draft_with_another_vocabulary_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    other = write_tiny_llama(tmp_path / "other", seed=3)
    write_tiny_tokenizer(other, [f"x{i}" for i in range(TINY_VOCAB)])
    with pytest.raises(DraftError, match="another vocabulary"):
        create_drafter(str(other), {}, tiny_model, Path)


def test_errors_of_options_and_names_suggest_valid_ones(tiny_model: Path) -> None:
    with pytest.raises(DraftError, match=r"draft\.options\.ngram.*max_match"):
        create_drafter("ngram", {"ngram": {"max_mach": 3}}, tiny_model, Path)
    with pytest.raises(DraftError, match=r"ngram\.min_match: 5; expected 1 to max_match \(2\)"):
        create_drafter("ngram", {"ngram": {"min_match": 5, "max_match": 2}}, tiny_model, Path)
    with pytest.raises(DraftError, match="did you mean 'ngram'"):
        load_drafter("ngramm")


def test_a_failing_drafter_does_not_change_the_output(make_engine: EngineFactory) -> None:
    params = SETTINGS["sampled"]
    plain = [ids(outputs) for outputs in run(make_engine("none"), PROMPTS, params)]
    engine = make_engine("ngram")
    drafter = engine.drafter.drafters["ngram"]

    def broken(seqs, budgets):  # type: ignore[no-untyped-def]
        raise RuntimeError("boom")

    drafter.propose = broken  # type: ignore[method-assign]
    for number in range(MAX_FAILURES):
        assert engine.drafter.num_failures == {"ngram": number}
        assert [ids(outputs) for outputs in run(engine, PROMPTS, params)] == plain
    assert engine.drafter.active == []


def test_auto_stands_for_recycle_without_a_pretrained_head(
    tiny_model: Path, make_engine: EngineFactory
) -> None:
    assert make_engine("auto").drafter.names == ("recycle",)
    assert make_engine(["ngram", "auto", str(tiny_model)]).drafter.names == (
        *("ngram", "recycle"),
        tiny_model.name,
    )
    params = SETTINGS["everything"]
    plain = [ids(outputs) for outputs in run(make_engine("none"), PROMPTS, params)]
    assert [ids(outputs) for outputs in run(make_engine("auto"), PROMPTS, params)] == plain
    with pytest.raises(DraftError, match="did you mean 'auto'"):
        load_drafter("autto")


def test_public_names_are_unique_and_without_paths() -> None:
    """Clients see these names."""
    assert public_names(["ngram", "/models/a/draft", "org/draft", "c/other"]) == [
        *("ngram", "draft", "draft#2", "other")
    ]
