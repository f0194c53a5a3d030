"""Shared test cases: seeded inputs on which backends are compared with the torch reference.

Slots that no row may see hold NaN, so that reading one of them shows in the result.
"""

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from specserve_kernels.packed_weight import (
    GROUP,
    PackedWeight,
    WeightFormat,
    pack_floats,
    pack_int4,
    pack_int8,
)
from specserve_kernels.segments import Segments

# chain: the parent of node i is i - 1. tree: the parent is one of the 4 nodes before. late: a tree
# whose first half is in the cache already, so that only its later nodes are rows.
Kind = Literal["chain", "tree", "late"]


@dataclass(frozen=True, slots=True)
class AttentionInputs:
    """Inputs of `paged_tree_attention`; `segments` is what its plan is made from."""

    q: Tensor  # [num_rows, num_heads, head_dim]
    k_cache: Tensor  # [num_slots, num_kv_heads, head_dim]
    v_cache: Tensor  # [num_slots, num_kv_heads, head_dim]
    segments: Segments
    scale: float


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """A forward pass: (context_len, num_nodes, kind) per segment, and the shape of the model."""

    name: str
    parts: tuple[tuple[int, int, Kind], ...]
    num_kv_heads: int = 2
    group_size: int = 3
    head_dim: int = 64
    block_size: int = 16
    window: int = 0
    num_padding: int = 0
    dtype: torch.dtype = torch.float32

    @property
    def num_scores(self) -> int:
        """Attention scores over all heads: a measure of how long the case takes."""
        heads = self.num_kv_heads * self.group_size
        return heads * sum((context + nodes) * nodes for context, nodes, _ in self.parts)

    def build(self, device: torch.device) -> AttentionInputs:
        seed = zlib.crc32(self.name.encode())
        rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
        segments, num_slots = self._segments(rng)
        cache = (num_slots, self.num_kv_heads, self.head_dim)
        k_cache, v_cache = (torch.randn(cache, generator=generator) for _ in range(2))
        unused = torch.ones(num_slots, dtype=torch.bool)
        unused[_slots_in_use(segments, self.parts)] = False
        k_cache[unused] = v_cache[unused] = torch.nan
        num_heads = self.num_kv_heads * self.group_size
        q = torch.randn((segments.num_rows, num_heads, self.head_dim), generator=generator)
        q, k_cache, v_cache = (x.to(device, self.dtype) for x in (q, k_cache, v_cache))
        return AttentionInputs(q, k_cache, v_cache, segments, self.head_dim**-0.5)

    def _segments(self, rng: np.random.Generator) -> tuple[Segments, int]:
        words, first_nodes, num_rows = [], [], []
        for _, num_nodes, kind in self.parts:
            first = num_nodes // 2 if kind == "late" else 0
            words.append(ancestor_words(_parents(num_nodes, kind, rng))[first:])
            first_nodes.append(first)
            num_rows.append(num_nodes - first)
        contexts = np.array([context for context, _, _ in self.parts], np.int32)
        num_blocks = [-(-(c + n) // self.block_size) for c, n, _ in self.parts]
        total = sum(num_blocks) + 2
        block_ids = rng.permutation(total)
        tables = np.zeros((len(self.parts), max(num_blocks)), np.int32)
        for row, count in enumerate(num_blocks):
            tables[row, :count], block_ids = block_ids[:count], block_ids[count:]
        cu_rows = np.cumsum([0, *num_rows], dtype=np.int32)
        segments = Segments(
            cu_rows,
            contexts,
            np.array(first_nodes, np.int32),
            np.concatenate(words),
            tables,
            int(cu_rows[-1]) + self.num_padding,
            self.block_size,
        )
        return segments, total * self.block_size


def ancestor_words(parents: list[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """The ancestor words of a tree, [num_nodes] uint64; parents[i] < i, -1 for the root."""
    words: list[int] = []
    for node, parent in enumerate(parents):
        words.append((words[parent] if parent >= 0 else 0) | 1 << node)
    return np.array(words, np.uint64)


def _parents(num_nodes: int, kind: Kind, rng: np.random.Generator) -> list[int]:
    if kind == "chain":
        return list(range(-1, num_nodes - 1))
    # Parents at most 4 nodes back give both deep paths and many side branches.
    return [-1, *(int(rng.integers(max(0, node - 4), node)) for node in range(1, num_nodes))]


def _slots_in_use(segments: Segments, parts: tuple[tuple[int, int, Kind], ...]) -> Tensor:
    slots = []
    for table, (context, num_nodes, _) in zip(segments.block_tables, parts, strict=True):
        place = np.arange(context + num_nodes)
        block = table[place // segments.block_size].astype(np.int64)
        slots.append(block * segments.block_size + place % segments.block_size)
    return torch.from_numpy(np.concatenate(slots))


_MIXED: tuple[tuple[int, int, Kind], ...] = (
    (0, 5, "tree"),
    (127, 3, "tree"),
    (300, 1, "chain"),
    (16, 12, "late"),
    (7, 1, "chain"),
    (63, 2, "chain"),
    (64, 17, "tree"),
)

ATTENTION_CASES = (
    AttentionCase("one token", ((0, 1, "chain"),)),
    AttentionCase(
        "decode", ((1, 1, "chain"), (15, 1, "chain"), (16, 1, "chain"), (40, 1, "chain"))
    ),
    AttentionCase("chain", ((5, 9, "chain"), (128, 4, "chain")), num_padding=3),
    AttentionCase("tree", ((12, 10, "tree"), (130, 7, "tree")), num_padding=1),
    AttentionCase("late", ((33, 14, "late"), (0, 2, "late"))),
    AttentionCase("mixed", _MIXED, num_padding=5),
    AttentionCase("mixed block 64", _MIXED, block_size=64),
    AttentionCase("mixed block 1", _MIXED, block_size=1),
    AttentionCase("group 1 head 80", _MIXED, 2, 1, 80),
    AttentionCase("group 4 head 128", _MIXED, 1, 4, 128),
    AttentionCase("group 8", _MIXED, 1, 8),
    AttentionCase("narrow window", _MIXED, window=4),
    AttentionCase("window", _MIXED, window=100, block_size=64),
    AttentionCase("bfloat16", _MIXED, dtype=torch.bfloat16),
    AttentionCase("float16", _MIXED, dtype=torch.float16),
    AttentionCase("full segments", ((0, 64, "chain"), (64, 64, "chain"), (250, 64, "tree"))),
    AttentionCase("wide late", ((1000, 64, "late"), (511, 33, "tree"), (512, 1, "chain"))),
    AttentionCase("long", ((4096, 1, "chain"), (4095, 3, "tree"), (10, 1, "chain")), 1, 4, 128),
    AttentionCase("long window", ((4096, 1, "chain"), (3000, 40, "tree")), window=700),
    AttentionCase("long bfloat16", ((2048, 8, "tree"),), dtype=torch.bfloat16, block_size=64),
)
assert len({case.name for case in ATTENTION_CASES}) == len(ATTENTION_CASES)


@dataclass(frozen=True, slots=True)
class SamplerInputs:
    """Inputs of the sampling kernels; every field has `num_rows` rows."""

    logits: Tensor  # [num_rows, vocab_size] float32
    seeds: Tensor  # [num_rows] int64
    positions: Tensor  # [num_rows] int64
    sampled: Tensor  # [num_rows] bool
    prompt_mask: Tensor  # [num_rows, vocab_size] bool
    counts: Tensor  # [num_rows, vocab_size] int32
    repetition: Tensor  # [num_rows] float32
    frequency: Tensor  # [num_rows] float32
    presence: Tensor  # [num_rows] float32


def sampler_inputs(num_rows: int, vocab_size: int, device: torch.device) -> SamplerInputs:
    """Logits with ties and excluded tokens; seeds and positions that need more than 32 bits."""
    generator = torch.Generator().manual_seed(num_rows * 1_000_003 + vocab_size)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    logits = (uniform(num_rows, vocab_size) * 40).round() / 4 - 5
    logits[uniform(num_rows, vocab_size) < 0.2] = -torch.inf
    large = torch.randint(0, 2**63 - 1, (2, num_rows), generator=generator)
    counts = (uniform(num_rows, vocab_size) * 4 - 2).clamp_min(0).ceil().to(torch.int32)
    fields = (
        logits,
        large[0],
        large[1] >> 20,
        torch.arange(num_rows) % 3 != 1,
        uniform(num_rows, vocab_size) < 0.3,
        counts,
        1 + (uniform(num_rows) - 0.3).clamp_min(0),
        uniform(num_rows) * 4 - 2,
        uniform(num_rows) * 4 - 2,
    )
    return SamplerInputs(*(field.to(device) for field in fields))


@dataclass(frozen=True, slots=True)
class LinearCase:
    """A weight, with scales from 0 to 0.05 if it is quantized, and activation rows for it."""

    format: WeightFormat
    num_outputs: int
    num_inputs: int

    def weight(self) -> PackedWeight:
        generator = torch.Generator().manual_seed(self.num_outputs * 10_007 + self.num_inputs)
        shape = (self.num_outputs, self.num_inputs)
        if not self.format.quantized:
            floats = torch.randn(shape, generator=generator) * 0.05
            return pack_floats(floats.to(self.format.dtype))
        scales = torch.rand(shape[0], shape[1] // GROUP, generator=generator) * 0.05
        scales[0, 0] = 0.0
        if self.format is WeightFormat.INT8:
            values = torch.randint(-128, 128, shape, generator=generator, dtype=torch.int8)
            return pack_int8(values, scales.half())
        values = torch.randint(0, 16, shape, generator=generator, dtype=torch.uint8)
        minimums = -16 * torch.rand(scales.shape, generator=generator) * scales
        return pack_int4(values, scales.half(), minimums.half())

    def rows(self, num_rows: int) -> Tensor:  # [num_rows, num_inputs] float32, with outliers
        generator = torch.Generator().manual_seed(num_rows)
        x = torch.randn((num_rows, self.num_inputs), generator=generator)
        x[:, self.num_inputs // 3] *= 100
        x[num_rows // 2, :GROUP] = 0
        return x


LINEAR_CASES = tuple(
    LinearCase(weight_format, num_outputs, num_inputs)
    for weight_format in WeightFormat
    for num_outputs, num_inputs in ((16, 32), (1, 64), (100, 96), (960, 576), (49, 1536))
)

# (src, dst) moves of `kv_commit`: compacted paths, also of two sequences. Some destinations are
# sources of earlier moves.
COMMIT_MOVES: tuple[tuple[tuple[int, int], ...], ...] = (
    (),
    ((5, 3),),
    ((2, 1), (3, 2), (5, 3), (9, 4)),
    ((40, 39), (41, 40), (43, 41), (12, 10), (13, 11), (14, 12)),
    tuple((slot + 1, slot) for slot in range(60)),
)
