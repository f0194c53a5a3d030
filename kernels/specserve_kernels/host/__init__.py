"""Host code of drafting, which knows draft trees: it expands, calibrates, merges and prunes them.

`reference` defines it in Python, and `_compiled` (C++ in `csrc/`) gives the same bits. It exists
because a forward pass leaves no code and data of the host in the CPU caches, and Python code then
takes three times as long as in a loop of its own. `HOST` is the one in use, chosen on import. The
meaning of a number that a caller has to choose is explained where it is chosen.
"""

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt

from specserve_kernels.host import reference
from specserve_kernels.host.interface import TreeFields, TreeView
from specserve_kernels.setting import kernels_setting


class HostCode(Protocol):
    """What `reference`, which describes it, and `_compiled` contain."""

    Calibration: type[reference.Calibration]
    SuffixSearch: type[reference.SuffixSearch]
    TokenLog: type[reference.TokenLog]
    TopKTable: type[reference.TopKTable]
    best_logits: Callable[
        [npt.NDArray[np.int64], npt.NDArray[np.float32], int],
        tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]],
    ]
    build_tree: Callable[[Sequence[int], Sequence[int], Sequence[float], int], TreeFields]
    select_nodes: Callable[[Sequence[TreeView], Sequence[float]], list[TreeFields | None]]
    validate: Callable[[TreeView, int, int], None]


def _load_compiled() -> HostCode | None:
    try:
        module: Any = import_module("specserve_kernels.host._compiled")
    except ImportError:
        return None
    compiled: HostCode = module
    return compiled


COMPILED: Final = _load_compiled()  # None: it was not built at install time
HOST: Final[HostCode] = reference if COMPILED is None or kernels_setting() == "torch" else COMPILED
