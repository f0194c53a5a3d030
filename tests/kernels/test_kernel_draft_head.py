"""Quantised draft heads: every native build against the reference. Expansion: tests/drafts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from specserve_kernels.cases import ancestor_words
from specserve_kernels.cpu.draft_head import CpuDraftHead
from specserve_kernels.cpu.native import load, runnable_builds
from specserve_kernels.decoder import DecoderPass, DecoderWeights, LayerWeights, PackedLinear
from specserve_kernels.draft_head import (
    DraftHeadWeights,
    DraftSampling,
    ExpansionLimits,
    ExpansionTask,
)
from specserve_kernels.packed_weight import quantize_int4, quantize_int8
from specserve_kernels.segments import Segments
from specserve_kernels.torch_ref import TorchKernels
from specserve_kernels.torch_ref.draft_head import TorchDraftHead

HIDDEN, INNER, HEADS, KV_HEADS, DIM = 64, 96, 4, 2, 32
VOCAB, DRAFT_VOCAB = 300, 250
NUM_SLOTS = 200


@dataclass(frozen=True)
class Shape:
    num_layers: int = 1
    num_aux_layers: int = 3
    num_norms: int = 3
    norm_output: bool = True
    normed_residual: bool = True
    bias: bool = False
    qk_norm: bool = False
    logit_scale: float = 1.0
    kv_dtype: torch.dtype = torch.float32


SHAPES = (
    Shape(),
    Shape(num_norms=0, norm_output=False, normed_residual=False, kv_dtype=torch.bfloat16),
    Shape(2, 2, 1, bias=True, qk_norm=True, normed_residual=False, logit_scale=0.7),
)


class Head:
    """Random weights."""

    def __init__(self, shape: Shape) -> None:
        self._generator = torch.Generator().manual_seed(11)
        self._shape = shape
        angles = torch.arange(NUM_SLOTS)[:, None] * 0.3 ** torch.arange(DIM // 2)
        ids = torch.randperm(VOCAB, generator=self._generator)[:DRAFT_VOCAB].sort().values
        size = HIDDEN * shape.num_aux_layers
        self.weights = DraftHeadWeights(
            DecoderWeights(
                HEADS,
                KV_HEADS,
                DIM,
                1e-5,
                angles.cos(),
                angles.sin(),
                quantize_int4(self._normal(VOCAB, HIDDEN)),
                [self._layer(2 * HIDDEN if i == 0 else HIDDEN) for i in range(shape.num_layers)],
                self._norm(HIDDEN),
                self._linear(DRAFT_VOCAB, HIDDEN, scale=4.0),
                self._norm(HIDDEN),
                shape.normed_residual,
            ),
            self._linear(HIDDEN, size),
            [self._norm(size // shape.num_norms) for _ in range(shape.num_norms)],
            shape.norm_output,
            shape.logit_scale,
            ids,
        )

    def aux_hidden_states(self, count: int) -> Tensor:
        return self._normal(count, HIDDEN * self._shape.num_aux_layers)

    def cache(self) -> Tensor:
        size = (self._shape.num_layers, 2, NUM_SLOTS, KV_HEADS, DIM)
        return torch.full(size, torch.nan, dtype=self._shape.kv_dtype)

    def _layer(self, width: int) -> LayerWeights:
        return LayerWeights(
            self._norm(HIDDEN),
            self._norm(HIDDEN),
            self._linear(HEADS * DIM, width),
            self._linear(KV_HEADS * DIM, width),
            self._linear(KV_HEADS * DIM, width),
            self._linear(HIDDEN, HEADS * DIM),
            self._linear(INNER, HIDDEN),
            self._linear(INNER, HIDDEN),
            self._linear(HIDDEN, INNER),
            self._norm(DIM) if self._shape.qk_norm else None,
            self._norm(DIM) if self._shape.qk_norm else None,
        )

    def _normal(self, *size: int) -> Tensor:
        return torch.randn(size, generator=self._generator)

    def _norm(self, size: int) -> Tensor:
        return 0.5 + torch.rand(size, generator=self._generator)

    def _linear(self, num_outputs: int, num_inputs: int, scale: float = 1.0) -> PackedLinear:
        weight = quantize_int8(self._normal(num_outputs, num_inputs) * scale * num_inputs**-0.5)
        return PackedLinear(weight, self._normal(num_outputs) if self._shape.bias else None)


each_shape = pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))


@pytest.fixture(params=runnable_builds())
def build(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def run(
    head: CpuDraftHead | TorchDraftHead,
    kv: Tensor,
    start: int,
    ids: Sequence[int],
    parents: list[int],
    hidden_in: Tensor,
) -> Tensor:
    """Nodes of one tree after `start` draft inputs; draft input i is in slot i."""
    words = ancestor_words(parents)
    depths = np.array([bin(word).count("1") - 1 for word in words.tolist()])
    segments = Segments(
        np.array([0, len(ids)], np.int32),
        np.array([start], np.int32),
        np.zeros(1, np.int32),
        words,
        np.arange(start + len(ids), dtype=np.int32)[None],
        len(ids),
        1,
    )
    return head(
        DecoderPass(
            torch.tensor(ids),
            torch.from_numpy(start + depths),
            torch.arange(start, start + len(ids)),
            segments,
            kv,
            torch.empty(0, dtype=torch.int64),
            hidden_in=hidden_in,
        )
    )


def close(native: Tensor, expected: Tensor) -> bool:
    """A value halfway between two integers may round either way: a step of 1/127 of its group."""
    difference = (native - expected).abs()
    return bool(
        difference.max() < 0.03 * expected.abs().max()
        and difference.mean() < 0.003 * expected.abs().mean()
    )


@each_shape
def test_matches_the_reference(shape: Shape, build: str) -> None:
    head = Head(shape)
    native, reference = CpuDraftHead(load(build), head.weights), TorchDraftHead(head.weights)
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(19, HIDDEN * shape.num_aux_layers, generator=generator)
    hidden_in = reference.fuse(states)
    assert close(native.fuse(states), hidden_in)
    both = ((native, head.cache()), (reference, head.cache()))
    out, expected = (
        run(model, cache, 0, range(19), list(range(-1, 18)), hidden_in) for model, cache in both
    )
    assert close(out, expected)
    for _ in range(3):  # the head's output is the input of the next nodes
        hidden_in = expected[[-1, -1, 2, 0]].contiguous()
        out, expected = (
            run(model, cache, 19, [7, 1, 299, 30], [-1, 0, 0, 2], hidden_in)
            for model, cache in both
        )
        assert close(out, expected)
    assert close(native.logits(expected), reference.logits(expected))


@each_shape
def test_one_expansion_step_takes_the_most_likely_tokens(shape: Shape, build: str) -> None:
    """Their probabilities are softmax(logits / T + noise); without noise at T = 0."""
    head = Head(shape)
    native = CpuDraftHead(load(build), head.weights)
    ids, states = [5, 9, 200, 31, 8], head.aux_hidden_states(5)
    out = run(native, head.cache(), 0, ids, list(range(-1, 4)), native.fuse(states))
    logits = torch.full((VOCAB,), -torch.inf)
    logits[head.weights.token_ids] = native.logits(out[-1:])[0]
    noise = TorchKernels.gumbel_noise(
        torch.tensor([77]), torch.tensor([41]), torch.arange(VOCAB)[None]
    )
    for temperature, scores in (
        (0.0, logits),
        (1.0, logits + noise[0]),
        (0.5, 2 * logits + noise[0]),
    ):
        task = ExpansionTask(
            torch.arange(12, dtype=torch.int32), 4, ids[:4], states, ids[4], 4, 6,
            DraftSampling(temperature, seed=77), 41,
        )  # fmt: skip
        (tree,) = native.expand(ExpansionLimits(8, 2, 1, 0.0), head.cache(), [task])
        best = scores.softmax(0).topk(5)
        assert tree.tokens == [8, *best.indices.tolist()]
        assert tree.parents == [-1, 0, 0, 0, 0, 0]
        np.testing.assert_allclose(tree.path_probs[1:], best.values, rtol=1e-4)


def test_trees_do_not_depend_on_each_other(build: str) -> None:
    head = Head(Shape())
    native = CpuDraftHead(load(build), head.weights)
    limits = ExpansionLimits(4, 2, 8, 0.01)
    tasks = []
    for index, (num_pending, budget) in enumerate([(0, 9), (70, 4), (1, 2), (3, 16)]):
        slots = torch.arange(NUM_SLOTS, dtype=torch.int32)
        slot_list = slots[index * 40 :][: num_pending + budget]
        if num_pending > 64:
            slot_list = slots.flip(0)[: num_pending + budget].contiguous()
        tasks.append(
            ExpansionTask(
                slot_list,
                num_pending,
                range(index, index + num_pending),
                head.aux_hidden_states(num_pending + 1),
                index,
                num_pending,
                budget,
                DraftSampling(float(index % 2), seed=index),
                num_pending + 2,
            )
        )
    together = native.expand(limits, head.cache(), tasks)
    for task, tree in zip(tasks, together, strict=True):
        assert native.expand(limits, head.cache(), [task]) == [tree]
        assert len(tree.tokens) == task.budget
        assert all(parent < node for node, parent in enumerate(tree.parents))


def test_nan_logits_give_no_candidates(build: str) -> None:
    head = Head(Shape())
    native = CpuDraftHead(load(build), head.weights)
    states = torch.full((1, 3 * HIDDEN), torch.nan)
    for temperature in (0.0, 1.0):
        task = ExpansionTask(
            torch.arange(8, dtype=torch.int32), 0, [], states, 1, 0, 8,
            DraftSampling(temperature), 1,
        )  # fmt: skip
        (tree,) = native.expand(ExpansionLimits(4, 2, 8, 0.0), head.cache(), [task])
        assert tree.tokens == [1]
