"""The drafter interface, all of it. A drafter knows nothing of the engine.

`propose` before a pass, `observe` after it, `forget` when a request leaves. A new method is one
file, one line in the registry, and its own Options.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch
from msgspec import Struct
from torch import Tensor

from specserve.batch import ModelOutput
from specserve.cache.storage import KVSpec, KVStorage
from specserve.sampling import Sampler, SamplingState
from specserve.sequence import Sequence
from specserve.step import Entry, Verdict
from specserve.tree import DraftTree
from specserve.types import Quantization
from specserve_kernels.ops import Kernels
from specserve_kernels.packing import PackedWeight


class DraftError(ValueError):
    """A draft that does not fit its target; the message says why and what to use instead."""


@dataclass(frozen=True, slots=True)
class DraftContext:
    """What the engine lends a drafter, once."""

    device: torch.device
    dtype: torch.dtype
    kernels: Kernels
    exact: bool
    quantization: Quantization  # of the target, as it was asked for
    vocab_size: int
    block_size: int
    sampler: Sampler  # the target's own
    sampling_state: Callable[[Sequence], SamplingState]
    storage: KVStorage | None  # as `kv_spec` asked, indexed by the target's block tables
    source: int  # the number under which its nodes are counted
    taps: tuple[int, ...]  # the layers in `ModelOutput.taps`: what all drafters want, ascending
    priced: bool  # False: time does not count, every node is verified
    # Of a step without drafts, and of a node more; None: not measured.
    step_seconds: Callable[[], tuple[float, float] | None]
    # Of the target; rows of `hidden_size` in the dtype of its activations.
    packed_embedding: PackedWeight | None  # where its weights are packed
    embed: Callable[[Tensor], Tensor]  # [n] int64 -> [n, hidden_size]
    final_norm: Callable[[Tensor], Tensor]  # [n, hidden_size] -> the same
    unembed: Callable[[Tensor], Tensor]  # normed [n, hidden_size] -> [n, vocab_size] float32


@dataclass(frozen=True, slots=True)
class Feedback:
    """What one pass settled. Entries without a tree are prompt chunks."""

    entries: Seq[Entry]
    trees: dict[str, DraftTree]  # by sequence id
    verdicts: dict[str, Verdict]  # by sequence id
    output: ModelOutput


class DraftOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """No options; drafters extend it with their own."""


class Drafter(Protocol):
    Options: ClassVar[type[DraftOptions]]
    needs_taps: tuple[int, ...]  # target layers whose hidden states it wants, see `Model`
    needs_topk: int  # top successors per row it wants from the LM head; 0: none

    def __init__(self, options: DraftOptions, path: Path | None, target: Path) -> None:
        """`path` is the draft checkpoint, `target` the target's directory. Raises DraftError."""
        ...

    def kv_spec(self, dtype: torch.dtype) -> KVSpec | None:
        """KV it wants beside the target's, kept in `dtype`."""
        ...

    def bind(self, context: DraftContext) -> None: ...

    def propose(self, seqs: Seq[Sequence], budgets: Seq[int]) -> list[DraftTree]:
        """One tree per sequence, at most `budgets[i]` nodes with the root.

        KV slots up to num_tokens - 1 + budget - 1 are reserved. The root is the last token.
        """
        ...

    def observe(self, feedback: Feedback) -> None:
        """After every pass, prompt chunks included.

        What was emitted is in the verdicts; the sequences' tokens still end with the root.
        """
        ...

    def forget(self, seq_id: str) -> None:
        """Finished, aborted or preempted: drop everything kept for it."""
        ...
