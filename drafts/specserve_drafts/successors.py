"""A bounded table: the last one, two or three tokens of a text -> what the target held likely next.

Direct-mapped: a context's row is a hash of it, with a tag of the same hash, so that another
context's row is not taken for one's own. A context that comes again takes a share of what it now
says into what its row says, and is spared once when another wants the row (the second chance of
Corbato 1968): most contexts never come again. Host only.
"""

import struct
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from specserve.tree import DraftTree
from specserve_drafts.best_first import grow_best_first
from specserve_drafts.whole_file import whole_file
from specserve_kernels.dispatch import native_host

if TYPE_CHECKING:
    from specserve_kernels.host import _native

ORDERS: Final = 3  # contexts of 1 .. ORDERS tokens
WIDTH: Final = 4  # successors of each
TABLE: Final = "table.safetensors"  # in the directory of a draft
_PER_OCTAVE: Final = 16  # steps of a stored share in which it halves
_SHARES: Final = (2.0 ** (-np.arange(256) / _PER_OCTAVE)).astype(np.float32)  # of a step
_SHARE_LIST: Final[list[float]] = _SHARES.tolist()
# A tag: the upper bits of a context's state, and two more.
_WRITTEN, _AGAIN, _TAG_BITS = np.uint16(1), np.uint16(2), np.uint16(0xFFFC)
NO_SALT: Final = 0
_NO_TOKEN: Final = 0xFFFFFFFF  # before the first one of a text
_MULTIPLIER: Final = 0x9E3779B97F4A7C15  # 2**64 / golden ratio (Knuth, TAOCP 3, section 6.4)
_WORD: Final = 2**64 - 1

Context = tuple[int, ...]  # the last token first


class Manner(NamedTuple):
    """How a table takes in what it is told, by order; measured in drafts/LOG.md.

    news: what is said again counts this much against all before; long contexts come seldom and mean
    what they last meant. trust: when read, a context counts this much against the shorter ones.
    """

    news: tuple[float, ...]
    trust: tuple[float, ...]


SHARED: Final = Manner(news=(0.1, 0.2, 0.4), trust=(1.0, 0.5, 0.6))
OWN: Final = Manner(news=(0.5, 0.6, 0.8), trust=(0.6, 0.6, 0.7))  # of a single text


