"""Paged tree attention in plain torch: the reference implementation.

A row's positions are split into chunks of KV_CHUNK at absolute multiples of it. The matmul of every
chunk has a fixed shape, the row maximum is taken over all chunks, and the chunks' sums are added in
ascending order. So a row's bits depend only on what it sees at which position: neither on the other
rows of the launch (they determine the padding, which adds exact zeros) nor on its ancestors' slots.
"""

import math

import torch
from torch import Tensor

from specserve_kernels.ops import Plan
from specserve_kernels.torch_ref.tiles import KV_CHUNK, AttentionPlan, Scratch, Tile

LOG2_E = math.log2(math.e)


def paged_tree_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    plan: Plan,
    *,
    scale: float,
    window: int = 0,
) -> Tensor:
    """[num_rows, num_heads, head_dim] in q's dtype; see `Kernels.paged_tree_attention`."""
    assert isinstance(plan, AttentionPlan), "a plan belongs to the backend that made it"
    head_dim = q.shape[2]
    queries = (q.to(k_cache.dtype).float() * (scale * LOG2_E)).reshape(-1, head_dim)
    keys, values = k_cache.view(-1, head_dim), v_cache.view(-1, head_dim)
    out = torch.zeros_like(queries)
    sums = torch.ones_like(queries[:, 0])  # padding rows: 0 / 1
    for tiles in plan.batches(window, q.device):
        all_scores = [
            _scores(tile, index, queries, keys, plan.scratch) for index, tile in enumerate(tiles)
        ]
        tops = _maxima(tiles, all_scores, sums)
        for tile, scores, top in zip(tiles, all_scores, tops, strict=True):
            weights = scores.sub_(top[:, None, :, None]).exp2_()
            _accumulate(tile, weights, values, out, sums, plan.scratch)
    return out.div_(sums[:, None]).view(q.shape).to(q.dtype)


def _scores(tile: Tile, index: int, queries: Tensor, keys: Tensor, scratch: Scratch) -> Tensor:
    """Base-2 scores [n, num_chunks, rows, KV_CHUNK], -inf where hidden; n = groups * KV heads."""
    q = scratch.gather("q", queries, tile.query_rows).view(-1, tile.num_rows, queries.shape[1])
    k = scratch.gather("kv", keys, tile.slots).view(-1, KV_CHUNK, keys.shape[1])
    # One buffer per tile: a batch's scores are all kept until the common row maxima are known.
    scores = scratch.take(f"scores{index}", tile.shape, queries)
    torch.bmm(q, k.transpose(1, 2), out=scores.view(-1, *tile.shape[2:]))
    if tile.hidden is not None:
        masked = scores.view(tile.num_groups, -1, *tile.shape[1:])[:, :, tile.first_hidden :]
        masked += tile.hidden
    return scores


def _maxima(tiles: tuple[Tile, ...], all_scores: list[Tensor], sums: Tensor) -> list[Tensor]:
    """Each row's maximum over all tiles that hold chunks of it, per tile [groups * heads, rows]."""
    own = [scores.amax(3).amax(1) for scores in all_scores]
    if len(tiles) == 1:
        return own
    shared = torch.full_like(sums, -torch.inf)
    for tile, top in zip(tiles, own, strict=True):
        shared[tile.rows] = torch.maximum(shared[tile.rows], top.flatten())
    return [shared[tile.rows].view_as(top) for tile, top in zip(tiles, own, strict=True)]


def _accumulate(
    tile: Tile, weights: Tensor, values: Tensor, out: Tensor, sums: Tensor, scratch: Scratch
) -> None:
    """Add the tile's chunks to `out` and `sums` in place, in ascending order."""
    head_dim = values.shape[1]
    v = scratch.gather("kv", values, tile.slots).view(-1, KV_CHUNK, head_dim)
    chunk_out = scratch.take("out", (*tile.shape[:3], head_dim), weights)
    chunk_sums = weights.sum(3)
    rounded = weights.to(values.dtype).float().view(-1, *tile.shape[2:])
    torch.bmm(rounded, v, out=chunk_out.view(-1, tile.num_rows, head_dim))
    total_out, total_sum = chunk_out[:, 0], chunk_sums[:, 0]
    if tile.continues:
        total_out += out[tile.rows].view(total_out.shape)
        total_sum += sums[tile.rows].view(total_sum.shape)
    for chunk in range(1, tile.shape[1]):
        total_out += chunk_out[:, chunk]
        total_sum += chunk_sums[:, chunk]
    out.index_copy_(0, tile.rows, total_out.reshape(-1, head_dim))
    sums.index_copy_(0, tile.rows, total_sum.reshape(-1))
