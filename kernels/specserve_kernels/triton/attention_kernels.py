"""The two attention kernels: one tile of rows over one split of its slots, then the merge.

The rows of a tile are the combinations of some nodes with all query heads of one KV head, so that K
and V are read once for all. Row ("lane") i of a tile belongs to row first_row + i // GROUP of the
segment and to query head i % GROUP of the KV head. Scores are in base 2.
"""

import triton.language as tl

from specserve_kernels.triton.compile import kernel


@kernel
def fold(
    acc: tl.tensor,  # [BLOCK_M, DIM] float32
    top: tl.tensor,  # [BLOCK_M] float32, running maximum
    total: tl.tensor,  # [BLOCK_M] float32, running sum
    q: tl.tensor,  # [BLOCK_M, DIM]
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,  # the segment's block table
    place: tl.tensor,  # [N] positions in the block table
    inside: tl.tensor,  # [N] bool, positions that may be read; unless MASKED all
    seen: tl.tensor,  # [BLOCK_M, N] bool, positions that each row sees; unless MASKED all
    head: tl.tensor,
    scale: float,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """One online-softmax step over N slots. A float32 product is computed as three TF32 ones."""
    dim = tl.arange(0, DIM)
    readable = (dim < HEAD_DIM)[None, :]
    if MASKED:
        block = tl.load(table + place // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        readable = readable & inside[:, None]
    else:
        block = tl.load(table + place // BLOCK_SIZE).to(tl.int64)
    slot = block * BLOCK_SIZE + place % BLOCK_SIZE
    offset = (slot * NUM_KV_HEADS + head) * HEAD_DIM
    k = tl.load(k_cache + offset[:, None] + dim[None, :], mask=readable, other=0.0)
    scores = tl.dot(q.to(k.dtype), tl.trans(k), input_precision="tf32x3") * scale
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    # For a row that has seen nothing yet, -inf - -inf would be NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    v = tl.load(v_cache + offset[:, None] + dim[None, :], mask=readable, other=0.0)
    acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="tf32x3")
    return acc, new_top, total * shrink + tl.sum(weights, 1)


@kernel
def popcount(x: tl.tensor) -> tl.tensor:
    x = x - ((x >> 1) & 0x5555555555555555)
    x = (x & 0x3333333333333333) + ((x >> 2) & 0x3333333333333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0F
    x = x + (x >> 8)
    x = x + (x >> 16)
    return (x + (x >> 32)) & 0x7F


@kernel
def rows_of_lanes(
    lane: tl.tensor,  # [n]
    start: tl.tensor,  # the segment's first row
    num_rows: tl.tensor,  # of the segment
    first_row: tl.tensor,  # of the tile, in the segment
    BLOCK_M: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of each lane: its row in the forward pass, whether it has one, and [n, DIM] the elements of
    its head that exist."""
    row = first_row + lane // GROUP
    valid = (row < num_rows) & (lane < BLOCK_M // GROUP * GROUP)
    dim = tl.arange(0, DIM)
    return (start + row).to(tl.int64), valid, valid[:, None] & (dim < HEAD_DIM)[None, :]


@kernel
def fold_context(
    q: tl.tensor,  # [BLOCK_M, DIM]
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    split: tl.tensor,
    context: tl.tensor,
    lowest: tl.tensor,  # [BLOCK_M] int32, the first position in the window of each row
    head: tl.tensor,
    scale: float,
    window: int,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOWED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """acc, top and total of `fold` after the context positions of one split."""
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, context)
    if WINDOWED:
        begin = tl.maximum(begin, tl.maximum(context + 1 - window, 0) // BLOCK_N * BLOCK_N)
    whole = begin + tl.maximum(end - begin, 0) // BLOCK_N * BLOCK_N
    column = tl.arange(0, BLOCK_N)
    for chunk in range(begin, whole, BLOCK_N):
        place = chunk + column
        acc, top, total = fold(
            acc, top, total, q, k_cache, v_cache, table,
            place, place >= 0, place[None, :] >= lowest[:, None], head, scale,
            NUM_KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, WINDOWED,
        )  # fmt: skip
    if whole < end:
        place = whole + column
        seen = (place < end)[None, :]
        if WINDOWED:
            seen = seen & (place[None, :] >= lowest[:, None])
        acc, top, total = fold(
            acc, top, total, q, k_cache, v_cache, table, place, place < end, seen, head, scale,
            NUM_KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, True,
        )  # fmt: skip
    return acc, top, total


@kernel
def fold_tree(
    acc: tl.tensor,  # as in `fold`, as top and total
    top: tl.tensor,
    total: tl.tensor,
    q: tl.tensor,
    k_cache: tl.tensor,
    v_cache: tl.tensor,
    table: tl.tensor,
    context: tl.tensor,
    num_nodes: tl.tensor,  # nodes of the tree up to the segment's last row
    word: tl.tensor,  # [BLOCK_M] int64, ancestor words
    lowest: tl.tensor,  # as in `fold_context`
    head: tl.tensor,
    scale: float,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TREE_N: tl.constexpr,
    WINDOWED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """acc, top and total of `fold` after the nodes of the tree."""
    node = tl.arange(0, TREE_N)
    bit = (word[:, None] >> node[None, :].to(tl.int64)) & 1
    seen = bit != 0
    if WINDOWED:
        up_to = (tl.full([TREE_N], 2, tl.int64) << node.to(tl.int64)) - 1
        position = context + popcount(word[:, None] & up_to[None, :]).to(tl.int32) - 1
        seen = seen & (position >= lowest[:, None])
    acc, top, total = fold(
        acc, top, total, q, k_cache, v_cache, table, context + node,
        node < num_nodes, seen, head, scale,
        NUM_KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, True,
    )  # fmt: skip
    return acc, top, total


@kernel
def store_tile(
    acc: tl.tensor,  # as in `fold`, as top and total
    top: tl.tensor,
    total: tl.tensor,
    out: tl.tensor,  # as in `attend_split`, as partial_out and partial_stats
    partial_out: tl.tensor,
    partial_stats: tl.tensor,
    partial: tl.tensor,
    row: tl.tensor,  # [BLOCK_M], as in `rows_of_lanes`, as valid and stored
    valid: tl.tensor,
    stored: tl.tensor,
    head: tl.tensor,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """Write the result of a tile to `out`, or to its partial if it is one of several splits."""
    lane, dim = tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    if partial < 0:
        query_head = head * GROUP + lane % GROUP
        out_offset = (row * NUM_KV_HEADS * GROUP + query_head) * HEAD_DIM
        acc = acc / tl.where(valid, total, 1.0)[:, None]
        tl.store(out + out_offset[:, None] + dim[None, :], acc, mask=stored)
    else:
        tile = partial.to(tl.int64) * NUM_KV_HEADS + head
        offset = (tile * BLOCK_M + lane) * HEAD_DIM
        tl.store(partial_out + offset[:, None] + dim[None, :], acc, mask=stored)
        tl.store(partial_stats + tile * 2 * BLOCK_M + lane, top)
        tl.store(partial_stats + (tile * 2 + 1) * BLOCK_M + lane, total)


@kernel
def attend_split(
    q: tl.tensor,  # [num_rows, NUM_KV_HEADS * GROUP, HEAD_DIM]
    k_cache: tl.tensor,  # [num_slots, NUM_KV_HEADS, HEAD_DIM]
    v_cache: tl.tensor,
    out: tl.tensor,  # like q
    partial_out: tl.tensor,  # [num_partials, NUM_KV_HEADS, BLOCK_M, HEAD_DIM] float32
    partial_stats: tl.tensor,  # [num_partials, NUM_KV_HEADS, 2, BLOCK_M] float32: maximum, sum
    work: tl.tensor,  # [grid, 4] int32: segment, first row, split, partial or -1: write `out`
    segments: tl.tensor,  # [num_segments, 4] int32: first row, rows, context length, first node
    words: tl.tensor,  # [num_rows] int64
    tables: tl.tensor,  # [num_segments, table_stride] int32
    q_stride: int,
    table_stride: int,
    scale: float,
    window: int,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TREE_N: tl.constexpr,
    SPLIT: tl.constexpr,
    WINDOWED: tl.constexpr,
) -> None:
    """A tile over one split of the context; the last split includes the tree.

    Grid (work items, KV heads).
    """
    item = work + tl.program_id(0) * 4
    head = tl.program_id(1)
    segment, first_row = tl.load(item), tl.load(item + 1)
    split, partial = tl.load(item + 2), tl.load(item + 3)
    start, num_rows = tl.load(segments + segment * 4), tl.load(segments + segment * 4 + 1)
    context, first_node = tl.load(segments + segment * 4 + 2), tl.load(segments + segment * 4 + 3)
    table = tables + segment * table_stride
    lane = tl.arange(0, BLOCK_M)
    row, valid, stored = rows_of_lanes(
        lane, start, num_rows, first_row, BLOCK_M, GROUP, HEAD_DIM, DIM
    )
    q_offset = row * q_stride + (head * GROUP + lane % GROUP) * HEAD_DIM
    q_tile = tl.load(q + q_offset[:, None] + tl.arange(0, DIM)[None, :], mask=stored, other=0.0)
    word = tl.load(words + row, mask=valid, other=0)
    lowest = context + popcount(word).to(tl.int32) - window  # the first position in the window
    acc, top, total = fold_context(
        q_tile, k_cache, v_cache, table, split, context, lowest, head, scale, window,
        NUM_KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, BLOCK_M, BLOCK_N, SPLIT, WINDOWED,
    )  # fmt: skip
    if (split + 1) * SPLIT >= context:
        acc, top, total = fold_tree(
            acc, top, total, q_tile, k_cache, v_cache, table, context, first_node + num_rows,
            word, lowest, head, scale, NUM_KV_HEADS, HEAD_DIM, DIM, BLOCK_SIZE, TREE_N, WINDOWED,
        )  # fmt: skip
    store_tile(
        acc, top, total, out, partial_out, partial_stats, partial, row, valid, stored, head,
        NUM_KV_HEADS, GROUP, HEAD_DIM, DIM, BLOCK_M,
    )  # fmt: skip


@kernel
def merge_splits(
    partial_out: tl.tensor,  # as in `attend_split`
    partial_stats: tl.tensor,
    out: tl.tensor,  # [num_rows, NUM_KV_HEADS * GROUP, HEAD_DIM]
    merges: tl.tensor,  # [grid, 4] int32: segment, first row, first partial, splits
    segments: tl.tensor,  # [num_segments, 4] int32
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LANES: tl.constexpr,
) -> None:
    """Merges splits, in ascending order. Grid (merges, KV heads, BLOCK_M / LANES)."""
    item = merges + tl.program_id(0) * 4
    head = tl.program_id(1)
    segment, first_row = tl.load(item), tl.load(item + 1)
    first_partial, num_splits = tl.load(item + 2), tl.load(item + 3)
    start, num_rows = tl.load(segments + segment * 4), tl.load(segments + segment * 4 + 1)

    lane = tl.program_id(2) * LANES + tl.arange(0, LANES)
    row, valid, stored = rows_of_lanes(
        lane, start, num_rows, first_row, BLOCK_M, GROUP, HEAD_DIM, DIM
    )
    dim = tl.arange(0, DIM)
    acc = tl.zeros([LANES, DIM], tl.float32)
    top = tl.full([LANES], float("-inf"), tl.float32)
    total = tl.zeros([LANES], tl.float32)
    for split in range(num_splits):
        tile = (first_partial + split).to(tl.int64) * NUM_KV_HEADS + head
        split_top = tl.load(partial_stats + tile * 2 * BLOCK_M + lane)
        split_total = tl.load(partial_stats + (tile * 2 + 1) * BLOCK_M + lane)
        offset = (tile * BLOCK_M + lane) * HEAD_DIM
        split_acc = tl.load(partial_out + offset[:, None] + dim[None, :], mask=stored, other=0.0)
        new_top = tl.maximum(top, split_top)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink, split_shrink = tl.exp2(top - base), tl.exp2(split_top - base)
        acc = acc * shrink[:, None] + split_acc * split_shrink[:, None]
        total = total * shrink + split_total * split_shrink
        top = new_top
    out_row = row * NUM_KV_HEADS * GROUP + head * GROUP + lane % GROUP
    acc = acc / tl.where(valid, total, 1.0)[:, None]
    tl.store(out + (out_row * HEAD_DIM)[:, None] + dim[None, :], acc, mask=stored)
