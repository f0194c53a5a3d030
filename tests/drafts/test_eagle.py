"""An EAGLE head in an engine: its logits and trees, against the definition."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from eagle_heads import AUX_LAYERS, HIDDEN, INNER, LAYOUTS, Written, plain_logits, save, write_eagle
from safetensors.torch import load_file, save_file
from tiny import TINY_VOCAB, EngineFactory, ids, run, write_tiny_llama
from torch import Tensor

from specserve.batch import build_batch, prefill_segments
from specserve.cache.storage import KVStorage
from specserve.cache.table import BlockTable
from specserve.engine.engine import Engine
from specserve.models.fused_cpu import FusedModel
from specserve.models.loader import load_model
from specserve.models.model import Model
from specserve.sequence import SequenceView
from specserve.tree import DraftTree
from specserve.types import Quantization, Request, SamplingParams
from specserve_drafts.eagle import drafter as eagle
from specserve_drafts.eagle.drafter import EagleDrafter
from specserve_kernels.dispatch import fused_models, select_kernels

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, seed=0, ignore_eos=True)
SAMPLED = SamplingParams(temperature=1.0, max_tokens=24, seed=7, ignore_eos=True)
PROMPTS = [(1, 2, 3, 4, 1, 2, 3, 4, 1, 2), tuple((11 * i) % 90 for i in range(150)), (7,)]
CPU = torch.device("cpu")


@dataclass(frozen=True)
class EvaluatedNode:
    """Logits of one node that the drafter evaluated."""

    tokens: tuple[int, ...]  # of the sequence, the root last
    path: tuple[int, ...]  # below the root
    logits: Tensor


@pytest.fixture(scope="module", params=LAYOUTS)
def head(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_eagle(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def one_head(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return write_eagle(tmp_path_factory.mktemp("head"), "specforge")


def record_evaluated(engine: Engine) -> list[EvaluatedNode]:
    """Every node that the engine's drafter evaluates from now on."""
    (drafter,) = engine.drafter.drafters.values()
    assert isinstance(drafter, EagleDrafter)
    seen: list[EvaluatedNode] = []
    add_candidates = drafter._add_candidates

    def spy(expansions: Any, logits: Tensor) -> None:
        rows = iter(logits.clone())
        for expansion in expansions:
            for row in expansion.sampler_rows():
                seen.append(EvaluatedNode(tuple(expansion.seq.tokens), row.path, next(rows)))
        add_candidates(expansions, logits)

    drafter._add_candidates = spy  # type: ignore[method-assign]
    return seen


def loaded(target: Path, quantization: Quantization = "none") -> Model:
    """As engines in tests load it."""
    return load_model(
        target,
        kernels=select_kernels(CPU),
        dtype=torch.float32,
        device=CPU,
        exact=True,
        quantization=quantization,
    )


def aux_hidden_states_of(
    model: Model, aux_layers: tuple[int, ...], tokens: tuple[int, ...]
) -> Tensor:
    """[len(tokens), num_aux_layers * hidden_size], by one pass over the text."""
    num_blocks = len(tokens) // 16 + 1
    table = BlockTable(16, list(range(num_blocks)))
    batch = build_batch(list(prefill_segments(table, 0, tokens)), 16, model.row_multiple, CPU)
    out = model(batch, KVStorage(model.kv_spec, 16 * num_blocks, CPU), aux_layers=aux_layers)
    assert out.aux_hidden_states is not None
    return out.aux_hidden_states[: len(tokens)]


