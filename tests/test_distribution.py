"""The distribution of sampled text under speculation, against the exact one.

The model sees one token (sliding window 1), so its distribution is a table: 200,000 continuations
are taken from long generations and compared with it in a chi-square test. A verifier with a small
bias fails the same test.
"""

import json
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from scipy.stats import chi2
from tiny import EngineFactory, ids, run, write_tiny_llama

from specserve.engine.engine import Engine
from specserve.step import FinishInfo
from specserve.types import SamplingParams
from specserve.verify.walk import Walk

VOCAB = 6
NUM_CONTINUATIONS = 200_000
NUM_SEQS = 256
Table = npt.NDArray[np.float64]
SAMPLING = SamplingParams(temperature=0.9, top_p=0.97, min_p=0.01, ignore_eos=True)


def write_memoryless(directory: Path, seed: int) -> Path:
    write_tiny_llama(directory, seed=seed, vocab_size=VOCAB, num_layers=1, sharpness=1.2)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config |= {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": 1,
    }
    config |= {"max_position_embeddings": 2048}
    path.write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def memoryless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_memoryless(tmp_path_factory.mktemp("memoryless"), seed=3)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_memoryless(tmp_path_factory.mktemp("other"), seed=4)


def transition_table(engine: Engine) -> Table:
    """[VOCAB, VOCAB] P(next | token), in plain numpy from the model's own logits."""
    params = SamplingParams(temperature=0.0, max_tokens=1, seed=0, logprobs=VOCAB, ignore_eos=True)
    table = np.zeros((VOCAB, VOCAB))
    for token, outputs in enumerate(run(engine, [(t,) for t in range(VOCAB)], params)):
        logprobs = outputs[0].logprobs[0]
        for candidate, logprob in logprobs.top:
            table[token, candidate] = logprob / SAMPLING.temperature
    table = np.exp(table)
    table /= table.sum(axis=1, keepdims=True)
    for row in table:
        order = np.argsort(-row)
        before = np.cumsum(row[order]) - row[order]
        row[order[before >= SAMPLING.top_p]] = 0.0
        row[row < SAMPLING.min_p * row.max()] = 0.0
    table /= table.sum(axis=1, keepdims=True)
    return table


def p_values(texts: list[tuple[int, ...]], table: Table) -> tuple[int, float, float]:
    """Number of continuations, and two chi-square p-values.

    The first over every continuation by one token, the second over non-overlapping ones by two.
    """
    ones = np.concatenate([np.stack([text[:-1], text[1:]], axis=1) for text in texts])
    twos = np.concatenate([np.array(text[: len(text) // 3 * 3]).reshape(-1, 3) for text in texts])
    joint = table[:, :, None] * table[None, :, :]
    return len(ones), chi_square(ones, table), chi_square(twos, joint)


def chi_square(observations: npt.NDArray[np.int64], distribution: Table) -> float:
    """p-value of P(rest | first token) = distribution. observations: [n, 2 or 3]."""
    observed = np.zeros(distribution.shape)
    np.add.at(observed, tuple(observations.T), 1)
    given = observed.reshape(VOCAB, -1).sum(axis=1)
    expected = distribution * given.reshape(-1, *[1] * (distribution.ndim - 1))
    if observed[distribution == 0].any():
        return 0.0  # a token that top_p or min_p forbids
    usual, rare = expected >= 5, (expected > 0) & (expected < 5)
    statistic = ((observed - expected)[usual] ** 2 / expected[usual]).sum()
    if rare.any():
        statistic += (observed[rare].sum() - expected[rare].sum()) ** 2 / expected[rare].sum()
    return float(chi2.sf(statistic, int(usual.sum()) + bool(rare.any()) - VOCAB))


def sample(engine: Engine, count: int) -> list[tuple[int, ...]]:
    tokens = -(-count // NUM_SEQS) + 1
    params = [
        msgspec.structs.replace(SAMPLING, max_tokens=tokens, seed=1000 + i) for i in range(NUM_SEQS)
    ]
    outputs = run(engine, [(i % VOCAB,) for i in range(NUM_SEQS)], params, check=False)
    return [ids(each) for each in outputs]


def engine_for(make_engine: EngineFactory, target: Path, draft: list[str]) -> Engine:
    return make_engine(
        draft,
        target=target,
        max_nodes=4,
        max_num_seqs=NUM_SEQS,
        max_num_batched_tokens=8 * NUM_SEQS,
        kv_slots=NUM_SEQS * 850,
        prefix_caching=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("draft", "at_least"),
    [
        ("ngram", NUM_CONTINUATIONS),
        ("draft_lm", NUM_CONTINUATIONS),
        ("ngram+draft_lm", NUM_CONTINUATIONS // 4),
    ],
)
def test_sampled_continuations_follow_the_exact_distribution(
    draft: str, at_least: int, memoryless: Path, other: Path, make_engine: EngineFactory
) -> None:
    drafts = [str(other) if name == "draft_lm" else name for name in draft.split("+")]
    engine = engine_for(make_engine, memoryless, drafts)
    table = transition_table(make_engine("none", target=memoryless))
    count, one, two = p_values(sample(engine, at_least), table)
    assert count >= at_least
    assert min(one, two) > 1e-4, f"p-values {one:.2g}, {two:.2g} over {count} continuations"


@pytest.mark.slow
def test_a_biased_verifier_fails_the_test(
    memoryless: Path, other: Path, make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rejection in twenty is turned into an acceptance."""
    emit = Walk.emit
    generator = torch.Generator().manual_seed(0)

    def biased(walk: Walk, token: int, finish: FinishInfo | None) -> None:
        children = walk.tree.children(walk.node or 0)
        if children and token not in children and torch.rand((), generator=generator) < 0.05:
            token = next(iter(children))
        emit(walk, token, finish)

    table = transition_table(make_engine("none", target=memoryless))
    count = NUM_CONTINUATIONS // 8
    honest = sample(engine_for(make_engine, memoryless, [str(other)]), count)
    assert min(p_values(honest, table)[1:]) > 1e-4
    monkeypatch.setattr(Walk, "emit", biased)
    cheated = sample(engine_for(make_engine, memoryless, [str(other)]), count)
    assert max(p_values(cheated, table)[1:]) < 1e-6
