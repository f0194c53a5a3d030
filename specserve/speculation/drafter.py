"""The interface of a drafter. A drafter knows nothing of the engine.

The engine calls `propose` before a forward pass, `observe` after it, and `forget` when a request
leaves. A new drafter is one file with its own Options, and one line in the registry.

A drafter gets views and copies of the engine's state: changing them raises an error, or has no
effect on the engine. Tensors cannot be protected, so the engine no longer uses those of a
`Feedback` when drafters get it. It does use the weights that a `DraftContext` lends: a drafter must
not write to those.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Protocol

import torch
from msgspec import Struct
from torch import Tensor

from specserve.batch import ModelOutput
from specserve.cache.storage import KVSpec, KVStorage
from specserve.sampling import Sampler, SamplingState
from specserve.sequence import SequenceView
from specserve.step import EntryView, StepPlan, VerifyResult
from specserve.tree import DraftTree
from specserve.types import Quantization
from specserve_kernels.ops import Kernels
from specserve_kernels.quantized_weight import QuantizedWeight


class DraftError(ValueError):
    """A draft that does not fit its target; the message says why and what to use instead."""


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What the engine lends a drafter, once."""

    device: torch.device
    dtype: torch.dtype
    kernels: Kernels  # the drafter's own, as are the next three
    exact: bool
    quantization: Quantization  # of the target, as it was asked for
    vocab_size: int
    block_size: int
    sampler: Sampler  # draws as the target's
    sampling_state: Callable[[SequenceView], SamplingState]  # with every emitted token counted
    storage: KVStorage | None  # as `kv_spec` asked, indexed by the target's block tables
    drafter_id: int  # of its nodes
    # The layers of `ModelOutput.aux_hidden_states`: what all drafters want, ascending.
    aux_layers: tuple[int, ...]
    cost_aware: bool  # False: every proposed node is verified, whatever time it takes
    # Of a step without drafts, and of a node more; None: not measured.
    step_seconds: Callable[[], tuple[float, float] | None]
    # Of the target; rows of `hidden_size` in the dtype of its activations.
    quantized_embedding: QuantizedWeight | None  # see `Model.quantized_embedding`
    embed: Callable[[Tensor], Tensor]  # [n] int64 -> [n, hidden_size]
    final_norm: Callable[[Tensor], Tensor]  # [n, hidden_size] -> the same
    unembed: Callable[[Tensor], Tensor]  # normed [n, hidden_size] -> [n, vocab_size] float32


@dataclass(frozen=True, slots=True)
class Feedback:
    """The result of one forward pass. Entries without a tree are prompt chunks."""

    entries: Sequence[EntryView]
    trees: Mapping[str, DraftTree]  # by sequence id
    results: Mapping[str, VerifyResult]  # by sequence id
    output: ModelOutput  # rows as `plan_segments` has them

    @classmethod
    def of_step(
        cls,
        plan: StepPlan,
        trees: dict[str, DraftTree],
        results: dict[str, VerifyResult],
        output: ModelOutput,
    ) -> "Feedback":
        """Read-only views of a verified step."""
        entries = [EntryView(SequenceView(e.seq), e.num_prefill, e.num_nodes) for e in plan.entries]
        return cls(tuple(entries), MappingProxyType(trees), MappingProxyType(results), output)

    def only(self, seq_ids: Collection[str]) -> "Feedback":
        """The same for some of the sequences."""
        if len(seq_ids) == len(self.entries):
            return self
        seq_ids = set(seq_ids)
        kept: list[EntryView] = []
        rows: list[int] = []
        logit_rows: list[int] = []
        first = first_logits = 0
        for entry in self.entries:
            num_nodes = len(self.trees[entry.seq.id]) if entry.num_nodes else 0
            num_rows = entry.num_prefill + num_nodes
            if entry.seq.id in seq_ids:
                kept.append(entry)
                rows += range(first, first + num_rows)
                logit_rows += range(first_logits, first_logits + num_nodes)
            first, first_logits = first + num_rows, first_logits + num_nodes
        out, device = self.output, self.output.logits.device
        at_rows = torch.tensor(rows, dtype=torch.int64, device=device)
        at_logits = torch.tensor(logit_rows, dtype=torch.int64, device=device)
        output = ModelOutput(
            out.logits[at_logits],
            None if out.topk is None else out.topk[at_logits],
            None if out.aux_hidden_states is None else out.aux_hidden_states[at_rows],
        )
        results = {seq_id: v for seq_id, v in self.results.items() if seq_id in seq_ids}
        return replace(self, entries=tuple(kept), results=results, output=output)


class DraftOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """No options; drafters extend it with their own."""


class Drafter(Protocol):
    """A call that raises is made again for one sequence at a time, and a drafter that raises there
    too is left out of that request. What it began in the first attempt must not count."""

    Options: ClassVar[type[DraftOptions]]
    aux_layers: tuple[int, ...]  # target layers whose hidden states it wants, see `Model`
    needs_topk: int  # top successors per row it wants from the LM head; 0: none

    def __init__(self, options: DraftOptions, path: Path | None, target: Path) -> None:
        """`path` is the draft checkpoint, `target` the target's directory. Raises DraftError."""
        ...

    def kv_spec(self, dtype: torch.dtype) -> KVSpec | None:
        """KV it wants beside the target's, kept in `dtype`."""
        ...

    def bind(self, context: DraftContext) -> None: ...

    def propose(self, seqs: Sequence[SequenceView], budgets: Sequence[int]) -> list[DraftTree]:
        """One tree per sequence, at most `budgets[i]` nodes with the root.

        KV slots up to num_tokens - 1 + budget - 1 are reserved. The root is the last token.
        """
        ...

    def observe(self, feedback: Feedback) -> None:
        """After every pass, prompt chunks included.

        What was emitted is in the results; the sequences' tokens still end with the root.
        """
        ...

    def forget(self, seq_id: str) -> None:
        """Finished, aborted or preempted: drop everything kept for it."""
        ...
