"""The interface of a drafter. A drafter knows nothing of the engine.

drafts/README.md says how to write one. A drafter gets views and copies of the engine's state:
changing them raises an error, or has no effect on the engine. Tensors cannot be protected, so the
engine no longer uses those of a `Feedback` when drafters get it. But a drafter must not write to
the weights that a `DraftContext` lends.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, ClassVar, NamedTuple, Protocol

import torch
from msgspec import Meta, Struct
from torch import Tensor

from specserve.batch import ModelOutput
from specserve.cache.storage import KVSpec, KVStorage
from specserve.models.model import Model
from specserve.sampling import Sampler, SamplingState
from specserve.sequence import SequenceView
from specserve.step import StepPlan, VerifyResult
from specserve.tree import MAX_NODES, DraftTree, root_tree
from specserve_kernels.ops import Kernels
from specserve_kernels.packed_weight import PackedWeight


class DraftError(ValueError):
    """A draft that does not fit its target; the message says why and what to use instead."""


@dataclass(frozen=True, slots=True)
class TargetLayers:
    """The layers of the target that drafters may run, see `Model`."""

    embed: Callable[[Tensor], Tensor]  # [n] int64 -> [n, hidden_size]
    final_norm: Callable[[Tensor], Tensor]  # [n, hidden_size] -> the same
    unembed: Callable[[Tensor], Tensor]  # normed [n, hidden_size] -> [n, vocab_size] float32
    packed_embedding: PackedWeight | None


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What the engine lends a drafter, once. Kernels, sampler and storage are the drafter's own."""

    device: torch.device
    kernels: Kernels
    vocab_size: int  # of the target
    block_size: int  # of the block tables
    sampler: Sampler  # draws as the target's
    sampling_state: Callable[[SequenceView], SamplingState]  # with every emitted token counted
    storage: KVStorage | None  # as `kv_spec` asked, indexed by the target's block tables
    target: TargetLayers
    load_model: Callable[[Path], Model]  # a draft model from its directory; settings as the target
    # Seconds of a step without drafts and of one node more, or None until they are measured; None
    # instead of the function: every node is verified, whatever time it takes.
    step_seconds: Callable[[], tuple[float, float] | None] | None


class Committed(NamedTuple):
    """The tokens of one sequence whose target KV a forward pass made valid.

    Token i of `tokens` is token `start + i` of the sequence; row `rows[i]` has its hidden states.
    """

    start: int
    tokens: Sequence[int]
    rows: Sequence[int]  # ascending; for `Feedback.hidden_states`


class _Rows(NamedTuple):
    """The rows of one sequence in a forward pass: its prefill chunk, then its tree."""

    start: int  # position of its first token
    num_prefill: int
    first: int  # its first row
    nodes: slice  # the logit rows of its tree


@dataclass(frozen=True, slots=True)
class Feedback:
    """The result of one forward pass, for the sequences `seqs`.

    A sequence without a result was not verified: the pass computed a part of its prompt.
    """

    seqs: tuple[SequenceView, ...]
    trees: Mapping[str, DraftTree]  # by sequence id
    results: Mapping[str, VerifyResult]  # by sequence id
    output: ModelOutput  # may have rows of other sequences too, see `node_rows`
    aux_layers: tuple[int, ...]  # layers of `output.aux_hidden_states`
    _rows: Mapping[str, _Rows]  # by sequence id

    @classmethod
    def of_step(
        cls,
        plan: StepPlan,
        trees: dict[str, DraftTree],
        results: dict[str, VerifyResult],
        output: ModelOutput,
        aux_layers: tuple[int, ...] = (),
    ) -> "Feedback":
        """Read-only views of a verified step whose KV is committed; rows as in `plan_segments`."""
        rows: dict[str, _Rows] = {}
        first = first_node = 0
        for entry in plan.entries:
            seq = entry.seq
            num_nodes = len(trees[seq.id]) if entry.num_nodes else 0
            end = seq.num_tokens - 1 if entry.num_nodes else seq.num_committed
            nodes = slice(first_node, first_node + num_nodes)
            rows[seq.id] = _Rows(end - entry.num_prefill, entry.num_prefill, first, nodes)
            first, first_node = first + entry.num_prefill + num_nodes, nodes.stop
        seqs = tuple([SequenceView(entry.seq) for entry in plan.entries])
        views = MappingProxyType(trees), MappingProxyType(results)
        return cls(seqs, *views, output, aux_layers, MappingProxyType(rows))

    def committed(self, seq: SequenceView) -> Committed:
        """The tokens of the prefill chunk, then the root and the accepted nodes of the tree."""
        start, num_prefill, first, _ = self._rows[seq.id]
        root = first + num_prefill
        if (result := self.results.get(seq.id)) is None:
            return Committed(start, seq.tokens[start : start + num_prefill], range(first, root))
        path = result.path
        tokens = [*seq.tokens[start:], *result.emitted[: len(path) - 1]]
        if path[-1] == len(path) - 1:  # the usual case
            return Committed(start, tokens, range(first, root + len(path)))
        return Committed(start, tokens, [*range(first, root), *(root + node for node in path)])

    def hidden_states(self, layers: Sequence[int], rows: Sequence[int]) -> Tensor | None:
        """Auxiliary hidden states [len(rows), len(layers) * hidden_size], or None without any.

        `layers` are some of `aux_layers`, in the order wanted; `rows` are those of one or several
        `committed`, ascending. Consecutive rows of all `aux_layers` are a view, not a copy.
        """
        states = self.output.aux_hidden_states
        if states is None:
            return None
        size = states.shape[1] // len(self.aux_layers)
        if rows[-1] - rows[0] == len(rows) - 1:
            states = states[rows[0] : rows[-1] + 1]
        else:
            states = states[torch.tensor(rows, device=states.device)]
        if tuple(layers) == self.aux_layers:
            return states
        first_columns = [self.aux_layers.index(layer) * size for layer in layers]
        return torch.cat([states[:, first : first + size] for first in first_columns], dim=-1)

    def node_rows(self, seq: SequenceView) -> slice:
        """The rows of `output.logits` and `output.topk` for all nodes of its tree, if any."""
        return self._rows[seq.id].nodes

    def only(self, seq_ids: Collection[str]) -> "Feedback":
        """The same for some of the sequences."""
        if len(seq_ids) == len(self.seqs):
            return self
        results = {seq_id: self.results[seq_id] for seq_id in seq_ids if seq_id in self.results}
        seqs = tuple([seq for seq in self.seqs if seq.id in seq_ids])
        return replace(self, seqs=seqs, results=MappingProxyType(results))


class DraftOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """No options; drafters extend it with their own.

    Ranges are annotations such as `NodeCount`. What else has to hold is checked in `__post_init__`,
    whose ValueError begins with the option's name and a colon.
    """


NodeCount = Annotated[int, Meta(ge=1, le=MAX_NODES)]
Probability = Annotated[float, Meta(ge=0, le=1)]


class Drafter(Protocol):
    """What the engine calls: `propose` before a forward pass, `observe` after it.

    A call that raises is made again for one sequence at a time, and a drafter that raises there too
    is left out of that request. So a call may be made twice for one step: after the second, the
    drafter's state must be as if there had been one.
    """

    Options: ClassVar[type[DraftOptions]]
    aux_layers: tuple[int, ...]  # target layers whose hidden states it needs, see `Model`
    needs_topk: int  # most likely next tokens per logits row that it needs, 64 at most

    def __init__(self, options: DraftOptions, path: Path | None, target: Path) -> None:
        """`path` is the draft checkpoint, `target` the target's directory. Raises DraftError."""
        ...

    def kv_spec(self, dtype: torch.dtype) -> KVSpec | None:
        """The draft KV that it needs, in `dtype`."""
        ...

    def bind(self, context: DraftContext) -> None: ...

    def propose(self, seqs: Sequence[SequenceView], budgets: Sequence[int]) -> list[DraftTree]:
        """One tree per sequence, of at most `budgets[i]` nodes; the root is the last token.

        KV slots up to num_tokens - 1 + budget - 1 are reserved.
        """
        ...

    def observe(self, feedback: Feedback) -> None:
        """Learn from a forward pass, which may have had prompt chunks only.

        What was emitted is in the results; the sequences' tokens still end with the root.
        """
        ...

    def forget(self, seq_id: str) -> None:
        """Drop everything kept for a sequence that finished or was preempted."""
        ...


class NoModelDrafter:
    """The base of drafters without a model: a subclass defines `propose_tree` or `propose`."""

    Options: ClassVar[type[DraftOptions]] = DraftOptions
    aux_layers: tuple[int, ...] = ()
    needs_topk = 0

    def __init__(self, options: DraftOptions, path: Path | None, target: Path) -> None: ...

    def kv_spec(self, dtype: torch.dtype) -> KVSpec | None:
        return None

    def bind(self, context: DraftContext) -> None: ...

    def propose(self, seqs: Sequence[SequenceView], budgets: Sequence[int]) -> list[DraftTree]:
        return [self.propose_tree(seq, budget) for seq, budget in zip(seqs, budgets, strict=True)]

    def propose_tree(self, seq: SequenceView, budget: int) -> DraftTree:
        """The tree of one sequence, at most `budget` nodes with the root."""
        return root_tree(seq.tokens[-1])

    def observe(self, feedback: Feedback) -> None: ...

    def forget(self, seq_id: str) -> None: ...