class SuccessorTable:
    """`num_rows` contexts, a power of two."""

    def __init__(self, num_rows: int, vocab_size: int, manner: Manner = SHARED) -> None:
        assert num_rows.bit_count() == 1, f"{num_rows} is no power of two"
        self._manner = manner
        token = "H" if vocab_size <= 2**16 else "I"
        self._row = struct.Struct(f"<H{WIDTH}{token}{WIDTH}B")
        # A row lies together: reading one misses the cache once.
        fields = [("tags", "<u2"), ("tokens", f"<{token}", WIDTH), ("shares", "u1", WIDTH)]
        rows = np.zeros(num_rows, fields)
        assert rows.itemsize == self._row.size
        self._buffer = rows.view(np.uint8).data
        host = native_host()
        self._native: _native.SuccessorTable | None = None
        if host is not None:
            self._native = host.SuccessorTable(
                rows.view(np.uint8),
                token_bytes=rows.dtype["tokens"].base.itemsize,
                shares=_SHARE_LIST,
                steps_per_octave=_PER_OCTAVE,
                news=manner.news,
                trust=manner.trust,
            )
        self._tags: npt.NDArray[np.uint16] = rows["tags"]  # 0: never written
        self._tokens: npt.NDArray[np.unsignedinteger[Any]] = rows["tokens"]
        self._shares: npt.NDArray[np.uint8] = rows["shares"]  # in steps below 1

    @property
    def num_filled(self) -> int:
        return int(np.count_nonzero(self._tags))

    def grow(
        self,
        salts: Seq[int],
        context: Seq[int],
        max_nodes: int,
        min_probability: float,
        source: int,
        own: "SuccessorTable | None" = None,
    ) -> DraftTree:
        """The likely paths from the last token of a context, which stands first in it.

        What is found under an earlier salt goes before what is found under a later one. `own` is
        of the text alone, without salts; it is mixed in at every length of context.
        """
        if self._native is not None:
            of_text = None if own is None else own._native
            return DraftTree(
                *self._native.grow(salts, context, max_nodes, min_probability, source, of_text)
            )

        def expand(known: Context, depth: int) -> Iterator[tuple[int, float, Context]]:
            for token, share in self.candidates(salts, known, own):
                yield token, share, (token, *known[: ORDERS - 1])

        known = tuple(context[:ORDERS])
        return grow_best_first(known[0], known, expand, max_nodes, min_probability, source)

    def learn(
        self,
        salt: int,
        before: Seq[int],
        tree: DraftTree,
        best: npt.NDArray[np.int64],
        logits: npt.NDArray[np.float32],
    ) -> None:
        """What the target says at every node of a tree.

        before: the tokens before the root, the latest first. best, logits: [nodes, WIDTH], the
        best next tokens and their logits. Rows without tokens or numbers are left out.
        """
        if self._native is not None:
            self._native.learn(salt, before, tree, best, logits)
            return
        with np.errstate(invalid="ignore"):
            shares = np.exp(logits - logits[:, :1])
            shares /= shares.sum(1, keepdims=True)
        sound = np.isfinite(shares).all(1) & (best >= 0).all(1)
        contexts = np.array(_contexts(tree, before), np.int64)
        salts = np.full(len(tree), salt, np.uint64)
        self.write(salts[sound], contexts[sound], best[sound], shares[sound])

    def learn_text(self, tokens: Seq[int]) -> None:
        """That every token surely follows those before it; without a salt."""
        if self._native is not None:
            self._native.learn_text(tokens)
            return
        salt, shares = np.zeros(1, np.uint64), np.eye(1, WIDTH, dtype=np.float32)
        for end in range(1, len(tokens)):
            before = tokens[max(end - ORDERS, 0) : end][::-1]
            context = np.array([(*before, *[-1] * (ORDERS - len(before)))], np.int64)
            self.write(salt, context, np.array([[tokens[end]] + [0] * (WIDTH - 1)]), shares)

    def write(
        self,
        salts: npt.NDArray[np.uint64],
        contexts: npt.NDArray[np.int64],
        tokens: npt.NDArray[np.int64],
        shares: npt.NDArray[np.float32],
    ) -> None:
        """salts [n]; contexts [n, ORDERS], the last token first, -1 before the text; tokens and
        shares [n, WIDTH], the best first.

        What is new under a salt begins with what is known without one, if anything is."""
        state, without = salts, np.full_like(salts, NO_SALT)
        for order in range(ORDERS):
            token = contexts[:, order].astype(np.uint64) & np.uint64(_NO_TOKEN)
            state, without = _next_states(state, token), _next_states(without, token)
            self._write(state, without, np.float32(self._manner.news[order]), tokens, shares)

    def _write(
        self,
        states: npt.NDArray[np.uint64],
        without: npt.NDArray[np.uint64],
        news: np.float32,
        tokens: npt.NDArray[np.int64],
        shares: npt.NDArray[np.float32],
    ) -> None:
        """Contexts of one length, by their states with and without their salt."""
        rows, known = self._find(states)
        before, told = self._find(without)
        tags, there = _tags(states), self._tags[rows]
        spared = ~known & (there & _AGAIN > 0)
        self._tags[rows[spared]] = there[spared] & ~_AGAIN
        weights = np.where(known | told, news, np.float32(1.0))[:, None]
        source = np.where(known, rows, before)
        merged = _merged(
            tokens.astype(self._tokens.dtype),
            weights * shares,
            self._tokens[source],
            (np.float32(1.0) - weights) * _SHARES[self._shares[source]],
        )
        mine = rows[~spared]
        self._tags[mine] = np.where(known, tags | _AGAIN, tags)[~spared]
        self._tokens[mine] = merged[0][~spared]
        self._shares[mine] = _steps(merged[1])[~spared]

    def _find(
        self, states: npt.NDArray[np.uint64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Where contexts have their rows, and whether these are theirs."""
        rows = (states & np.uint64(len(self._tags) - 1)).astype(np.int64)
        return rows, self._tags[rows] & ~_AGAIN == _tags(states)

    def candidates(
        self, salts: Seq[int], context: Seq[int], own: "SuccessorTable | None" = None
    ) -> list[tuple[int, float]]:
        """At most WIDTH tokens and how likely they are, the best first; see `grow`."""
        mixed: dict[int, float] = {}
        left = 1.0
        states = [_states(salt, context) for salt in salts]
        states_of_text = _states(NO_SALT, context)
        for order in reversed(range(len(context))):
            of_text = None if own is None else own._said(states_of_text[order])
            found = (said for state in states if (said := self._said(state[order])) is not None)
            for table, said in ((own, of_text), (self, next(found, None))):
                if table is None or said is None:
                    continue
                weight = left * table._manner.trust[order]
                for token, step in zip(said[:WIDTH], said[WIDTH:], strict=True):
                    mixed[token] = mixed.get(token, 0.0) + weight * _SHARE_LIST[step]
                left -= weight
        return sorted(mixed.items(), key=lambda item: -item[1])[:WIDTH]

    def _said(self, state: int) -> list[int] | None:
        """The tokens of a context's row and their steps; None: it has none."""
        row = state & (len(self._tags) - 1)
        tag, *said = self._row.unpack_from(self._buffer, row * self._row.size)
        return said if tag & 0xFFFD == state >> 48 & 0xFFFC | 1 else None

    def save(self, path: Path) -> None:
        """As safetensors; a reader never sees half a file."""
        columns = {"tags": self._tags, "tokens": self._tokens, "shares": self._shares}
        with whole_file(path) as part:
            save_file({name: column.copy() for name, column in columns.items()}, part)

    @classmethod
    def load(cls, path: Path, vocab_size: int) -> "SuccessorTable":
        """Raises ValueError, naming the file, if it is no table for such a vocabulary."""
        try:
            arrays = load_file(path)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error
        num_rows = len(arrays.get("tags", ()))
        if num_rows.bit_count() != 1:
            raise ValueError(f"{path} is no table of successors: it has {num_rows} rows")
        table = cls(num_rows, vocab_size)
        for name in ("tags", "tokens", "shares"):
            own, read = getattr(table, f"_{name}"), arrays.get(name)
            if read is None or (read.shape, read.dtype) != (own.shape, own.dtype):
                raise ValueError(
                    f"{path}: {name} is {'missing' if read is None else (read.shape, read.dtype)}, "
                    f"expected {(own.shape, own.dtype)}; make the table anew for this target"
                )
            own[:] = read
        if table._tokens.max(initial=0) >= vocab_size:
            raise ValueError(f"{path} has tokens outside the vocabulary of {vocab_size}")
        return table


def _merged(
    new: npt.NDArray[np.unsignedinteger[Any]],
    new_shares: npt.NDArray[np.float32],
    old: npt.NDArray[np.unsignedinteger[Any]],
    old_shares: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.unsignedinteger[Any]], npt.NDArray[np.float32]]:
    """The WIDTH best of both, row by row; a token in both has the sum of its shares."""
    same = new[:, :, None] == old[:, None, :]
    same &= same.cumsum(1) == 1  # a token that fills up new rows is there more than once
    both = new_shares + (same * old_shares[:, None, :]).sum(2)
    alone = np.where(same.any(1), np.float32(0.0), old_shares)
    shares = np.concatenate([both, alone], 1)
    best = np.argsort(-shares, axis=1, kind="stable")[:, :WIDTH]
    tokens = np.concatenate([new, old], 1)
    return np.take_along_axis(tokens, best, 1), np.take_along_axis(shares, best, 1)


def _tags(states: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint16]:
    tags: npt.NDArray[np.uint16] = (states >> np.uint64(48)).astype(np.uint16)
    return tags & _TAG_BITS | _WRITTEN


def _steps(shares: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    steps = -_PER_OCTAVE * np.log2(np.maximum(shares, np.float32(1e-9)))
    rounded: npt.NDArray[np.uint8] = np.clip(steps, 0, 255).round().astype(np.uint8)
    return rounded


def _contexts(tree: DraftTree, before: Seq[int]) -> list[Context]:
    """Of every node: the last tokens of its path, its own first; -1 before the text."""
    above = (*before[: ORDERS - 1], *[-1] * (ORDERS - 1 - len(before)))
    contexts: list[Context] = []
    for token, parent in zip(tree.tokens.tolist(), tree.parents.tolist(), strict=True):
        context = above if parent < 0 else contexts[parent][: ORDERS - 1]
        contexts.append((token, *context))
    return contexts


def _next_states(
    states: npt.NDArray[np.uint64], tokens: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """Of contexts that are longer by a token."""
    states = (states ^ tokens) * np.uint64(_MULTIPLIER)
    return states ^ (states >> np.uint64(29))


def _states(salt: int, context: Seq[int]) -> list[int]:
    """What identifies the contexts of 1, 2 ... tokens; as `_next_states`."""
    states, state = [], salt
    for token in context:
        state = ((state ^ (token & _NO_TOKEN)) * _MULTIPLIER) & _WORD
        state ^= state >> 29
        states.append(state)
    return states
