"""Exact backends: a row's bits depend on its own inputs only.

Every comparison here is `torch.equal`. A row is given by its context, the K and V of its path and
its query; what changes is everything else.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from exact_kernels import each_exact_kernels
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from specserve_kernels.cases import ancestor_words
from specserve_kernels.ops import Kernels
from specserve_kernels.segments import Segments
from specserve_kernels.torch_ref import TorchKernels

SHAPES = ((3, 3, 64), (2, 1, 80), (1, 8, 128), (2, 4, 64), (1, 1, 16))


@dataclass(frozen=True)
class Part:
    """One segment: a tree whose node i has the tokens' Q, K and V at index `tokens[i]`."""

    context: Sequence[int]  # token indices
    tokens: Sequence[int]
    parents: Sequence[int]
    first_node: int = 0


@dataclass(frozen=True)
class Model:
    """Q, K and V as functions of the token, so that equal tokens carry equal bits."""

    kernels: Kernels
    q: Tensor  # [num_tokens, num_heads, head_dim]
    k: Tensor  # [num_tokens, num_kv_heads, head_dim]
    v: Tensor  # [num_tokens, num_kv_heads, head_dim]
    group_size: int
    window: int

    @classmethod
    def random(
        cls,
        kernels: Kernels,
        shape: tuple[int, int, int],
        window: int = 0,
        dtype: torch.dtype = torch.float32,
    ) -> "Model":
        num_kv_heads, group_size, head_dim = shape
        generator = torch.Generator().manual_seed(head_dim)

        def tokens(num_heads: int) -> Tensor:
            return torch.randn((1500, num_heads, head_dim), generator=generator).to(dtype)

        heads = num_kv_heads * group_size
        k, v = tokens(num_kv_heads), tokens(num_kv_heads)
        return cls(kernels, tokens(heads), k, v, group_size, window)

    def run(self, *parts: Part, block_size: int = 16) -> list[Tensor]:
        """The rows of each part, [rows, num_heads, head_dim], computed in one pass."""
        num_blocks = [-(-(len(p.context) + len(p.tokens)) // block_size) for p in parts]
        block_ids = np.random.default_rng(len(parts)).permutation(sum(num_blocks))
        tables = np.zeros((len(parts), max(num_blocks)), np.int32)
        shape = (len(block_ids) * block_size, *self.k.shape[1:])
        k_cache, v_cache = torch.full(shape, torch.nan), torch.full(shape, torch.nan)
        k_cache, v_cache = k_cache.to(self.k.dtype), v_cache.to(self.k.dtype)
        for part, table, count in zip(parts, tables, num_blocks, strict=True):
            table[:count], block_ids = block_ids[:count], block_ids[count:]
            tokens = np.array([*part.context, *part.tokens])
            place = np.arange(len(tokens))
            slots = table[place // block_size] * block_size + place % block_size
            k_cache[slots], v_cache[slots] = self.k[tokens], self.v[tokens]
        rows = [list(part.tokens[part.first_node :]) for part in parts]
        words = [ancestor_words(list(p.parents))[p.first_node :] for p in parts]
        segments = Segments(
            np.cumsum([0, *map(len, rows)], dtype=np.int32),
            np.array([len(part.context) for part in parts], np.int32),
            np.array([part.first_node for part in parts], np.int32),
            np.concatenate(words),
            tables,
            sum(map(len, rows)) + 1,
            block_size,
        )
        q = self.q[[*itertools.chain.from_iterable(rows), 0]]
        plan = self.kernels.plan_attention(segments, self.k.shape[1], self.group_size)
        out = self.kernels.paged_tree_attention(
            q, k_cache, v_cache, plan, scale=0.125, window=self.window
        )
        return [out[start:end] for start, end in itertools.pairwise(segments.cu_rows)]


def chain(context: Sequence[int], tokens: Sequence[int]) -> Part:
    return Part(context, tokens, range(-1, len(tokens) - 1))


@each_exact_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("window", [0, 70])
@pytest.mark.parametrize("context_len", [0, 37, 100, 127, 128, 300])
def test_a_chain_equals_token_by_token_decoding(
    kernels: Kernels, shape: tuple[int, int, int], window: int, context_len: int
) -> None:
    model = Model.random(kernels, shape, window)
    tokens = range(context_len + 64)
    (at_once,) = model.run(chain(tokens[:context_len], tokens[context_len:]))
    for row in range(0, 64, 7):
        (alone,) = model.run(chain(tokens[: context_len + row], [context_len + row]))
        assert torch.equal(alone[0], at_once[row])


@each_exact_kernels
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_segments_do_not_depend_on_each_other(
    kernels: Kernels, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    model = Model.random(kernels, shape, dtype=dtype)
    subject = chain(range(200), [200])
    (alone,) = model.run(subject)
    others = (
        chain(range(900), range(900, 910)),
        chain([], [3]),
        Part(range(150), range(150, 156), [-1, 0, 0, 1, 2, 2]),
        chain(range(40), range(40, 104)),
    )
    for count in range(1, 5):
        assert torch.equal(model.run(subject, *others[:count])[0], alone)
        assert torch.equal(model.run(*others[:count], subject)[count], alone)
    for copies in (2, 5, 13):
        for result in model.run(*[subject] * copies):
            assert torch.equal(result, alone)


@st.composite
def trees(draw: st.DrawFn) -> list[int]:
    num_nodes = draw(st.integers(2, 24))
    return [-1, *(draw(st.integers(max(0, node - 5), node - 1)) for node in range(1, num_nodes))]


@each_exact_kernels
@settings(max_examples=25, deadline=None)
@example(  # only the last node attends across a split boundary
    parents=[-1, 0], context_len=255, shape=(2, 1, 80), window=0, block_size=16, first_share=0.5
)
@given(
    parents=trees(),
    context_len=st.integers(0, 20) | st.integers(110, 140) | st.integers(250, 260),
    shape=st.sampled_from(SHAPES),
    window=st.sampled_from([0, 9, 130]),
    block_size=st.sampled_from([16, 64]),
    first_share=st.sampled_from([0.0, 0.5]),
)
def test_a_tree_branch_equals_decoding_its_path(
    kernels: Kernels,
    parents: list[int],
    context_len: int,
    shape: tuple[int, int, int],
    window: int,
    block_size: int,
    first_share: float,
) -> None:
    model = Model.random(kernels, shape, window)
    context = range(context_len)
    tokens = range(context_len, context_len + len(parents))
    first = int(len(parents) * first_share)
    (rows,) = model.run(Part(context, tokens, parents, first), block_size=block_size)
    for node in range(first, len(parents)):
        path = [node]
        while path[0]:
            path.insert(0, parents[path[0]])
        path_tokens = [tokens[member] for member in path]
        (plain,) = model.run(chain([*context, *path_tokens[:-1]], path_tokens[-1:]))
        assert torch.equal(rows[node - first], plain[0]), f"node {node}"


def test_tile_size_does_not_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.random(TorchKernels(), (3, 3, 64))
    parts = [chain(range(260 + i), range(260 + i, 270 + i)) for i in range(4)]
    together = model.run(*parts)
    monkeypatch.setattr("specserve_kernels.torch_ref.tiles.MAX_TILE_ELEMENTS", 1)
    for one_by_one, batched in zip(model.run(*parts), together, strict=True):
        assert torch.equal(one_by_one, batched)
