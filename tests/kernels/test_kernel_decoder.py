"""Forward passes with packed weights: every native build against the reference; exactness."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor

from specserve_kernels.cases import ancestor_words
from specserve_kernels.cpu.decoder import CpuDecoder
from specserve_kernels.cpu.native import load, runnable_builds
from specserve_kernels.decoder import (
    DecoderOutput,
    DecoderPass,
    DecoderWeights,
    FusedDecoder,
    LayerWeights,
    PackedLinear,
    why_not_packed,
)
from specserve_kernels.packed_weight import (
    PackedWeight,
    WeightFormat,
    pack_floats,
    pack_int4,
    quantize_int8,
)
from specserve_kernels.segments import Segments
from specserve_kernels.torch_ref.decoder import TorchDecoder

BLOCK_SIZE = 16
NUM_POSITIONS = 400


@dataclass(frozen=True)
class Shape:
    num_layers: int = 2
    hidden_size: int = 64
    intermediate_size: int = 96
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    vocab_size: int = 100
    bias: bool = False
    qk_norm: bool = False
    window: int = 0
    format: WeightFormat = WeightFormat.INT8
    kv_dtype: torch.dtype = torch.float32


SHAPES = (
    Shape(),
    Shape(format=WeightFormat.INT4, kv_dtype=torch.bfloat16),
    Shape(bias=True, qk_norm=True, window=40, vocab_size=33),
    Shape(1, 96, 64, 6, 3, 16, 512, format=WeightFormat.INT4),
    Shape(1, 128, 32, 2, 1, 80, kv_dtype=torch.bfloat16),
    Shape(format=WeightFormat.BFLOAT16, kv_dtype=torch.bfloat16),
    Shape(bias=True, qk_norm=True, window=40, vocab_size=33, format=WeightFormat.FLOAT16),
    Shape(1, 96, 64, 6, 3, 16, 512, format=WeightFormat.FLOAT32),
)


class Model:
    """Random weights, and a cache of its own for each backend that runs them."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._generator = torch.Generator().manual_seed(7)
        angles = torch.arange(NUM_POSITIONS)[:, None] * 0.3 ** torch.arange(shape.head_dim // 2)
        q_size, kv_size = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
        embed = self._weight(shape.vocab_size, shape.hidden_size)
        self.weights = DecoderWeights(
            shape.num_heads,
            shape.num_kv_heads,
            shape.head_dim,
            1e-5,
            angles.cos(),
            angles.sin(),
            embed,
            [self._layer(q_size, kv_size) for _ in range(shape.num_layers)],
            self._norm(shape.hidden_size),
            self._linear(shape.vocab_size, shape.hidden_size),
        )

    def _layer(self, q_size: int, kv_size: int) -> LayerWeights:
        shape = self.shape
        hidden, inner = shape.hidden_size, shape.intermediate_size
        return LayerWeights(
            self._norm(hidden),
            self._norm(hidden),
            self._linear(q_size, hidden),
            self._linear(kv_size, hidden),
            self._linear(kv_size, hidden),
            self._linear(hidden, q_size),
            self._linear(inner, hidden),
            self._linear(inner, hidden),
            self._linear(hidden, inner),
            self._norm(shape.head_dim) if shape.qk_norm else None,
            self._norm(shape.head_dim) if shape.qk_norm else None,
            shape.window,
        )

    def _norm(self, size: int) -> Tensor:
        return 0.5 + torch.rand(size, generator=self._generator)

    def _linear(self, num_outputs: int, num_inputs: int) -> PackedLinear:
        bias = torch.randn(num_outputs, generator=self._generator) if self.shape.bias else None
        return PackedLinear(self._weight(num_outputs, num_inputs), bias)

    def _weight(self, num_outputs: int, num_inputs: int) -> PackedWeight:
        size = (num_outputs, num_inputs)
        if not self.shape.format.quantized:
            floats = torch.randn(size, generator=self._generator) * num_inputs**-0.5
            return pack_floats(floats.to(self.shape.format.dtype))
        if self.shape.format is WeightFormat.INT8:
            return quantize_int8(torch.randn(size, generator=self._generator) * num_inputs**-0.5)
        values = torch.randint(0, 16, size, generator=self._generator, dtype=torch.uint8)
        scales = torch.rand(num_outputs, num_inputs // 32, generator=self._generator)
        scales = (0.4 * scales * num_inputs**-0.5).half()
        return pack_int4(values, scales, -8 * scales)

    def cache(self) -> Tensor:
        shape = self.shape
        size = (shape.num_layers, 2, NUM_POSITIONS, shape.num_kv_heads, shape.head_dim)
        return torch.full(size, torch.nan, dtype=shape.kv_dtype)


@dataclass(frozen=True)
class Part:
    """Nodes of one tree behind `start` tokens of one sequence, whose blocks are `panels`."""

    start: int
    tokens: Sequence[int]
    parents: Sequence[int]
    blocks: Sequence[int]


def chain(start: int, tokens: Sequence[int], blocks: Sequence[int]) -> Part:
    return Part(start, tokens, range(-1, len(tokens) - 1), blocks)


def run(
    model: FusedDecoder,
    kv: Tensor,
    *parts: Part,
    num_top: int = 3,
    wanted: Sequence[int] | None = None,
) -> DecoderOutput:
    """Logits of the `wanted` rows; None: of all rows, with the first and the last hidden states."""
    words = [ancestor_words(list(part.parents)) for part in parts]
    depths = [np.array([bin(word).count("1") - 1 for word in part.tolist()]) for part in words]
    places = [part.start + np.arange(len(part.tokens)) for part in parts]
    slots = [
        np.array(part.blocks)[place // BLOCK_SIZE] * BLOCK_SIZE + place % BLOCK_SIZE
        for part, place in zip(parts, places, strict=True)
    ]
    tables = np.zeros((len(parts), max(len(part.blocks) for part in parts)), np.int32)
    for table, part in zip(tables, parts, strict=True):
        table[: len(part.blocks)] = part.blocks
    cu_rows = np.cumsum([0, *(len(part.tokens) for part in parts)], dtype=np.int32)
    starts = np.array([part.start for part in parts], np.int32)
    segments = Segments(
        cu_rows,
        starts,
        np.zeros(len(parts), np.int32),
        np.concatenate(words),
        tables,
        int(cu_rows[-1]),
        BLOCK_SIZE,
    )
    rows = torch.arange(int(cu_rows[-1]))
    batch = DecoderPass(
        torch.tensor([token for part in parts for token in part.tokens]),
        torch.from_numpy(np.concatenate([p.start + d for p, d in zip(parts, depths, strict=True)])),
        torch.from_numpy(np.concatenate(slots)),
        segments,
        kv,
        rows if wanted is None else torch.tensor(wanted, dtype=torch.int64),
        num_top,
        (0, len(kv)) if wanted is None else (),
    )
    return model(batch)


each_shape = pytest.mark.parametrize("shape", SHAPES, ids=range(len(SHAPES)))


@pytest.fixture(params=runnable_builds())
def build(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def tokens(shape: Shape, count: int) -> list[int]:
    return torch.randint(
        shape.vocab_size, (count,), generator=torch.Generator().manual_seed(3)
    ).tolist()


@each_shape
def test_matches_the_reference(shape: Shape, build: str) -> None:
    model = Model(shape)
    native, reference = CpuDecoder(load(build), model.weights), TorchDecoder(model.weights)
    ids, blocks = tokens(shape, 90), [4, 1, 7, 2, 9, 5]
    parts = (
        (chain(0, ids[:64], blocks), chain(64, ids[64:70], blocks)),
        (chain(70, ids[70:71], blocks), chain(0, ids[:5], [11])),
        (Part(71, ids[71:76], [-1, 0, 0, 2, 1], blocks), chain(5, ids[:3], [11])),
    )
    kv, reference_kv = model.cache(), model.cache()
    for step in parts:
        out, expected = run(native, kv, *step), run(reference, reference_kv, *step)
        for a, b in (
            (out.logits, expected.logits),
            (out.aux_hidden_states, expected.aux_hidden_states),
        ):
            # A value halfway between two integers may round either way: a step of 1/127 of its
            # group. The same holds for a softmax weight halfway between two bfloat16.
            assert (a - b).abs().max() < 0.03 * b.abs().max()
            mean = 0.003 if shape.kv_dtype == torch.float32 else 0.015
            assert (a - b).abs().mean() < mean * b.abs().mean()
        chosen = expected.logits.gather(1, out.top)
        best = expected.logits.gather(1, expected.top)
        assert (chosen - best).abs().max() < 0.03 * best.abs().max()


@pytest.mark.parametrize("bias", [-86.0, -100.0, -178.0, -1e4, 100.0])
def test_silu_of_extreme_gates(bias: float, build: str) -> None:
    """exp(-gate) overflows float32 for most of these."""
    shape = Shape(bias=True)
    weights = Model(shape).weights
    shut = torch.full((shape.intermediate_size,), bias)
    layers = [
        replace(layer, gate=PackedLinear(layer.gate.weight, shut)) for layer in weights.layers
    ]
    weights = replace(weights, layers=layers)
    native, reference = CpuDecoder(load(build), weights), TorchDecoder(weights)
    step = chain(0, tokens(shape, 20), [3, 1])
    out = run(native, Model(shape).cache(), step).logits
    expected = run(reference, Model(shape).cache(), step).logits
    assert (out - expected).abs().max() < 0.03 * expected.abs().max()


@each_shape
def test_rows_do_not_depend_on_each_other(shape: Shape, build: str) -> None:
    """Prefill chunks, single tokens and trees among others have the bits of decoding alone."""
    model = Model(shape)
    decoder = CpuDecoder(load(build), model.weights)
    ids, blocks, others = tokens(shape, 150), [4, 1, 7, 2, 9, 5, 0, 3, 6, 8], [20, 22, 21, 23, 24]
    alone_kv, kv = model.cache(), model.cache()
    alone = [run(decoder, alone_kv, chain(at, [token], blocks)) for at, token in enumerate(ids)]
    passes = (
        (
            chain(0, ids[:64], blocks),
            chain(64, ids[64:128], blocks),
            chain(128, ids[128:131], blocks),
        ),
        (chain(131, ids[131:132], blocks), chain(0, ids[7:60], others)),
        # The tree has an accepted chain and rejected branches.
        (Part(132, [*ids[132:135], 1, 2, *ids[135:137]], [-1, 0, 1, 0, 3, 2, 5], blocks),),
    )
    expected = torch.cat([out.logits for out in alone])
    states = torch.cat([out.aux_hidden_states for out in alone])
    top = torch.cat([out.top for out in alone])
    for parts, rows, at in (
        (passes[0], slice(0, 131), slice(0, 131)),
        (passes[1], slice(0, 1), slice(131, 132)),
        (passes[2], [0, 1, 2, 5, 6], slice(132, 137)),
    ):
        out = run(decoder, kv, *parts)
        assert torch.equal(out.logits[rows], expected[at])
        assert torch.equal(out.aux_hidden_states[rows], states[at])
        assert torch.equal(out.top[rows], top[at])


@each_shape
@pytest.mark.parametrize("num_threads", [1, 2])
def test_rows_without_logits_still_write_kv(shape: Shape, build: str, num_threads: int) -> None:
    """And do not change the other rows; with two threads attention is shared by splits."""
    model = Model(shape)
    decoder = CpuDecoder(load(build), model.weights)
    ids, blocks, others = tokens(shape, 150), [4, 1, 7, 2, 9, 5, 0, 3, 6, 8], [20, 22, 21]
    tree = Part(132, [*ids[132:135], 1, 2], [-1, 0, 1, 0, 3], blocks)
    passes: list[tuple[tuple[Part, ...], list[list[int]]]] = [
        (
            (chain(0, ids[:64], blocks), chain(64, ids[64:128], blocks)),
            [[], [127], [63, 70], [90, 12, 3]],
        ),
        ((chain(128, ids[128:132], blocks), chain(0, ids[7:40], others)), [[], [3], [3, 36]]),
        ((tree, chain(33, ids[:3], others)), [[0, 1, 2, 3, 4], [4], [7, 2]]),
        ((chain(137, ids[137:138], blocks),), [[], [0]]),
    ]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(num_threads)
        kv = model.cache()
        for parts, choices in passes:
            all_kv = kv.clone()
            everything = run(decoder, all_kv, *parts)
            for wanted in choices:
                wanted_kv = kv.clone()
                out = run(decoder, wanted_kv, *parts, wanted=wanted)
                assert torch.equal(out.logits, everything.logits[wanted])
                assert torch.equal(out.top, everything.top[wanted])
                torch.testing.assert_close(wanted_kv, all_kv, rtol=0, atol=0, equal_nan=True)
            kv = all_kv
    finally:
        torch.set_num_threads(before)


@each_shape
def test_head_alone_equals_head_of_a_pass(shape: Shape, build: str) -> None:
    model = Model(shape)
    decoder = CpuDecoder(load(build), model.weights)
    out = run(decoder, model.cache(), chain(0, tokens(shape, 9), [2]))
    assert torch.equal(decoder.head(out.aux_hidden_states[:, 1]), out.logits)
    order = torch.sort(out.logits, dim=-1, descending=True, stable=True).indices
    assert torch.equal(out.top, order[:, :3])


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_threads_do_not_change_bits(num_threads: int, build: str) -> None:
    shape = replace(SHAPES[2], vocab_size=700)
    model = Model(shape)
    decoder = CpuDecoder(load(build), model.weights)
    step = chain(0, tokens(shape, 40), [2, 3, 1])
    before = torch.get_num_threads()
    expected = run(decoder, model.cache(), step)
    try:
        torch.set_num_threads(num_threads)
        for _ in range(20):
            out = run(decoder, model.cache(), step)
            assert torch.equal(out.logits, expected.logits)
            assert torch.equal(out.top, expected.top)
    finally:
        torch.set_num_threads(before)


def test_top_tokens_of_equal_and_of_nan_logits(build: str) -> None:
    shape = Shape(vocab_size=200)
    model = Model(shape)
    zero = quantize_int8(torch.zeros(200, 64))
    bias = torch.zeros(200)
    bias[[150, 31, 64, 33]] = 1.0
    bias[90] = 2.0
    decoder = CpuDecoder(load(build), replace(model.weights, head=PackedLinear(zero, bias)))
    out = run(decoder, model.cache(), chain(0, [1, 2], [0]), num_top=7)
    assert out.top.tolist() == [[90, 31, 33, 64, 150, 0, 1]] * 2
    bias[77] = torch.nan
    decoder = CpuDecoder(load(build), replace(model.weights, head=PackedLinear(zero, bias)))
    assert run(decoder, model.cache(), chain(0, [1], [0]), num_top=2).top.tolist() == [[-1, -1]]


def test_reasons_against_quantized_shapes() -> None:
    assert why_not_packed(576, 1536, 9, 3, 64) is None
    for shape, words in (
        ((570, 1536, 9, 3, 64), "hidden_size 570"),
        ((576, 1500, 9, 3, 64), "intermediate_size 1500"),
        ((576, 1536, 9, 3, 60), "head_dim 60"),
        ((576, 1536, 3, 3, 16), "1 heads of 16"),
    ):
        reason = why_not_packed(*shape)
        assert reason is not None
        assert words in reason