def check(head: Written, model: Model, seen: list[EvaluatedNode], *, every: int = 1) -> None:
    """Against the definition, over `every`-th node."""
    weights = {
        "model.embed_tokens.weight": model.embed(torch.arange(TINY_VOCAB)),
        "lm_head.weight": model.unembed(torch.eye(HIDDEN)).T,
        "model.norm.weight": torch.ones(HIDDEN),
    }
    texts = {node.tokens for node in seen}
    texts = {t for t in texts if not any(t != u and u[: len(t)] == t for u in texts)}
    known = {text: aux_hidden_states_of(model, AUX_LAYERS[head.layout], text) for text in texts}
    for node in seen[::every]:
        rows = next(rows for text, rows in known.items() if text[: len(node.tokens)] == node.tokens)
        states = rows[: len(node.tokens) - 1]
        plain = plain_logits(head, weights, states, list(node.tokens), list(node.path))[-1]
        torch.testing.assert_close(node.logits, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_logits_are_those_of_the_definition(
    head: Written, sampling: SamplingParams, tiny_model: Path, make_engine: EngineFactory
) -> None:
    """Over several steps, side branches and sequences: every node that the drafter evaluates."""
    options = {"eagle": {"branching": 3, "beam": 2}}
    engine = make_engine(str(head.path), options=options, max_nodes=8, exactness="fast")
    seen = record_evaluated(engine)
    run(engine, PROMPTS, sampling)
    assert max(len(node.path) for node in seen) >= 3
    assert len({node.tokens for node in seen}) > 20
    check(head, loaded(tiny_model), seen, every=3)


@pytest.mark.skipif(fused_models(select_kernels(CPU)) is None, reason="no native kernels")
def test_a_float_head_runs_over_a_quantized_target(
    one_head: Written, tmp_path: Path, make_engine: EngineFactory
) -> None:
    """The head is not quantised, because its width is no multiple of 32."""
    target = write_tiny_llama(tmp_path, seed=1, head_dim=16)
    engine = make_engine(str(one_head.path), target=target, max_nodes=6, quantization="int8")
    model = engine.runner.model
    assert isinstance(model, FusedModel)
    seen = record_evaluated(engine)
    run(engine, PROMPTS, SAMPLED)
    check(one_head, model, seen, every=3)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_embed_norm_and_unembed_are_those_of_the_target(
    quantization: Quantization, tmp_path: Path
) -> None:
    model = loaded(write_tiny_llama(tmp_path, seed=1, head_dim=16), quantization)
    tokens = tuple(range(TINY_VOCAB))
    states = aux_hidden_states_of(model, (0, 2), tokens)
    torch.testing.assert_close(model.embed(torch.tensor(tokens)), states[:, :HIDDEN])
    last = states[:, HIDDEN:]
    torch.testing.assert_close(model.unembed(model.final_norm(last)), model.logits(last))


def test_a_cached_prefix_brings_its_draft_kv(
    one_head: Written, tiny_model: Path, make_engine: EngineFactory
) -> None:
    engine = make_engine(str(one_head.path), max_nodes=6)
    prompts = [PROMPTS[1], (*PROMPTS[1][:100], 5, 6, 7, 8)]
    run(engine, prompts[:1], GREEDY)
    seen = record_evaluated(engine)
    for prompt in prompts:
        (outputs,) = run(engine, [prompt], GREEDY)
        assert outputs[-1].num_cached_tokens >= 96
    assert seen
    check(one_head, loaded(tiny_model), seen, every=4)


def test_without_its_kv_a_prefix_is_left_out(one_head: Written, make_engine: EngineFactory) -> None:
    """Tokens that were cached while the drafter did not observe cost acceptance, not the output."""
    plain = ids(run(make_engine("none"), [PROMPTS[1]], GREEDY)[0])
    engine = make_engine(str(one_head.path), max_nodes=6)
    drafter = engine.drafter.drafters[one_head.path.name]
    assert isinstance(drafter, EagleDrafter)
    observe = drafter.observe
    drafter.observe = lambda feedback: None  # type: ignore[method-assign]
    run(engine, [PROMPTS[1]], GREEDY)
    drafter.observe = observe  # type: ignore[method-assign]
    seen = record_evaluated(engine)
    (outputs,) = run(engine, [PROMPTS[1]], GREEDY)
    assert outputs[-1].num_cached_tokens == 144
    assert seen
    assert engine.drafter.active == list(engine.drafter.names)
    assert ids(outputs) == plain


def test_hidden_states_stay_aligned_when_a_forward_pass_fails(
    one_head: Written,
    tiny_model: Path,
    make_engine: EngineFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pass is repeated for each request, and for one request it fails again."""
    engine = make_engine(str(one_head.path), max_nodes=6)
    seen = record_evaluated(engine)
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
        engine.check_integrity()
    assert engine.drafter.active == list(engine.drafter.names)
    assert len(engine.scheduler.running) == 2
    check(one_head, loaded(tiny_model), seen)


def test_a_smaller_vocabulary_keeps_the_first_rows(
    one_head: Written, make_engine: EngineFactory
) -> None:
    full, cut = (
        make_engine(str(one_head.path), options={"eagle": options})
        for options in ({}, {"draft_vocab": 24})
    )
    nodes = [record_evaluated(engine) for engine in (full, cut)]
    for engine in (full, cut):
        run(engine, PROMPTS[:1], GREEDY)
    torch.testing.assert_close(nodes[1][0].logits, nodes[0][0].logits[:24])
    tokens = set(one_head.token_ids[:24].tolist())
    assert {token for node in nodes[1] for token in node.path} <= tokens


def write_whole(directory: Path, *, inner: int = INNER) -> tuple[Path, list[int]]:
    """A head over the whole vocabulary, without rows of its own, and the order of tokens beside."""
    head = write_eagle(directory, "eagle31", inner=inner)
    for name in ("lm_head.weight", "d2t", "t2d"):
        del head.tensors[name]
    head.config["draft_vocab_size"] = TINY_VOCAB
    save(head)
    order = torch.randperm(TINY_VOCAB, generator=torch.Generator().manual_seed(0))
    save_file({"token_ids": order.int()}, directory / "token_order.safetensors")
    return directory, order.tolist()


def test_a_head_with_the_targets_lm_head_keeps_the_frequent_tokens(
    tmp_path: Path, make_engine: EngineFactory
) -> None:
    path, order = write_whole(tmp_path)
    whole, cut = (
        make_engine(str(path), options={"eagle": options}) for options in ({}, {"draft_vocab": 24})
    )
    nodes = [record_evaluated(engine) for engine in (whole, cut)]
    for engine in (whole, cut):
        run(engine, PROMPTS[:1], GREEDY)
    kept = sorted(order[:24])
    torch.testing.assert_close(nodes[1][0].logits, nodes[0][0].logits[kept])
    assert {token for node in nodes[1] for token in node.path} <= set(kept)


@pytest.mark.skipif(fused_models(select_kernels(CPU)) is None, reason="no native kernels")
@pytest.mark.parametrize("cost_aware", [True, False])
def test_a_cost_aware_quantized_head_uses_fewer_rows_of_the_targets_lm_head(
    tmp_path: Path, make_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch, cost_aware: bool
) -> None:
    target = write_tiny_llama(tmp_path / "target", seed=1, head_dim=16)
    path, order = write_whole(tmp_path / "head", inner=64)
    monkeypatch.setattr(eagle, "_COST_AWARE_VOCAB", 30)
    settings = {"target": target, "quantization": "int8", "max_nodes": 6, "cost_aware": cost_aware}
    engine = make_engine(str(path), **settings)
    seen = record_expanded(engine)
    answers = [ids(each) for each in run(engine, PROMPTS, GREEDY)]
    assert answers == [ids(each) for each in run(make_engine("none", **settings), PROMPTS, GREEDY)]
    drafted = {token for each in seen for token in each.in_one_call.tokens[1:].tolist()}
    assert len(drafted) > 5
    assert (drafted <= set(order[:30])) == cost_aware


def test_a_head_that_equals_the_target_is_always_accepted(
    tmp_path: Path, make_engine: EngineFactory
) -> None:
    """The target's next token depends on the last one alone, and the head passes that through."""
    target = write_tiny_llama(tmp_path / "target", seed=5)
    weights = load_file(target / "model.safetensors")
    silent = ("o_proj.weight", "down_proj.weight")
    weights |= {n: torch.zeros_like(t) for n, t in weights.items() if n.endswith(silent)}
    save_file(weights, target / "model.safetensors")
    head = write_eagle(tmp_path / "head", "eagle1")
    tensors = head.tensors
    tensors |= {n: torch.zeros_like(t) for n, t in tensors.items() if n.endswith(silent)}
    tensors["embed_tokens.weight"] = weights["model.embed_tokens.weight"]
    tensors["fc.weight"] = torch.cat((torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)), 1)
    tensors["fc.bias"] = torch.zeros(HIDDEN)
    save(head)
    chain = {"eagle": {"branching": 1, "beam": 1, "min_probability": 0.0}}
    engine = make_engine(str(head.path), target=target, options=chain, max_nodes=6)
    for outputs in run(engine, PROMPTS, GREEDY):
        for output in outputs[1:-1]:  # the first token comes before any row is known
            assert len(output.ids) == 6


@dataclass(frozen=True)
class ExpandedTwice:
    """One tree, expanded by the kernel, and by forward passes of the same head."""

    num_pending: int
    in_one_call: DraftTree
    stepwise: DraftTree


def record_expanded(engine: Engine) -> list[ExpandedTwice]:
    """Every tree that the engine's drafter expands in one call from now on, in both ways."""
    (drafter,) = engine.drafter.drafters.values()
    assert isinstance(drafter, EagleDrafter)
    expand, seen = drafter._expand_in_one_call, list[ExpandedTwice]()

    def both(tasks: Sequence[Any]) -> dict[str, DraftTree]:
        expanded = expand(tasks)
        expected = drafter._expand_stepwise(tasks)
        for task in tasks:
            trees = expanded[task.seq.id], expected[task.seq.id]
            seen.append(ExpandedTwice(task.kv.num_pending, *trees))
        return expanded

    drafter._expand_in_one_call = both  # type: ignore[method-assign]
    return seen


@pytest.mark.skipif(fused_models(select_kernels(CPU)) is None, reason="no native kernels")
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "eagle1"])
@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SAMPLED,
        msgspec.structs.replace(SAMPLED, temperature=0.6, top_k=20),
        msgspec.structs.replace(SAMPLED, temperature=0.3, top_p=0.7, min_p=0.02),
    ],
    ids=["greedy", "sampled", "top-k", "top-p"],
)
def test_a_quantized_head_expands_the_same_trees_in_one_call(
    layout: str, sampling: SamplingParams, tmp_path: Path, make_engine: EngineFactory
) -> None:
    target = write_tiny_llama(tmp_path / "target", seed=1, head_dim=16)
    head = write_eagle(tmp_path / "head", layout, inner=64)
    options = {"eagle": {"branching": 3, "min_probability": 0.02}}
    engine = make_engine(
        str(head.path), target=target, options=options, max_nodes=8, quantization="int8"
    )
    seen = record_expanded(engine)
    run(engine, PROMPTS, sampling)
    assert len(seen) > 20
    assert {each.num_pending > 0 for each in seen} == {False, True}
    for each in seen:
        ours, expected = each.in_one_call, each.stepwise
        assert ours.tokens.tolist() == expected.tokens.tolist()
        assert ours.parents.tolist() == expected.parents.tolist()
        np.testing.assert_allclose(ours.path_probs, expected.path_probs, rtol=1e-4)
    assert max(len(each.in_one_call) for each in seen) == 8
    assert max(max(each.in_one_call.depths) for each in seen) >= 2


