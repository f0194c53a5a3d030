"""Medusa heads in an engine: their logits, and the trees made of them."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from medusa_heads import HIDDEN, LAYOUTS, NUM_HEADS, NUM_LAYERS, Medusa, plain_logits, write_medusa
from safetensors.torch import load_file, save_file
from tiny import TINY_VOCAB, EngineFactory, ids, run, write_tiny_llama
from torch import Tensor

from specserve.batch import build_batch, prefill_segments
from specserve.cache.storage import KVStorage
from specserve.cache.table import BlockTable
from specserve.engine.engine import Engine
from specserve.models.loader import load_model
from specserve.models.model import Model
from specserve.sequence import SequenceView
from specserve.tree import DraftTree
from specserve.types import Request, SamplingParams
from specserve_drafts.medusa.drafter import MedusaDrafter, product_tree
from specserve_kernels.dispatch import select_kernels

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, seed=0, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, max_tokens=24, seed=7, ignore_eos=True)
PENALISED = SamplingParams(
    temperature=1.0, top_k=30, frequency_penalty=0.4, max_tokens=24, seed=3, ignore_eos=True
)
PROMPTS = [(1, 2, 3, 4, 1, 2, 3, 4, 1, 2), tuple((11 * i) % 90 for i in range(150)), (7,)]
CPU = torch.device("cpu")
Proposal = tuple[tuple[int, ...], DraftTree, int]  # the sequence's tokens, its tree, its budget


@pytest.fixture(scope="module", params=LAYOUTS)
def heads(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Medusa:
    return write_medusa(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def target(tiny_model: Path) -> Model:
    return load_model(
        tiny_model,
        kernels=select_kernels(CPU),
        dtype=torch.float32,
        device=CPU,
        exact=True,
        quantization="none",
    )


def drafter_of(engine: Engine) -> MedusaDrafter:
    (drafter,) = engine.drafter.drafters.values()
    assert isinstance(drafter, MedusaDrafter)
    return drafter


def record_proposals(engine: Engine) -> tuple[list[Proposal], list[Tensor]]:
    """Records the proposals from now on, and the logits that they are made of."""
    drafter = drafter_of(engine)
    proposals: list[Proposal] = []
    logits: list[Tensor] = []
    propose, call = drafter.propose, drafter.heads

    def spy(seqs: Sequence[SequenceView], budgets: Sequence[int]) -> list[DraftTree]:
        trees = propose(seqs, budgets)
        parts = zip(seqs, trees, budgets, strict=True)
        proposals.extend((tuple(seq.tokens), tree, budget) for seq, tree, budget in parts)
        return trees

    def heads(rows: Tensor, num_heads: int) -> Tensor:
        out = call(rows, num_heads)
        logits.extend(out.unbind())
        return out

    drafter.propose = spy  # type: ignore[method-assign]
    drafter.heads = heads  # type: ignore[assignment]
    return proposals, logits


def last_row(model: Model, tokens: tuple[int, ...]) -> Tensor:
    """[hidden_size] of the last of these tokens, normed; by one pass over them."""
    num_blocks = len(tokens) // 16 + 1
    table = BlockTable(16, list(range(num_blocks)))
    batch = build_batch(list(prefill_segments(table, 0, tokens)), 16, model.row_multiple, CPU)
    layer = model.shape.num_layers
    out = model(batch, KVStorage(model.kv_spec, 16 * num_blocks, CPU), aux_layers=(layer,))
    assert out.aux_hidden_states is not None
    return model.final_norm(out.aux_hidden_states[len(tokens) - 1 : len(tokens)])[0]


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_logits_are_those_of_the_definition(
    heads: Medusa, sampling: SamplingParams, target: Model, make_engine: EngineFactory
) -> None:
    """Of the row before the root, over several steps and sequences."""
    engine = make_engine(str(heads.path), max_nodes=8)
    proposals, logits = record_proposals(engine)
    run(engine, PROMPTS, sampling)
    drafted = [tokens for tokens, tree, _ in proposals if len(tree) > 1]
    assert len(drafted) == len(logits) > 30
    for tokens, seen in list(zip(drafted, logits, strict=True))[::4]:
        plain = plain_logits(heads, last_row(target, tokens[:-1]))
        if "token_map" in heads.tensors:
            plain = plain[:, heads.tensors["token_map"]]
        torch.testing.assert_close(seen, plain[: len(seen)], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "sampling", [GREEDY, SAMPLED, PENALISED], ids=["greedy", "sampled", "penal"]
)
def test_trees_have_the_tokens_with_the_largest_perturbed_logits(
    heads: Medusa, sampling: SamplingParams, target: Model, make_engine: EngineFactory
) -> None:
    engine = make_engine(str(heads.path), max_nodes=12)
    proposals, _ = record_proposals(engine)
    (outputs,) = run(engine, PROMPTS[:1], sampling)
    plain = run(make_engine("none"), PROMPTS[:1], sampling)[0]
    assert ids(outputs) == ids(plain)
    assert sampling.seed is not None
    for tokens, tree, budget in [p for p in proposals if len(p[1]) > 1][::3]:
        ranked = plain_logits(heads, last_row(target, tokens[:-1]))
        if sampling is PENALISED:
            counts = torch.bincount(torch.tensor(tokens[len(PROMPTS[0]) :]), minlength=TINY_VOCAB)
            ranked = ranked - 0.4 * counts
            ranked = ranked.masked_fill(ranked < ranked.topk(30).values[:, -1:], -torch.inf)
        if sampling.temperature:
            positions = torch.tensor([len(tokens) + head for head in range(NUM_HEADS)])
            noise = select_kernels(CPU).gumbel_noise(
                torch.full_like(positions, sampling.seed),
                positions,
                torch.arange(TINY_VOCAB).expand(NUM_HEADS, -1),
            )
            ranked = ranked / sampling.temperature + noise
        best = ranked.softmax(-1).topk(8)
        depths = [
            list(zip(*pair, strict=True))
            for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        expected = product_tree(tokens[-1], depths, budget)
        assert tree.tokens.tolist() == expected.tokens.tolist()
        assert tree.parents.tolist() == expected.parents.tolist()
        assert tree.path_probs == pytest.approx(expected.path_probs, rel=1e-3)


@given(
    st.lists(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=5), max_size=4),
    st.integers(1, 24),
)
@settings(max_examples=150, deadline=None)
def test_the_tree_has_the_most_probable_combinations(probs: list[list[float]], budget: int) -> None:
    depths = [list(enumerate(sorted(some, reverse=True))) for some in probs]
    tree = product_tree(9, depths, budget)
    tree.validate(97, budget)
    every = [
        torch.tensor([prob for _, prob in path], dtype=torch.float64).prod().item()
        for length in range(1, len(depths) + 1)
        for path in product(*depths[:length])
    ]
    best = sorted((prob for prob in every if prob > 0.0), reverse=True)[: budget - 1]
    assert sorted(tree.path_probs[1:].tolist(), reverse=True) == pytest.approx(best, rel=1e-5)
    for node in range(1, len(tree)):
        parent, depth = int(tree.parents[node]), tree.depths[node] - 1
        prob = dict(depths[depth])[int(tree.tokens[node])]
        assert tree.path_probs[node] == pytest.approx(tree.path_probs[parent] * prob, rel=1e-5)
    assert tree.drafter_ids.tolist() == [0] + [1] * (len(tree) - 1)


def test_heads_that_equal_the_target_are_always_accepted(
    tmp_path: Path, make_engine: EngineFactory
) -> None:
    """The target counts modulo 16, and head i predicts its output i + 1 tokens later."""
    target = write_tiny_llama(tmp_path / "target", seed=5)
    weights = load_file(target / "model.safetensors")
    silent = ("o_proj.weight", "down_proj.weight")
    weights |= {n: torch.zeros_like(t) for n, t in weights.items() if n.endswith(silent)}
    # Embeddings are unit vectors, token t says t + 1 modulo 16; head i reads t + 2 + i from t.
    unit = torch.eye(HIDDEN)[:16]
    embedding = torch.zeros(TINY_VOCAB, HIDDEN)
    embedding[:16] = unit
    weights["model.embed_tokens.weight"] = embedding
    weights["lm_head.weight"] = torch.zeros(TINY_VOCAB, HIDDEN)
    weights["lm_head.weight"][:16] = unit.roll(1, 0)
    save_file(weights, target / "model.safetensors")
    heads = write_medusa(tmp_path / "heads")
    for head in range(NUM_HEADS):
        for layer in range(NUM_LAYERS):
            heads.tensors[f"{head}.{layer}.linear.weight"].zero_()
            heads.tensors[f"{head}.{layer}.linear.bias"].zero_()
        heads.tensors[f"{head}.{NUM_LAYERS}.weight"].zero_()[:16] = unit.roll(2 + head, 0)
    heads.save()
    engine = make_engine(str(heads.path), target=target, max_nodes=4, cost_aware=False)
    for outputs in run(engine, [(1, 2, 3), (7,)], GREEDY):
        assert ids(outputs)[:3] == tuple((ids(outputs)[0] + i) % 16 for i in range(3))
        for output in outputs[1:-1]:  # the first token comes before any row is known
            assert len(output.ids) == 4


def test_fewer_heads_make_a_shallower_tree(heads: Medusa, make_engine: EngineFactory) -> None:
    options = {"medusa": {"num_heads": 2, "branching": 3}}
    engine = make_engine(str(heads.path), options=options, max_nodes=24, cost_aware=False)
    proposals, logits = record_proposals(engine)
    run(engine, PROMPTS, GREEDY)
    assert max(len(row) for row in logits) == 2
    assert max(max(tree.depths) for _, tree, _ in proposals) == 2
    assert max(len(tree.children(0)) for _, tree, _ in proposals) == 3


def test_only_the_heads_that_a_budget_reaches_run(
    tmp_path: Path, make_engine: EngineFactory
) -> None:
    engine = make_engine(str(write_medusa(tmp_path).path), max_nodes=2)
    _, logits = record_proposals(engine)
    run(engine, PROMPTS, GREEDY)
    assert {len(row) for row in logits} == {1}


def test_hidden_states_stay_aligned_when_a_forward_pass_fails(
    tmp_path: Path, target: Model, make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass is repeated for each request, and for one request it fails again."""
    heads = write_medusa(tmp_path)
    engine = make_engine(str(heads.path), max_nodes=6)
    proposals, logits = record_proposals(engine)
    for index, prompt in enumerate(PROMPTS):
        engine.submit(Request(f"q{index}", prompt, GREEDY))
    forward = engine.runner.forward

    def failing(entries: Any, trees: Any) -> Any:
        if len(entries) > 1 or entries[0].seq.id == "q1":
            raise RuntimeError("boom")
        return forward(entries, trees)

    for step in range(8):
        with monkeypatch.context() as patch:
            if step in (2, 3):
                patch.setattr(engine.runner, "forward", failing)
            engine.step()
    assert engine.drafter.active == list(engine.drafter.names)
    assert len(engine.scheduler.running) == 2
    drafted = [tokens for tokens, tree, _ in proposals if len(tree) > 1]
    for tokens, seen in zip(drafted, logits, strict=True):
        plain = plain_logits(heads, last_row(target, tokens[:-1]))
        torch.testing.assert_close(seen, plain[: len(seen)], atol=1e-5, rtol=1e-5)
