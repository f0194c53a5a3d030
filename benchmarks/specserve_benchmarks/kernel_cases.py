"""The calls to be timed: kernels of one backend and model steps, with the bytes they must move.

The number of rows of a case is its number of batched tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from specserve.batch import build_batch, tree_segment
from specserve.cache.storage import KVStorage
from specserve.cache.table import BlockTable
from specserve.models.model import Model
from specserve.models.shape import ModelShape
from specserve.tree import chain_tree
from specserve_kernels.cases import AttentionCase, sampler_inputs
from specserve_kernels.ops import Kernels

BLOCK_SIZE: Final = 16
NUM_BY_ROWS_ONLY: Final = 3  # kernels for which the context does not matter


@dataclass(frozen=True, slots=True)
class Case:
    """One call. `num_bytes`: the KV, weights or logits that it must read and write, each once."""

    kernel: str
    num_rows: int
    context: int | None  # context length in tokens; None: the call does not depend on it
    num_bytes: int
    call: Callable[[], object]


def kernel_cases(
    kernels: Kernels,
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    rows: Sequence[int],
    contexts: Sequence[int],
) -> Iterator[Case]:
    """Every kernel at every number of rows; attention (of one layer) also at every context."""
    for context in contexts:
        for num_rows in rows:
            yield attention_case(kernels, shape, dtype, device, num_rows, context)
    yield from (write_case(kernels, shape, dtype, device, num_rows) for num_rows in rows)
    yield from (commit_case(kernels, shape, dtype, device, num_rows) for num_rows in rows)
    yield from (argmax_case(kernels, shape, device, num_rows) for num_rows in rows)


def attention_case(
    kernels: Kernels,
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    num_rows: int,
    context: int,
) -> Case:
    """Attention of one layer for a tree after `context` tokens; bytes: the K and V it reads."""
    inputs = AttentionCase(
        f"{num_rows} rows over {context}",
        ((context, num_rows, "tree"),),
        num_kv_heads=shape.num_kv_heads,
        group_size=shape.group_size,
        head_dim=shape.head_dim,
        block_size=BLOCK_SIZE,
        dtype=dtype,
    ).build(device)
    plan = kernels.plan_attention(inputs.segments, shape.num_kv_heads, shape.group_size)
    return Case(
        "paged_tree_attention",
        num_rows,
        context,
        (context + num_rows) * _slot_bytes(shape, dtype),
        lambda: kernels.paged_tree_attention(
            inputs.q, inputs.k_cache, inputs.v_cache, plan, scale=inputs.scale
        ),
    )


def write_case(
    kernels: Kernels, shape: ModelShape, dtype: torch.dtype, device: torch.device, num_rows: int
) -> Case:
    """Write the K and V of one layer to consecutive slots."""
    size = (num_rows, shape.num_kv_heads, shape.head_dim)
    k, v = (torch.randn(size, device=device).to(dtype) for _ in range(2))
    k_cache, v_cache = (torch.zeros(size, dtype=dtype, device=device) for _ in range(2))
    slots = torch.arange(num_rows, device=device)
    return Case(
        "kv_write",
        num_rows,
        None,
        2 * num_rows * _slot_bytes(shape, dtype),
        lambda: kernels.kv_write(k, v, k_cache, v_cache, slots),
    )


def commit_case(
    kernels: Kernels, shape: ModelShape, dtype: torch.dtype, device: torch.device, num_rows: int
) -> Case:
    """Move the KV of `num_rows` nodes from slot i + 1 to slot i, in all layers."""
    size = (shape.num_layers, 2, num_rows + 1, shape.num_kv_heads, shape.head_dim)
    kv = torch.zeros(size, dtype=dtype, device=device)
    dst = torch.arange(num_rows, device=device)
    return Case(
        "kv_commit",
        num_rows,
        None,
        2 * num_rows * shape.num_layers * _slot_bytes(shape, dtype),
        lambda: kernels.kv_commit(kv, dst + 1, dst),
    )


def argmax_case(kernels: Kernels, shape: ModelShape, device: torch.device, num_rows: int) -> Case:
    """Draw a token with Gumbel noise for every row; bytes: the logits."""
    inputs = sampler_inputs(num_rows, shape.vocab_size, device)
    sampled = torch.ones_like(inputs.sampled)
    return Case(
        "gumbel_argmax",
        num_rows,
        None,
        inputs.logits.nbytes,
        lambda: kernels.gumbel_argmax(inputs.logits, inputs.seeds, inputs.positions, sampled),
    )


def step_cases(
    model: Model, device: torch.device, rows: Sequence[int], contexts: Sequence[int]
) -> Iterator[Case]:
    """One forward pass over a single-path tree, with logits of all rows; bytes: weights and KV."""
    num_blocks = -(-(max(contexts) + max(rows)) // BLOCK_SIZE)
    storage = KVStorage(model.kv_spec, num_blocks * BLOCK_SIZE, device)
    table = BlockTable(BLOCK_SIZE, list(range(num_blocks)))
    for context in contexts:
        for num_rows in rows:
            drafted = list(range(1, num_rows))
            tree = chain_tree(0, drafted, [1.0] * len(drafted), 1)
            segments = [tree_segment(table, context, tree)]
            batch = build_batch(segments, BLOCK_SIZE, model.row_multiple, device)
            yield Case(
                "model step",
                num_rows,
                context,
                model.num_bytes + (context + num_rows) * model.kv_spec.bytes_per_slot,
                partial(model, batch, storage),
            )


def _slot_bytes(shape: ModelShape, dtype: torch.dtype) -> int:
    """Bytes of the K and V of one token in one layer."""
    return 2 * shape.num_kv_heads * shape.head_dim * dtype.itemsize
