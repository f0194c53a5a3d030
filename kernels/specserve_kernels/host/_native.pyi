"""Trees: objects with the arrays of `specserve.tree.DraftTree`; they come back as its fields."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Fields = tuple[
    npt.NDArray[np.int32], npt.NDArray[np.int16], npt.NDArray[np.float32], npt.NDArray[np.uint8]
]

class Calibration:
    def __init__(
        self, *, max_depth: int, prior_ratio: float, prior_weight: float, memory: float
    ) -> None: ...
    def merged(self, sampled: bool, trees: Sequence[Any], max_nodes: int, /) -> Fields: ...
    def record_outcome(
        self, sampled: bool, trees: Sequence[Any], emitted: Sequence[int], /
    ) -> None: ...

class TopKTable:
    def __init__(
        self,
        rows: npt.NDArray[np.uint8],
        *,
        token_bytes: int,
        probs: Sequence[float],
        steps_per_octave: float,
        learning_rate: Sequence[float],
        weight: Sequence[float],
    ) -> None: ...
    def grow(
        self,
        salts: Sequence[int],
        context: Sequence[int],
        max_nodes: int,
        min_probability: float,
        drafter_id: int,
        own: TopKTable | None,
        /,
    ) -> Fields: ...
    def learn_text(self, tokens: Sequence[int], /) -> None: ...
    def learn(
        self,
        salt: int,
        before: Sequence[int],
        tree: Any,
        best: npt.NDArray[np.int64],
        logits: npt.NDArray[np.float32],
        /,
    ) -> None: ...

def best_logits(
    best: npt.NDArray[np.int64], logits: npt.NDArray[np.float32], width: int, /
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]: ...
def build_tree(
    tokens: Sequence[int], parents: Sequence[int], path_probs: Sequence[float], drafter_id: int, /
) -> Fields: ...
def select_nodes(trees: Sequence[Any], seconds: Sequence[float], /) -> list[Fields | None]: ...
def validate(tree: Any, vocab_size: int, max_nodes: int, /) -> None: ...

class TokenLog:
    def __init__(self, sizes: Sequence[int], /) -> None: ...
    def __len__(self) -> int: ...
    def extend(self, tokens: Sequence[int], /) -> None: ...

class SuffixSearch:
    def __init__(
        self,
        sizes: Sequence[int],
        *,
        max_matches: int,
        enough: int,
        longer: float,
        doubt: float,
        min_probability: float,
    ) -> None: ...
    def tree(
        self,
        logs: Sequence[TokenLog],
        recent: Sequence[int],
        max_nodes: int,
        drafter_id: int,
        /,
    ) -> Fields: ...
