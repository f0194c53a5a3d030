"""Bookkeeping of EAGLE draft KV: which tokens of a sequence have it, and the pending hidden states.

The draft input of token i is the target's auxiliary hidden state of token i - 1 with the embedding
of token i; its draft KV is in the slot of token i. So a block of the prefix cache depends on no
token after it. There is no draft input for the first token, nor for a token whose predecessor's
hidden state was not observed: tokens of cached blocks that were filled while the drafter did not
observe, and the token after them. Such a missing range makes drafts less accurate and never affects
the output. Knows nothing of the head that computes the KV.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specserve.cache.table import TableView
from specserve.tree import MAX_NODES
from specserve_drafts.eagle.head import HeadRows

_CHAIN_WORDS = np.array([(2 << i) - 1 for i in range(MAX_NODES)], np.uint64)


@dataclass(slots=True)
class Track:
    """The draft KV state of one sequence.

    Tokens [1, hole[0]) and [hole[1], num_done) have draft KV; the draft inputs of tokens
    [num_done, num_seen) are pending.
    """

    hole: tuple[int, int]  # missing range of tokens, 1 <= hole[0] <= hole[1] <= num_done
    num_done: int
    num_seen: int  # leading tokens up to the last one whose hidden state was observed
    # Consecutive hidden states, each tensor [n, row_size], the last row that of token num_seen - 1;
    # at least those of the pending draft inputs and of the one after them.
    rows: list[Tensor] = field(default_factory=list)
    num_named: int = 0  # leading blocks that `BlockContents.name` has handled
    # The slot list of `slots_up_to`, as a tensor and an array of the same memory. The slots of
    # tokens before `_num_fixed` are final.
    _slot_list: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    _slot_array: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    _num_fixed: int = 0

    def extend(self, rows: Tensor) -> None:
        """Append the hidden states of the next tokens; rows: [num_tokens, row_size]."""
        self.rows.append(rows)
        self.num_seen += len(rows)

    @property
    def num_pending(self) -> int:
        return max(self.num_seen - self.num_done, 0)

    def latest(self) -> Tensor:
        """[num_pending + 1, row_size]: hidden states of the pending draft inputs and of the next
        one, the root's."""
        count = self.num_pending + 1
        if len(self.rows[-1]) < count:
            self.rows = [torch.cat(self.rows)]
        rows = self.rows[-1]
        return rows if len(rows) == count else rows[-count:]

    def slots_up_to(self, end: int, table: TableView) -> Tensor:
        """The slot list, [count(end) or more] int32: slots of all draft inputs before token `end`,
        whether their KV is written or not.

        Slots of committed tokens are final. The others are read again at every call, as their
        blocks may have been released and reserved anew.
        """
        if self.count(end) > len(self._slot_list):
            longer = torch.empty(max(2 * self.count(end), 256), dtype=torch.int32)
            longer[: len(self._slot_list)] = self._slot_list
            self._slot_list, self._slot_array = longer, longer.numpy()
        first, last = self.hole
        start = max(self._num_fixed, 1)
        if start < first:
            self._slot_array[start - 1 : first - 1] = table.slots(start, first - start)
        start = max(start, last)
        self._slot_array[self.count(start) : self.count(end)] = table.slots(start, end - start)
        self._num_fixed = min(table.num_committed, end)
        return self._slot_list

    def count(self, end: int) -> int:
        """The number of draft inputs before token `end`, which is not in the missing range."""
        return self.hole[0] - 1 + end - self.hole[1]

    def pending(self, tokens: Sequence[int], slot_list: Tensor) -> Iterator[HeadRows]:
        """The pending draft inputs as chains; `tokens` are the sequence's."""
        for first in range(self.num_done, self.num_seen, MAX_NODES):
            piece = tokens[first : min(first + MAX_NODES, self.num_seen)]
            yield HeadRows(
                slot_list,
                self.count(first),
                0,
                piece,
                np.arange(first - 1, first - 1 + len(piece), dtype=np.int64),
                _CHAIN_WORDS[: len(piece)],
            )

    def settle(self, num_more: int = 0) -> None:
        """Record that the pending draft inputs and `num_more` after them have draft KV."""
        self.num_done = max(self.num_done, self.num_seen + num_more)
        del self.rows[:-1]  # only the last row is needed, but slicing the tensor would cost time


class BlockContents:
    """Which blocks hold draft KV for which content, and each block's last hidden state.

    Contents are identified by the hashes of the prefix cache. The hidden state of a block's last
    token is needed for the draft input of the token after it.
    """

    def __init__(self, num_blocks: int, block_size: int, row_size: int, like: Tensor) -> None:
        self._block_size = block_size
        self._names: dict[int, bytes] = {}
        self._last_rows = like.new_zeros(num_blocks, row_size)

    def begin(self, table: TableView, num_cached: int) -> Track:
        """The state of a sequence whose first `num_cached` tokens were not observed.

        Leading blocks that already hold draft KV for the same content are used; unobserved tokens
        after them are the missing range.
        """
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
        """Record the hashes of the blocks for all of whose tokens there is draft KV."""
        size = self._block_size
        first, last = track.hole
        for index in range(track.num_named, min(track.num_done // size, len(table.hashes))):
            if (index + 1) * size <= first or index * size >= last or first == last:
                self._names[table.block_ids[index]] = table.hashes[index]
            track.num_named = index + 1

    def write(self, track: Track, table: TableView, rows: Tensor) -> None:
        """Store the hidden states of the sequence's next tokens that end a block, and drop the
        recorded hashes of the blocks that these tokens are in. rows: [n, row_size]."""
        size, start = self._block_size, track.num_seen
        end = start + len(rows)
        goes_on = bool(track.rows) and start % size > 0  # its block's hash is dropped already
        for index in range(start // size + goes_on, (end - 1) // size + 1):
            self._names.pop(table.block_ids[index], None)
        first = -(-(start + 1) // size) * size - 1  # the first token that ends a block
        if first < end:
            ids = table.block_ids[first // size : end // size]
            at = torch.tensor(ids, device=rows.device)
            self._last_rows.index_copy_(0, at, rows[first - start :: size])
