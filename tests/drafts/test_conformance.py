"""The requirements on every drafter, tested with all built-in ones, alone and in pairs."""

from itertools import combinations
from pathlib import Path
from shutil import copyfile

import pytest
from eagle_heads import write_eagle
from medusa_heads import write_medusa
from tiny import TINY_VOCAB, EngineFactory, ids, run, write_tiny_llama, write_tiny_tokenizer

from specserve.speculation.cost_model import CostModel
from specserve.speculation.drafter import DraftError
from specserve.speculation.failures import MAX_FAILURES
from specserve.speculation.registry import BUILTIN, create_drafter, load_drafter, public_names
from specserve.types import Request, SamplingParams, SpeculationParams
from specserve_evals.drafter_conformance import PROMPTS, DrafterConformance
from specserve_evals.drafter_conformance import SAMPLING as SETTINGS


class BuiltIn(DrafterConformance):
    """What plug-ins are tested for, and what only concerns the engine."""

    def test_two_tenants(self) -> None:
        """Sequences are preempted, take turns, and have their prompts computed in chunks."""
        prompts = [tuple(range(index, index + 40)) for index in range(8)]
        params = [
            SamplingParams(temperature=1.0, max_tokens=40, seed=index, ignore_eos=True)
            for index in range(8)
        ]
        plain = self.plain_ids("two tenants", prompts, params)
        engine, watched = self.watched_engine(
            max_num_seqs=4, max_num_batched_tokens=48, max_nodes=4
        )
        got: dict[str, tuple[int, ...]] = {}
        in_turns = False
        for index in range(8):
            tenant = "second" if index > 6 else "first"
            engine.submit(Request(f"q{index}", prompts[index], params[index], tenant=tenant))
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
        assert watched.errors == []
        assert [got[f"q{index}"] for index in range(8)] == plain


class TestNone(BuiltIn):
    drafter = "none"


class TestNgram(BuiltIn):
    drafter = "ngram"


class TestSuffix(BuiltIn):
    drafter = "suffix"


class TestRecycle(BuiltIn):
    drafter = "recycle"


class TestDraftLM(BuiltIn):
    drafter = "draft_lm"

    @classmethod
    def make_draft(cls, target: Path, folder: Path) -> str:
        return str(write_tiny_llama(folder, seed=2, num_layers=1))


class TestEagle3(BuiltIn):
    drafter = "eagle"

    @classmethod
    def make_draft(cls, target: Path, folder: Path) -> str:
        return str(write_eagle(folder, "specforge").path)


class TestEagle1(TestEagle3):
    @classmethod
    def make_draft(cls, target: Path, folder: Path) -> str:
        return str(write_eagle(folder, "eagle1").path)


class TestMedusa(BuiltIn):
    drafter = "medusa"

    @classmethod
    def make_draft(cls, target: Path, folder: Path) -> str:
        return str(write_medusa(folder).path)


def test_every_built_in_drafter_has_a_class_of_tests() -> None:
    assert {kind.drafter for kind in BuiltIn.__subclasses__()} == set(BUILTIN)


DRAFTERS = sorted(set(BUILTIN) - {"none"})


@pytest.fixture
def drafts(tiny_draft: Path, tiny_heads: list[Path], tiny_medusa: Path) -> dict[str, str]:
    """What `draft` of the engine is, by drafter."""
    paths = {"draft_lm": tiny_draft, "eagle": tiny_heads[0], "medusa": tiny_medusa}
    return {name: str(paths.get(name, name)) for name in DRAFTERS}


@pytest.mark.parametrize("pair", list(combinations(DRAFTERS, 2)), ids="+".join)
@pytest.mark.parametrize("setting", ["greedy", "everything"])
def test_output_of_two_drafters_equals_plain_decoding(
    pair: tuple[str, str], setting: str, drafts: dict[str, str], make_engine: EngineFactory
) -> None:
    params = SETTINGS[setting]
    plain = [ids(outputs) for outputs in run(make_engine("none"), PROMPTS, params)]
    engine = make_engine([drafts[name] for name in pair], max_nodes=12)
    assert [ids(outputs) for outputs in run(engine, PROMPTS, params)] == plain


@pytest.mark.parametrize("name", DRAFTERS)
def test_tokens_outside_the_drafts_vocabulary_do_not_affect_other_requests(
    name: str,
    drafts: dict[str, str],
    tiny_model: Path,
    tmp_path: Path,
    make_engine: EngineFactory,
) -> None:
    """Models with the same tokenizer may have embeddings padded to different sizes.

    The tokens are in prompts and in answers, of more requests than a drafter may fail for.
    """
    draft = drafts[name]
    if name == "draft_lm":
        short = write_tiny_llama(tmp_path / "short", seed=2, vocab_size=60)
        copyfile(tiny_model / "tokenizer.json", short / "tokenizer.json")
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


def test_a_target_that_is_its_own_draft_accepts_every_token(
    tiny_model: Path, make_engine: EngineFactory
) -> None:
    """Rows are exact and the noise is shared, so no chain token is ever rejected."""
    chain = {"draft_lm": {"branching": 1, "beam": 1}}
    for setting in SETTINGS:
        plain = run(make_engine("none"), PROMPTS, SETTINGS[setting])
        engine = make_engine(str(tiny_model), options=chain, max_nodes=6)
        found = run(engine, PROMPTS, SETTINGS[setting])
        assert list(map(ids, found)) == list(map(ids, plain))
        for outputs in found:
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
