"""The data that the host code shares with its callers."""

from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

# The fields of a `specserve.tree.DraftTree` in their order: tokens, parents, path_probs and
# drafter_ids, each [n].
TreeFields = tuple[
    npt.NDArray[np.int32], npt.NDArray[np.int16], npt.NDArray[np.float32], npt.NDArray[np.uint8]
]

DRAFTED_ID: Final = 1  # drafter id of the nodes of grown trees

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
