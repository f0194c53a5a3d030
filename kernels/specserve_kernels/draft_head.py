"""A draft head over the target's layers (EAGLE-3, Li et al. 2025) with packed weights, as kernels.

Owns what such kernels take and give; `torch_ref.draft_head` defines what they compute, and
`specserve_drafts.growth` how a tree grows. Knows no checkpoint and no sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from torch import Tensor

from specserve_kernels.decoder import DecoderPass, DecoderWeights, PackedLinear

MAX_BRANCHING: Final = 64


@dataclass(frozen=True, slots=True)
class DraftHeadWeights:
    """A head, ready to run."""

    decoder: DecoderWeights  # with a `row_norm`
    fc: PackedLinear  # from taps to rows
    tap_norms: Sequence[Tensor]  # none, one over all taps, or one for each; float32
    norm_output: bool  # what is gone on from is normed
    logit_scale: float
    token_ids: Tensor  # [draft_vocab_size] int64, ascending is quickest


@dataclass(frozen=True, slots=True)
class GrowShape:
    branching: int  # candidates kept per node, at most MAX_BRANCHING
    beam: int  # nodes of a tree looked at per pass
    max_depth: int
    min_score: float  # nodes whose path is less likely are not looked at


@dataclass(frozen=True, slots=True)
class Drawing:
    """How the target draws, for candidates to be ranked by its own noise."""

    temperature: float = 0.0  # 0: by probability alone
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Growing:
    """One tree to grow. Pairs that wait are written to the cache, and the nodes looked at."""

    lane: Tensor  # int32: slots of all pairs before the root, then of the nodes, then anything
    num_context: int  # pairs before the root, the waiting ones the last of them
    waiting: Sequence[int]  # tokens of pairs that are not in the cache yet
    taps: Tensor  # [num_waiting + 1, inputs of fc] float32: of those pairs, and of the root's
    root: int
    position: int  # of the root's pair, for RoPE
    budget: int  # nodes, the root included
    drawing: Drawing
    draw_position: int  # of the root's successors, for the noise


@dataclass(frozen=True, slots=True)
class Grown:
    """A tree, parents before children; candidates of the same parent are different tokens."""

    tokens: list[int]
    parents: list[int]  # -1: the root's
    scores: list[float]  # probabilities of paths
    num_passes: int  # in which nodes of it were looked at


class PackedDraftHead(Protocol):
    """One head on one backend."""

    def fuse(self, taps: Tensor) -> Tensor:
        """[n, inputs of fc] float32 -> rows [n, hidden_size] float32"""
        ...

    def __call__(self, batch: DecoderPass) -> Tensor:
        """Rows [num_rows, hidden_size] to go on from; writes K and V. `batch` has rows, and wants
        no logits: see `logits`."""
        ...

    def take_in(self, batch: DecoderPass) -> None:
        """K and V alone, of rows that nothing goes on from."""
        ...

    def logits(self, rows: Tensor) -> Tensor:
        """[n, hidden_size] -> [n, draft_vocab_size] float32, of the token after each pair."""
        ...

    def grow(self, shape: GrowShape, kv: Tensor, trees: Sequence[Growing]) -> list[Grown]:
        """Trees as `specserve_drafts.growth` grows them, several side by side."""
        ...
