"""Kernels of a draft head with quantized weights (EAGLE-3, Li et al. 2025).

Defines their inputs and outputs; `torch_ref.draft_head` defines what they compute, and
`specserve_drafts.expansion` how trees are expanded. Knows no checkpoint and no sequences. The draft
input of a token is the token and a hidden state [hidden_size] of the token before it: that of the
target, fused from its auxiliary hidden states (`fuse`), or the head's own output if the target has
not computed that token yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from torch import Tensor

from specserve_kernels.decoder import DecoderPass, DecoderWeights, PackedLinear

MAX_BRANCHING: Final = 64  # largest `ExpansionLimits.branching`


@dataclass(frozen=True, slots=True)
class DraftHeadWeights:
    """The weights of one draft head."""

    decoder: DecoderWeights  # `hidden_norm` is set
    fc: PackedLinear  # auxiliary hidden states -> fused hidden states
    aux_norms: Sequence[Tensor]  # empty, one norm for all states, or one for each; float32
    norm_output: bool  # the output, from which expansion continues, is normalized
    logit_scale: float
    token_ids: Tensor  # [draft_vocab_size] int64 target ids; ascending is fastest


@dataclass(frozen=True, slots=True)
class ExpansionLimits:
    """Limits of tree expansion."""

    branching: int  # candidates kept per expanded node, at most MAX_BRANCHING
    beam: int  # nodes of a tree expanded per forward pass
    max_depth: int  # only nodes of a smaller depth are expanded; the root has 0
    min_probability: float  # nodes with a lower path probability are not expanded


@dataclass(frozen=True, slots=True)
class DraftSampling:
    """The sampling parameters that the kernel applies when it ranks candidates.

    It uses the target's own noise. A filter of the target that is missing here costs acceptance,
    but never changes the output.
    """

    temperature: float = 0.0  # 0: ranked by probability, without noise
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class ExpansionTask:
    """One tree to expand. K and V of pending draft inputs and of expanded nodes are written."""

    slot_list: Tensor  # int32: slots of draft inputs before the root, of tree nodes, unused
    num_context: int  # draft inputs before the root; the pending ones are the last of them
    pending_tokens: Sequence[int]  # of draft inputs whose K and V are not cached yet
    # [num_pending + 1, inputs of fc] float32, of the pending draft inputs, then of the root's.
    aux_hidden_states: Tensor
    root: int  # token id
    position: int  # RoPE position of the root's draft input
    budget: int  # nodes, the root included
    sampling: DraftSampling
    noise_position: int  # noise position of the root's successors


@dataclass(frozen=True, slots=True)
class ExpandedTree:
    """An expanded tree, parents before children; siblings have different tokens."""

    tokens: list[int]
    parents: list[int]  # -1 for the root
    path_probs: list[float]
    num_passes: int  # forward passes in which nodes of this tree were expanded


class QuantizedDraftHead(Protocol):
    """A draft head on one backend."""

    def fuse(self, aux_hidden_states: Tensor) -> Tensor:
        """[n, inputs of fc] -> fused hidden states [n, hidden_size], both float32."""
        ...

    def __call__(self, batch: DecoderPass) -> Tensor:
        """One forward pass: writes K and V and returns hidden states [num_rows, hidden_size].

        `batch.hidden_in` is set and `batch.logit_rows` is empty; see `logits`.
        """
        ...

    def write_kv(self, batch: DecoderPass) -> None:
        """A forward pass that only writes K and V; its output is not needed."""
        ...

    def logits(self, hidden_states: Tensor) -> Tensor:
        """Outputs of a pass [n, hidden_size] -> next-token logits [n, draft_vocab_size] float32."""
        ...

    def expand(
        self, limits: ExpansionLimits, kv: Tensor, tasks: Sequence[ExpansionTask]
    ) -> list[ExpandedTree]:
        """Expand several trees together, by the rule of `specserve_drafts.expansion`."""
        ...
