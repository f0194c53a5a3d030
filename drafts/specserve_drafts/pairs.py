"""Which (row, next token) pairs of a sequence have draft KV, and what the next pair begins with.

The pair of token i is the target's row of token i - 1 with token i, and lies in the slot of
token i: so a block of the prefix cache depends on nothing after it. The first token has no pair,
and neither have tokens whose rows nobody has seen: tokens of cached blocks that were filled before
the draft was looking, and the one after them. Drafts are the worse for it, never wrong. Knows no
head.
"""

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specserve.cache.table import TableView
from specserve.tree import MAX_NODES
from specserve_drafts.heads import HeadRows

_CHAIN_WORDS = np.array([(2 << i) - 1 for i in range(MAX_NODES)], np.uint64)


@dataclass(slots=True)
class Track:
    """One sequence. Pairs [1, hole[0]) and [hole[1], num_done) are in the cache, the pairs
    num_done .. num_seen - 1 are waiting."""

    hole: tuple[int, int]  # tokens without a pair, 1 <= hole[0] <= hole[1] <= num_done
    num_done: int
    num_seen: int  # tokens whose rows were seen
    # Each [n, row_size], the last one's last of token num_seen - 1; what pairs can need, or more.
    rows: list[Tensor] = field(default_factory=list)
    num_named: int = 0  # leading blocks that `BlockContents` has seen the names of
    # See `lane_up_to`; the same memory twice. Those of tokens before `_num_fixed` are there.
    _lane: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    _numbers: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    _num_fixed: int = 0

    def extend(self, rows: Tensor) -> None:
        """The target has computed the next tokens; rows: [num_tokens, row_size]."""
        self.rows.append(rows)
        self.num_seen += len(rows)

    @property
    def num_waiting(self) -> int:
        return max(self.num_seen - self.num_done, 0)

    def latest(self) -> Tensor:
        """[num_waiting + 1, row_size]: rows of the waiting pairs, and of the one after them."""
        count = self.num_waiting + 1
        if len(self.rows[-1]) < count:
            self.rows = [torch.cat(self.rows)]
        rows = self.rows[-1]
        return rows if len(rows) == count else rows[-count:]

    def lane_up_to(self, end: int, table: TableView) -> Tensor:
        """[count(end) or more] int32: slots of all pairs before token `end`, written or not.

        Those of committed tokens stay; the blocks after them are given back and taken anew.
        """
        if self.count(end) > len(self._lane):
            longer = torch.empty(max(2 * self.count(end), 256), dtype=torch.int32)
            longer[: len(self._lane)] = self._lane
            self._lane, self._numbers = longer, longer.numpy()
        first, last = self.hole
        start = max(self._num_fixed, 1)
        if start < first:
            self._numbers[start - 1 : first - 1] = table.slots(start, first - start)
        start = max(start, last)
        self._numbers[self.count(start) : self.count(end)] = table.slots(start, end - start)
        self._num_fixed = min(table.num_committed, end)
        return self._lane

    def count(self, end: int) -> int:
        """Pairs before token `end`."""
        return self.hole[0] - 1 + end - self.hole[1]

    def waiting(self, tokens: Seq[int], lane: Tensor) -> Iterator[HeadRows]:
        """The waiting pairs as chains; `tokens` are the sequence's."""
        for first in range(self.num_done, self.num_seen, MAX_NODES):
            piece = tokens[first : min(first + MAX_NODES, self.num_seen)]
            yield HeadRows(
                lane,
                self.count(first),
                0,
                piece,
                np.arange(first - 1, first - 1 + len(piece), dtype=np.int64),
                _CHAIN_WORDS[: len(piece)],
            )

    def settle(self, num_more: int = 0) -> None:
        """The waiting pairs are in the cache, and `num_more` after them."""
        self.num_done = max(self.num_done, self.num_seen + num_more)
        del self.rows[:-1]  # of the last ones one is enough, but cutting takes time


class BlockContents:
    """The blocks with draft KV by the names the prefix cache has for their content, and the
    target's row of each one's last token, which the pair after it needs."""

    def __init__(self, num_blocks: int, block_size: int, row_size: int, like: Tensor) -> None:
        self._block_size = block_size
        self._names: dict[int, bytes] = {}
        self._last_rows = like.new_zeros(num_blocks, row_size)

    def begin(self, table: TableView, num_cached: int) -> Track:
        """A sequence whose first `num_cached` tokens came with the prefix cache."""
        num_shared = 0
        for block_id, name in zip(table.block_ids, table.hashes, strict=False):
            if num_shared >= num_cached or self._names.get(block_id) != name:
                break
            num_shared += self._block_size
        if 0 < num_shared == num_cached:
            last = table.block_ids[num_cached // self._block_size - 1]
            return Track((1, 1), num_cached, num_cached, [self._last_rows[last : last + 1].clone()])
        hole = (max(min(num_shared, num_cached), 1), num_cached + 1)
        return Track(hole, num_cached + 1, num_cached)

    def name(self, track: Track, table: TableView) -> None:
        """Take note of what the blocks are called whose pairs are all there."""
        size = self._block_size
        first, last = track.hole
        for index in range(track.num_named, min(track.num_done // size, len(table.hashes))):
            if (index + 1) * size <= first or index * size >= last or first == last:
                self._names[table.block_ids[index]] = table.hashes[index]
            track.num_named = index + 1

    def write(self, track: Track, table: TableView, rows: Tensor) -> None:
        """Rows [n, row_size] of the track's next tokens: the blocks they are in change."""
        size, start = self._block_size, track.num_seen
        end = start + len(rows)
        goes_on = bool(track.rows) and start % size > 0  # in a block without a name
        for index in range(start // size + goes_on, (end - 1) // size + 1):
            self._names.pop(table.block_ids[index], None)
        first = -(-(start + 1) // size) * size - 1  # the first token that ends a block
        if first < end:
            ids = table.block_ids[first // size : end // size]
            at = torch.tensor(ids, device=rows.device)
            self._last_rows.index_copy_(0, at, rows[first - start :: size])
