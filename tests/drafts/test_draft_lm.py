"""A language model as a drafter: its context length, and failed forward passes."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny import EngineFactory, ids, run, write_tiny_llama
from torch import Tensor

from specserve.batch import SegmentRows
from specserve.engine.engine import Engine
from specserve.types import SamplingParams
from specserve_drafts.draft_lm import DraftLM

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, seed=1)
SHORT, LONG = tuple(range(1, 20)), tuple(i % 90 for i in range(100))


def tokens_per_pass(engine: Engine, prompt: tuple[int, ...]) -> float:
    (outputs,) = run(engine, [prompt], GREEDY)
    return len(ids(outputs)) / len(outputs)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_nothing_is_drafted_beyond_the_context_of_the_draft(
    tmp_path: Path, make_engine: EngineFactory, quantization: str
) -> None:
    """Other requests, at the same time and later, are drafted for as before."""
    target = write_tiny_llama(tmp_path / "target", seed=1, head_dim=16)
    draft = write_tiny_llama(tmp_path / "draft", seed=1, head_dim=16, context=64)
    settings = {"target": target, "quantization": quantization, "max_nodes": 6}
    engine = make_engine(str(draft), **settings)
    alone = tokens_per_pass(engine, SHORT)
    assert alone > 3
    prompts = [LONG, SHORT, LONG[:40]]  # the last one grows to its 64th token
    answers = run(engine, prompts, GREEDY)
    plain = run(make_engine("none", **settings), prompts, GREEDY)
    assert [ids(outputs) for outputs in answers] == [ids(outputs) for outputs in plain]
    assert len(answers[0]) == 24
    assert len(answers[2]) < 12
    assert tokens_per_pass(engine, SHORT) == alone
    assert engine.drafter.active == list(engine.drafter.names)


def test_a_failed_forward_pass_leaves_no_state(
    tiny_model: Path, make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(str(tiny_model), max_nodes=6)
    alone = tokens_per_pass(engine, SHORT)
    (drafter,) = engine.drafter.drafters.values()
    assert isinstance(drafter, DraftLM)
    forward, failures = drafter._forward, ["once"]

    def fails_once(rows: Sequence[SegmentRows]) -> Tensor:
        if failures:
            raise RuntimeError(failures.pop())
        return forward(rows)

    monkeypatch.setattr(drafter, "_forward", fails_once)
    other = (*SHORT[1:], 7)  # nothing of it is cached
    during = tokens_per_pass(engine, other)
    assert not failures
    assert during > 0.7 * alone
    assert tokens_per_pass(engine, other) == pytest.approx(alone, rel=0.3)
