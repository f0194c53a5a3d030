"""The top-k table: the last one to three tokens -> the target's likely next tokens.

Bounded and direct-mapped: a hash of a context gives its row, and a tag from the same hash tells
whether the row is the context's. A context that is written again is merged into its row by a
running mean, and its row survives the next write of another context to the same row (second
chance, Corbato 1968), as most contexts occur only once.
"""

import struct
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt

from specserve_kernels.host.interface import NO_SALT, ORDERS, WIDTH, TreeFields, TreeView
from specserve_kernels.host.reference.tree import grow_best_first

# A tag has the 14 upper bits of a context's hash state and two flags: the row was written, and its
# context was written again, which gives the row its second chance.
_WRITTEN, _SECOND_CHANCE, _TAG_BITS = 1, 2, 0xFFFC
_NO_TOKEN: Final = 0xFFFFFFFF  # hashed for positions before the first token of a text
_MULTIPLIER: Final = 0x9E3779B97F4A7C15  # 2**64 / golden ratio (Knuth, TAOCP 3, section 6.4)
_WORD: Final = 2**64 - 1


Context = tuple[int, ...]  # tokens, the last one first


class TopKTable:
    """A table that keeps its rows in the memory of `rows`.

    rows: the bytes of a power of two of rows of `interface.row_dtype(token_bytes)`. probs: [256],
    the probability 2 ** (-s / steps_per_octave) that each stored byte s stands for. By the number
    of tokens in the context, each [ORDERS]: learning_rate, the weight of a new observation in the
    running mean; weight, that of a context's row against those of the shorter contexts when
    candidates are read.
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
        self._buffer, self._num_rows = rows.data, len(rows) // self._row.size
        self._probs, self._steps_per_octave = probs, steps_per_octave
        self._learning_rate, self._weight = learning_rate, weight

    def grow(
        self,
        salts: Sequence[int],
        context: Sequence[int],
        max_nodes: int,
        min_probability: float,
        request_table: "TopKTable | None",
        /,
    ) -> TreeFields:
        """Grow a tree best-first from `context`, whose first element, the last token, is the root.

        salts: for each context the first salt that has a row is used. request_table: the request's
        own table (of the same host code) or None. It has no salts; its rows are mixed with this
        table's at every context length. Nodes of a path probability below `min_probability` are
        left out.
        """

        def expand(tokens: Context, depth: int) -> Iterator[tuple[int, float, Context]]:
            for token, prob in self.candidates(salts, tokens, request_table):
                yield token, prob, (token, *tokens[: ORDERS - 1])

        start = tuple(context[:ORDERS])
        return grow_best_first(start[0], start, expand, max_nodes, min_probability)

    def learn(
        self,
        salt: int,
        before: Sequence[int],
        tree: TreeView,
        best: npt.NDArray[np.int64],
        logits: npt.NDArray[np.float32],
        /,
    ) -> None:
        """Write the target's best next tokens at every node of a verified tree.

        before: the tokens before the root, the latest first. best, logits: [nodes, WIDTH], the best
        next tokens and their logits; the softmax over the WIDTH logits is stored. Rows with a
        negative token or a logit that is not finite are skipped.
        """
        with np.errstate(invalid="ignore"):
            probs = np.exp(logits - logits[:, :1])
            probs /= probs.sum(1, keepdims=True)
        valid = np.isfinite(probs).all(1) & (best >= 0).all(1)
        contexts: list[Context] = []
        nodes = zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True)
        for node, (token, parent) in enumerate(nodes):
            above = (*before, -1, -1) if parent < 0 else contexts[parent]
            contexts.append((token, *above[: ORDERS - 1]))
            if valid[node]:
                self.write(salt, contexts[node], best[node].tolist(), list(probs[node]))

    def learn_text(self, tokens: Sequence[int], /) -> None:
        """Write every token as the successor, of probability 1, of the tokens before it; no salt.

        tokens: in the order of the text.
        """
        context: Context = (-1,) * ORDERS
        probs = list(np.eye(1, WIDTH, dtype=np.float32)[0])
        for token, following in pairwise(tokens):
            context = (token, *context[: ORDERS - 1])
            self.write(NO_SALT, context, [following] + [0] * (WIDTH - 1), probs)

    def write(
        self, salt: int, context: Context, tokens: list[int], probs: Sequence[np.float32]
    ) -> None:
        """Write the successors of a context, under each of its lengths from 1 to ORDERS.

        context: ORDERS tokens, -1 before the text. tokens, probs: WIDTH successors and their
        probabilities, the best first. A context that is new under its salt starts from its row
        without a salt, if there is one.
        """
        states = zip(_states(salt, context), _states(NO_SALT, context), strict=True)
        for (state, without_salt), learning_rate in zip(states, self._learning_rate, strict=True):
            offset = state % self._num_rows * self._row.size
            tag, *values = self._row.unpack_from(self._buffer, offset)
            before = self._read(state)
            if before is None and tag & _SECOND_CHANCE:
                self._row.pack_into(self._buffer, offset, tag & ~_SECOND_CHANCE, *values)
                continue
            tag = _tag(state) | (0 if before is None else _SECOND_CHANCE)
            before = before or self._read(without_salt) or []
            merged = self._merged(tokens, probs, before, np.float32(learning_rate))
            self._row.pack_into(self._buffer, offset, tag, *merged)

    def _merged(
        self,
        tokens: list[int],
        probs: Sequence[np.float32],
        before: list[int],
        learning_rate: np.float32,
    ) -> list[int]:
        """The tokens and probability bytes of a row whose former ones are `before`, [] if none."""
        one = np.float32(1.0)
        weight = learning_rate if before else one
        merged_tokens, merged_probs = tokens.copy(), [weight * prob for prob in probs]
        for token, step in zip(before[:WIDTH], before[WIDTH:], strict=True):
            kept = (one - weight) * np.float32(self._probs[step])
            if token in tokens:
                merged_probs[tokens.index(token)] += kept
            else:
                merged_tokens.append(token)
                merged_probs.append(kept)
        best = sorted(range(len(merged_tokens)), key=lambda at: -merged_probs[at])[:WIDTH]
        least = np.float32(1e-9)
        steps = -self._steps_per_octave * np.log2([max(merged_probs[at], least) for at in best])
        bytes_ = np.clip(steps, 0, 255).round().astype(int)
        return [*(merged_tokens[at] for at in best), *bytes_.tolist()]

    def candidates(
        self,
        salts: Sequence[int],
        context: Context,
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
                    mixed[token] = mixed.get(token, 0.0) + weight * self._probs[step]
                remaining -= weight
        return sorted(mixed.items(), key=lambda item: -item[1])[:WIDTH]

    def _read(self, state: int) -> list[int] | None:
        """WIDTH tokens and then their WIDTH probability bytes; None: the context has no row."""
        offset = state % self._num_rows * self._row.size
        tag, *values = self._row.unpack_from(self._buffer, offset)
        return values if tag & ~_SECOND_CHANCE == _tag(state) else None


def best_logits(
    best: npt.NDArray[np.int64], logits: npt.NDArray[np.float32], width: int, /
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """The first `width` of each row's best tokens, and their logits, both [rows, width].

    best: [rows, at least width]. logits: [rows, vocab_size]. For a token of -1 the logit of token 0
    is returned.
    """
    best = best[:, :width]
    return best, np.take_along_axis(logits, np.maximum(best, 0), axis=1)


def _states(salt: int, context: Context) -> list[int]:
    """The hash states of the contexts of 1, 2, ... tokens; a multiplicative hash."""
    states, state = [], salt
    for token in context:
        state = ((state ^ (token & _NO_TOKEN)) * _MULTIPLIER) & _WORD
        state ^= state >> 29
        states.append(state)
    return states


def _tag(state: int) -> int:
    return state >> 48 & _TAG_BITS | _WRITTEN