@pytest.mark.skipif(fused_models(select_kernels(CPU)) is None, reason="no native kernels")
def test_requests_with_logit_adjustments_are_expanded_stepwise(
    tmp_path: Path, make_engine: EngineFactory
) -> None:
    """The kernel does not support bias and penalties."""
    target = write_tiny_llama(tmp_path / "target", seed=1, head_dim=16)
    head = write_eagle(tmp_path / "head", "speculators", inner=64)
    engine = make_engine(str(head.path), target=target, max_nodes=6, quantization="int8")
    in_one_call, nodes = record_expanded(engine), record_evaluated(engine)
    penalised = msgspec.structs.replace(GREEDY, repetition_penalty=1.3)
    run(engine, PROMPTS[:1], penalised)
    assert nodes
    assert not in_one_call
    run(engine, PROMPTS[:1], GREEDY)
    assert in_one_call


@pytest.mark.parametrize("static", [False, True])
def test_static_trees_have_one_shape(
    static: bool, one_head: Written, make_engine: EngineFactory
) -> None:
    engine = make_engine(str(one_head.path), options={"eagle": {"static": static}}, max_nodes=8)
    (drafter,) = engine.drafter.drafters.values()
    propose, shapes = drafter.propose, set[tuple[int, ...]]()

    def noted(seqs: Sequence[SequenceView], budgets: Sequence[int]) -> list[DraftTree]:
        trees = propose(seqs, budgets)
        shapes.update(tuple(tree.parents.tolist()) for tree in trees if len(tree) == 8)
        return trees

    drafter.propose = noted  # type: ignore[method-assign]
    for params in (GREEDY, SAMPLED):
        run(engine, PROMPTS, params)
    assert (len(shapes) == 1) == static, shapes
