"""The interface of the host code's classes, and the data that they share with their callers."""

from collections.abc import Sequence
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

# The fields of a `specserve.tree.DraftTree` in their order: tokens, parents, path_probs and
# drafter_ids, each [n].
TreeFields = tuple[
    npt.NDArray[np.int32], npt.NDArray[np.int16], npt.NDArray[np.float32], npt.NDArray[np.uint8]
]

END: Final = -1  # ends each text in a log of several; not a token id, so no match crosses it

ORDERS: Final = 3  # contexts of a top-k table have 1 to ORDERS tokens
WIDTH: Final = 4  # successors stored per context; more gained nothing (drafts/LOG.md, 2026-11-25)
NO_SALT: Final = 0


def row_dtype(token_bytes: int) -> np.dtype[np.void]:
    """A row of a top-k table. Its fields are adjacent, so that reading it costs one cache miss.

    tags: 0 if the row was never written. prob_steps: one byte for each probability.
    """
    fields = [("tags", "<u2"), ("tokens", f"<u{token_bytes}", WIDTH), ("prob_steps", "u1", WIDTH)]
    return np.dtype(fields)


class TreeView(Protocol):
    """What is read of a `specserve.tree.DraftTree`."""

    @property
    def tokens(self) -> npt.NDArray[np.int32]: ...
    @property
    def parents(self) -> npt.NDArray[np.int16]: ...
    @property
    def path_probs(self) -> npt.NDArray[np.float32]: ...
    @property
    def drafter_ids(self) -> npt.NDArray[np.uint8]: ...
    @property
    def depths(self) -> tuple[int, ...]: ...
    @property
    def acceptance_probs(self) -> tuple[float, ...]: ...


class Calibration(Protocol):
    """Observed acceptance rates of all drafters."""

    def merged(self, sampled: bool, trees: Sequence[TreeView], max_nodes: int, /) -> TreeFields:
        """Merge trees with the same root into one with calibrated path probabilities.

        A node that several drafters proposed has the largest of their probabilities. The tree has
        the `max_nodes` nodes of the largest path probability. `sampled`: temperature > 0.
        """
        ...

    def record_outcome(
        self, sampled: bool, trees: Sequence[TreeView], emitted: Sequence[int], /
    ) -> None:
        """Count the nodes of the proposed `trees` whose parents were emitted."""
        ...


class TokenLog(Protocol):
    """An append-only text with an index of its n-grams."""

    def __len__(self) -> int: ...

    def extend(self, tokens: Sequence[int], /) -> None:
        """Append tokens."""
        ...


class SuffixSearch(Protocol):
    """Finds earlier occurrences of a text's last tokens."""

    def tree(
        self, logs: Sequence[Any], recent: Sequence[int], max_nodes: int, drafter_id: int, /
    ) -> TreeFields:
        """A tree of the tokens that followed them, of at most `max_nodes` nodes, root included.

        logs: `TokenLog`s of the same host code, in order of preference. recent: the text's last
        tokens, as many as may match; the last one is the root.
        """
        ...


class TopKTable(Protocol):
    """The last one to three tokens -> the target's likely next tokens."""

    def grow(
        self,
        salts: Sequence[int],
        context: Sequence[int],
        max_nodes: int,
        min_probability: float,
        drafter_id: int,
        request_table: Any,
        /,
    ) -> TreeFields:
        """Grow a tree best-first from `context`, whose first element, the last token, is the root.

        salts: for each context the first salt that has a row is used. request_table: the request's
        own table (a `TopKTable` of the same host code) or None. It has no salts; its rows are mixed
        with this table's at every context length. Nodes of a path probability below
        `min_probability` are left out.
        """
        ...

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
        ...

    def learn_text(self, tokens: Sequence[int], /) -> None:
        """Write every token as the successor, of probability 1, of the tokens before it; no salt.

        tokens: in the order of the text.
        """
        ...
