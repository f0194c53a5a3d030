"""The draft inputs of EAGLE heads: which of them have draft KV, and the pending hidden states.

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
import torch
from torch import Tensor

from specserve.cache.table import TableView
from specserve.tree import MAX_NODES
from specserve_drafts.draft_kv import DraftKV, DraftKVState
from specserve_drafts.eagle.head import HeadSegment

_CHAIN_ANCESTORS = np.array([(2 << i) - 1 for i in range(MAX_NODES)], np.uint64)


@dataclass(slots=True)
class DraftInputs(DraftKVState):
    """The draft inputs of one sequence; there is none for token 0, and 1 <= missing[0].

    Those of tokens [num_with_kv, num_observed) are pending.
    """

    num_observed: int = 0  # leading tokens up to the last one whose hidden state was observed
    # Consecutive hidden states, each tensor [n, size], the last row that of token num_observed - 1;
    # at least those of the pending draft inputs and of the one after them.
    hidden_states: list[Tensor] = field(default_factory=list)
    # The slot list of `slots_up_to`. The slots of tokens before `_num_final` are final.
    _slot_list: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    _num_final: int = 0

    def extend(self, states: Tensor) -> None:
        """Append the hidden states of the next tokens; states: [num_tokens, size]."""
        self.hidden_states.append(states)
        self.num_observed += len(states)

    @property
    def num_pending(self) -> int:
        return max(self.num_observed - self.num_with_kv, 0)

    def pending_states(self) -> Tensor:
        """[num_pending + 1, size]: hidden states of the pending draft inputs and of the next
        one, the root's."""
        count = self.num_pending + 1
        if len(self.hidden_states[-1]) < count:
            self.hidden_states = [torch.cat(self.hidden_states)]
        states = self.hidden_states[-1]
        return states if len(states) == count else states[-count:]

    def slots_up_to(self, end: int, table: TableView) -> Tensor:
        """The slot list, [num_inputs(end) or more] int32: slots of all draft inputs before token
        `end`, whether their KV is written or not.

        Slots of committed tokens are final. The others are read again at every call, as their
        blocks may have been released and reserved anew.
        """
        if self.num_inputs(end) > len(self._slot_list):
            longer = torch.empty(max(2 * self.num_inputs(end), 256), dtype=torch.int32)
            longer[: len(self._slot_list)] = self._slot_list
            self._slot_list = longer
        array = self._slot_list.numpy()
        first, last = self.missing
        start = max(self._num_final, 1)
        if start < first:
            array[start - 1 : first - 1] = table.slots(start, first - start)
        start = max(start, last)
        own = slice(self.num_inputs(start), self.num_inputs(end))
        array[own] = table.slots(start, end - start)
        self._num_final = min(table.num_committed, end)
        return self._slot_list

    def num_inputs(self, end: int) -> int:
        """The number of draft inputs before token `end`, which is not in the missing range."""
        return self.missing[0] - 1 + end - self.missing[1]

    def pending_segments(self, tokens: Sequence[int], slot_list: Tensor) -> Iterator[HeadSegment]:
        """The pending draft inputs as chains; `tokens` are the sequence's."""
        for first in range(self.num_with_kv, self.num_observed, MAX_NODES):
            chunk = tokens[first : min(first + MAX_NODES, self.num_observed)]
            yield HeadSegment(
                slot_list,
                self.num_inputs(first),
                0,
                chunk,
                np.arange(first - 1, first - 1 + len(chunk), dtype=np.int64),
                _CHAIN_ANCESTORS[: len(chunk)],
            )

    def mark_written(self, num_more: int = 0) -> None:
        """Record that the pending draft inputs and the `num_more` after them have draft KV."""
        self.num_with_kv = max(self.num_with_kv, self.num_observed + num_more)
        # Only the last row is needed, but slicing the tensor would cost time.
        del self.hidden_states[:-1]


class HeadKV(DraftKV):
    """The draft KV of a head, and the last hidden state of each block.

    The hidden state of a block's last token is needed for the draft input of the token after it.
    """

    def __init__(self, num_blocks: int, state_size: int, like: Tensor) -> None:
        super().__init__()
        self._last_states = like.new_zeros(num_blocks, state_size)

    def start(self, table: TableView, num_cached: int) -> DraftInputs:
        """The state of a sequence whose first `num_cached` tokens were not observed.

        Leading blocks that already hold draft KV for the same content are used; unobserved tokens
        after them are the missing range.
        """
        size = table.block_size
        num_shared = min(self.num_shared(table), num_cached // size * size)
        if 0 < num_shared == num_cached:
            last = table.block_ids[num_cached // size - 1]
            last_state = self._last_states[last : last + 1].clone()
            return DraftInputs(
                num_cached, (1, 1), num_observed=num_cached, hidden_states=[last_state]
            )
        missing = max(num_shared, 1), num_cached + 1
        return DraftInputs(num_cached + 1, missing, num_observed=num_cached)

    def observe(self, state: DraftInputs, table: TableView, hidden_states: Tensor) -> None:
        """Append the hidden states [n, state_size] of the sequence's next tokens to `state`.

        Those of tokens that end a block are stored for other sequences with this block.
        """
        size, start = table.block_size, state.num_observed
        end = start + len(hidden_states)
        # The block that an earlier call began is dropped already.
        is_continued = bool(state.hidden_states) and start % size > 0
        self.drop(table, start + size * is_continued, end)
        first = -(-(start + 1) // size) * size - 1  # the first token that ends a block
        if first < end:
            ids = table.block_ids[first // size : end // size]
            at = torch.tensor(ids, device=hidden_states.device)
            self._last_states.index_copy_(0, at, hidden_states[first - start :: size])
        state.extend(hidden_states)
