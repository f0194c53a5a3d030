"""Host code of drafting, which knows draft trees: it expands, calibrates, merges and prunes them.

`reference` defines it in Python, and `_compiled` (C++ in `csrc/`) gives the same bits. It exists
because a forward pass leaves no code and data of the host in the CPU caches, and Python code then
takes three times as long as in a loop of its own. `HOST` is the one in use, chosen on import.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from specserve_kernels.host import interface, reference
from specserve_kernels.host.interface import TreeFields, TreeView
from specserve_kernels.setting import kernels_setting


class HostCode(Protocol):
    """What `reference` and `_compiled` contain. The meaning of a number that a caller has to choose
    is explained where it is chosen."""

    def Calibration(
        self, *, max_depth: int, prior_ratio: float, prior_weight: float, memory: float
    ) -> interface.Calibration:
        """An `interface.Calibration` without observations."""
        ...

    def SuffixSearch(
        self,
        sizes: Sequence[int],
        *,
        max_matches: int,
        max_matched: int,
        weight_base: float,
        pseudo_count: float,
        min_probability: float,
    ) -> interface.SuffixSearch:
        """An `interface.SuffixSearch` for n-grams of these lengths, in descending order."""
        ...

    def TokenLog(self, sizes: Sequence[int], /) -> interface.TokenLog:
        """An empty `interface.TokenLog` that indexes n-grams of these lengths."""
        ...

    def TopKTable(
        self,
        rows: npt.NDArray[np.uint8],
        *,
        token_bytes: int,
        probs: Sequence[float],
        steps_per_octave: float,
        learning_rate: Sequence[float],
        weight: Sequence[float],
    ) -> interface.TopKTable:
        """An `interface.TopKTable` that keeps its rows in the memory of `rows`.

        rows: the bytes of a power of two of rows of `interface.row_dtype(token_bytes)`. probs:
        [256], the probability 2 ** (-s / steps_per_octave) that each stored byte s stands for.
        learning_rate, weight: [ORDERS], for contexts of 1, 2, ... tokens.
        """
        ...

    def best_logits(
        self, best: npt.NDArray[np.int64], logits: npt.NDArray[np.float32], width: int, /
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """The first `width` of each row's best tokens, and their logits, both [rows, width].

        best: [rows, at least width]. logits: [rows, vocab_size]. For a token of -1 the logit of
        token 0 is returned.
        """
        ...

    def build_tree(
        self,
        tokens: Sequence[int],
        parents: Sequence[int],
        path_probs: Sequence[float],
        drafter_id: int,
        /,
    ) -> TreeFields:
        """See `specserve.tree.build_tree`."""
        ...

    def select_nodes(
        self, trees: Sequence[TreeView], seconds: Sequence[float], /
    ) -> list[TreeFields | None]:
        """Prune the trees to the nodes worth verifying; None stands for a whole tree.

        Of all drafted nodes, by descending path probability, the number is kept that maximises
        (roots + sum of path probabilities) / seconds[number].
        """
        ...

    def validate(self, tree: TreeView, vocab_size: int, max_nodes: int, /) -> None:
        """See `specserve.tree.DraftTree.validate`."""
        ...


def _load_compiled() -> HostCode | None:
    try:
        module: Any = import_module("specserve_kernels.host._compiled")
    except ImportError:
        return None
    compiled: HostCode = module
    return compiled


COMPILED: Final = _load_compiled()  # None: it was not built at install time
HOST: Final[HostCode] = reference if COMPILED is None or kernels_setting() == "torch" else COMPILED
