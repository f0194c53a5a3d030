"""The top-k table: the last one to three tokens -> the target's likely next tokens.

Bounded and direct-mapped: a hash of a context gives its row, and a tag from the same hash tells
whether the row is the context's. A context that is written again is merged into its row by a
running mean, and its row survives the next write of another context to the same row (second
chance, Corbato 1968), as most contexts occur only once.
"""

import struct
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from specserve_kernels.host.interface import (
    NO_SALT,
    ORDERS,
    WIDTH,
    TreeFields,
    TreeView,
    row_dtype,
)
from specserve_kernels.host.reference.tree import grow_best_first

# A tag has the 14 upper bits of a context's hash state and two flags: the row was written, and its
# context was written again, which gives the row its second chance.
_WRITTEN, _SECOND_CHANCE, _TAG_BITS = np.uint16(1), np.uint16(2), np.uint16(0xFFFC)
_NO_TOKEN: Final = 0xFFFFFFFF  # hashed for positions before the first token of a text
_MULTIPLIER: Final = 0x9E3779B97F4A7C15  # 2**64 / golden ratio (Knuth, TAOCP 3, section 6.4)
_WORD: Final = 2**64 - 1


Context = tuple[int, ...]  # tokens, the last one first


class TopKTable:
    """Implements `interface.TopKTable`; see `HostCode.TopKTable` for the parameters.

    learning_rate: the weight of a new observation in the running mean. weight: that of a context's
    row against those of the shorter contexts when candidates are read.
    """

    def __init__(
        self,
        rows: npt.NDArray[np.uint8],
        *,
        token_bytes: int,
        probs: Sequence[float],
        steps_per_octave: float,
        learning_rate: Sequence[float],
        weight: Sequence[float],
    ) -> None:
        self._row = struct.Struct(f"<H{WIDTH}{'H' if token_bytes == 2 else 'I'}{WIDTH}B")
        self._buffer = rows.data
        fields = rows.view(row_dtype(token_bytes))
        self._tags: npt.NDArray[np.uint16] = fields["tags"]
        self._tokens: npt.NDArray[np.unsignedinteger[Any]] = fields["tokens"]
        self._prob_steps: npt.NDArray[np.uint8] = fields["prob_steps"]
        self._probs, self._prob_list = np.array(probs, np.float32), list(probs)
        self._steps_per_octave = steps_per_octave
        self._learning_rate, self._weight = learning_rate, weight

    def grow(
        self,
        salts: Sequence[int],
        context: Sequence[int],
        max_nodes: int,
        min_probability: float,
        drafter_id: int,
        request_table: "TopKTable | None",
    ) -> TreeFields:
        """See `interface.TopKTable.grow`."""

        def expand(tokens: Context, depth: int) -> Iterator[tuple[int, float, Context]]:
            for token, prob in self.candidates(salts, tokens, request_table):
                yield token, prob, (token, *tokens[: ORDERS - 1])

        start = tuple(context[:ORDERS])
        return grow_best_first(start[0], start, expand, max_nodes, min_probability, drafter_id)

    def learn(
        self,
        salt: int,
        before: Sequence[int],
        tree: TreeView,
        best: npt.NDArray[np.int64],
        logits: npt.NDArray[np.float32],
    ) -> None:
        """See `interface.TopKTable.learn`."""
        with np.errstate(invalid="ignore"):
            probs = np.exp(logits - logits[:, :1])
            probs /= probs.sum(1, keepdims=True)
        valid = np.isfinite(probs).all(1) & (best >= 0).all(1)
        contexts = np.array(_contexts(tree, before), np.int64)
        salts = np.full(len(best), salt, np.uint64)
        self.write(salts[valid], contexts[valid], best[valid], probs[valid])

    def learn_text(self, tokens: Sequence[int]) -> None:
        """See `interface.TopKTable.learn_text`."""
        salt, probs = np.zeros(1, np.uint64), np.eye(1, WIDTH, dtype=np.float32)
        for end in range(1, len(tokens)):
            before = tokens[max(end - ORDERS, 0) : end][::-1]
            context = np.array([(*before, *[-1] * (ORDERS - len(before)))], np.int64)
            self.write(salt, context, np.array([[tokens[end]] + [0] * (WIDTH - 1)]), probs)

    def write(
        self,
        salts: npt.NDArray[np.uint64],
        contexts: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int64],
        probs: npt.NDArray[np.float32],
    ) -> None:
        """Write n contexts, under each of their lengths from 1 to ORDERS.

        salts: [n]. contexts: [n, ORDERS], the last token first, -1 before the text. tokens, probs:
        [n, WIDTH], successors and their probabilities, the best first. A context that is new under
        its salt starts from its row without a salt, if there is one.
        """
        state, without_salt = salts, np.full_like(salts, NO_SALT)
        for order in range(ORDERS):
            token = contexts[:, order].astype(np.uint64) & np.uint64(_NO_TOKEN)
            state, without_salt = _next_states(state, token), _next_states(without_salt, token)
            self._write(state, without_salt, np.float32(self._learning_rate[order]), tokens, probs)

    def _write(
        self,
        states: npt.NDArray[np.uint64],
        without_salt: npt.NDArray[np.uint64],
        learning_rate: np.float32,
        tokens: npt.NDArray[np.int64],
        probs: npt.NDArray[np.float32],
    ) -> None:
        """Write contexts of one length, given their hash states with and without their salt."""
        rows, known = self._find(states)
        before, known_without_salt = self._find(without_salt)
        tags, old_tags = _tags(states), self._tags[rows]
        kept = ~known & (old_tags & _SECOND_CHANCE > 0)
        self._tags[rows[kept]] = old_tags[kept] & ~_SECOND_CHANCE
        weights = np.where(known | known_without_salt, learning_rate, np.float32(1.0))[:, None]
        source = np.where(known, rows, before)
        merged = _merged(
            tokens.astype(self._tokens.dtype),
            weights * probs,
            self._tokens[source],
            (np.float32(1.0) - weights) * self._probs[self._prob_steps[source]],
        )
        written = rows[~kept]
        self._tags[written] = np.where(known, tags | _SECOND_CHANCE, tags)[~kept]
        self._tokens[written] = merged[0][~kept]
        self._prob_steps[written] = self._steps_of(merged[1])[~kept]

    def _find(
        self, states: npt.NDArray[np.uint64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """The row index of each context, and whether the row currently holds that context."""
        rows = (states & np.uint64(len(self._tags) - 1)).astype(np.int64)
        return rows, self._tags[rows] & ~_SECOND_CHANCE == _tags(states)

    def candidates(
        self,
        salts: Sequence[int],
        context: Sequence[int],
        request_table: "TopKTable | None" = None,
    ) -> list[tuple[int, float]]:
        """At most WIDTH (token, probability) pairs, the best first; parameters as in `grow`.

        Rows are mixed from the longest context down, each with the part `weight` of the
        remaining weight; at each length the row of `request_table` comes first.
        """
        mixed: dict[int, float] = {}
        remaining = 1.0
        states = [_states(salt, context) for salt in salts]
        request_states = _states(NO_SALT, context)
        for order in reversed(range(len(context))):
            request_row = (
                None if request_table is None else request_table._read(request_states[order])
            )
            rows = (self._read(state[order]) for state in states)
            shared_row = next((row for row in rows if row is not None), None)
            for table, row in ((request_table, request_row), (self, shared_row)):
                if table is None or row is None:
                    continue
                weight = remaining * table._weight[order]
                for token, step in zip(row[:WIDTH], row[WIDTH:], strict=True):
                    mixed[token] = mixed.get(token, 0.0) + weight * self._prob_list[step]
                remaining -= weight
        return sorted(mixed.items(), key=lambda item: -item[1])[:WIDTH]

    def _read(self, state: int) -> list[int] | None:
        """WIDTH tokens and then their WIDTH probability bytes; None: the context has no row."""
        row = state & (len(self._tags) - 1)
        tag, *values = self._row.unpack_from(self._buffer, row * self._row.size)
        return values if tag & 0xFFFD == state >> 48 & 0xFFFC | 1 else None

    def _steps_of(self, probs: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
        """The bytes that stand for probabilities."""
        steps = -self._steps_per_octave * np.log2(np.maximum(probs, np.float32(1e-9)))
        rounded: npt.NDArray[np.uint8] = np.clip(steps, 0, 255).round().astype(np.uint8)
        return rounded


def best_logits(
    best: npt.NDArray[np.int64], logits: npt.NDArray[np.float32], width: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """See `HostCode.best_logits`."""
    best = best[:, :width]
    return best, np.take_along_axis(logits, np.maximum(best, 0), axis=1)


def _merged(
    new: npt.NDArray[np.unsignedinteger[Any]],
    new_probs: npt.NDArray[np.float32],
    old: npt.NDArray[np.unsignedinteger[Any]],
    old_probs: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.unsignedinteger[Any]], npt.NDArray[np.float32]]:
    """The WIDTH best of the new and old successors, row by row; a token in both has the sum of its
    weighted probabilities."""
    same = new[:, :, None] == old[:, None, :]
    same &= same.cumsum(1) == 1  # rows of `learn_text` are padded with a repeated token
    both = new_probs + (same * old_probs[:, None, :]).sum(2)
    alone = np.where(same.any(1), np.float32(0.0), old_probs)
    probs = np.concatenate([both, alone], 1)
    best = np.argsort(-probs, axis=1, kind="stable")[:, :WIDTH]
    tokens = np.concatenate([new, old], 1)
    return np.take_along_axis(tokens, best, 1), np.take_along_axis(probs, best, 1)


def _tags(states: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint16]:
    tags: npt.NDArray[np.uint16] = (states >> np.uint64(48)).astype(np.uint16)
    return tags & _TAG_BITS | _WRITTEN


def _contexts(tree: TreeView, before: Sequence[int]) -> list[Context]:
    """The last ORDERS tokens up to each node, the node's own first; -1 before the text."""
    above = (*before[: ORDERS - 1], *[-1] * (ORDERS - 1 - len(before)))
    contexts: list[Context] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        context = above if parent < 0 else contexts[parent][: ORDERS - 1]
        contexts.append((token, *context))
    return contexts


def _next_states(
    states: npt.NDArray[np.uint64], tokens: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """The hash states of contexts extended by one token further back; a multiplicative hash."""
    states = (states ^ tokens) * np.uint64(_MULTIPLIER)
    return states ^ (states >> np.uint64(29))


def _states(salt: int, context: Sequence[int]) -> list[int]:
    """The hash states of the contexts of 1, 2, ... tokens; computed as `_next_states` does."""
    states, state = [], salt
    for token in context:
        state = ((state ^ (token & _NO_TOKEN)) * _MULTIPLIER) & _WORD
        state ^= state >> 29
        states.append(state)
    return states
