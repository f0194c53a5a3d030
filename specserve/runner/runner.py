"""Runs forward passes of the target. No other module of the engine does, or touches its KV."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from specserve.batch import ModelOutput, build_batch, joined, plan_segments
from specserve.cache.storage import KVStorage
from specserve.models.model import Model
from specserve.step import Entry
from specserve.tree import DraftTree
from specserve_kernels.ops import Kernels

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class Runner:
    model: Model
    storage: KVStorage
    block_size: int
    device: torch.device
    kernels: Kernels
    num_top: int = 1  # top tokens wanted per logits row, see `Model`
    aux_layers: tuple[int, ...] = ()  # layers whose hidden states are wanted, see `Model`

    def forward(self, entries: Sequence[Entry], trees: dict[str, DraftTree]) -> ModelOutput:
        """Run the prompt chunks and the trees (by sequence id) of `entries` in one forward pass.

        Returns one logits row per tree node, in entry order, one row of auxiliary hidden states per
        token of the pass, without padding, and the rows of prompt tokens to be scored.
        """
        rows = list(plan_segments(entries, trees))
        batch = build_batch(rows, self.block_size, self.model.row_multiple, self.device)
        scored, layers = _scored_rows(entries, trees), self.aux_layers
        last = self.model.shape.num_layers
        if scored and last not in layers:
            layers = (*layers, last)
        out = self.model(batch, self.storage, aux_layers=layers, num_top=self.num_top)
        self.storage.record_written(batch.slots)
        states, num_rows = out.aux_hidden_states, batch.segments.cu_rows[-1]
        if states is None or (not scored and len(states) == num_rows):
            return out
        if not scored:
            return replace(out, aux_hidden_states=states[:num_rows])
        by_layer = states[:num_rows].reshape(num_rows, len(layers), -1)
        kept = by_layer[:, : len(self.aux_layers)].flatten(1).contiguous()
        return replace(
            out,
            aux_hidden_states=kept if self.aux_layers else None,
            scored_states=by_layer[scored, layers.index(last)],
        )

    def move_kv(self, moves: Sequence[tuple[int, int]]) -> None:
        """Copy K and V of all layers from slot to slot; `moves` are (source, destination)."""
        if moves:
            source, destination = torch.tensor(moves, device=self.device).T.contiguous()
            self.kernels.kv_commit(self.storage.data, source, destination)

    def forward_isolated(
        self, entries: Sequence[Entry], trees: dict[str, DraftTree]
    ) -> tuple[tuple[Entry, ...], ModelOutput, dict[str, str]]:
        """Like `forward`; if the model fails, run one forward pass per entry.

        Returns the entries that could be run, their output, and an error message per sequence id
        for those that failed again.
        """
        try:
            return tuple(entries), self.forward(entries, trees), {}
        except Exception:
            logger.exception("a forward pass over %d requests failed; isolating", len(entries))
        survivors: list[Entry] = []
        errors: dict[str, str] = {}
        outputs = [ModelOutput(torch.empty(0, self.model.shape.vocab_size, device=self.device))]
        for entry in entries:
            try:
                outputs.append(self.forward([entry], trees))
                survivors.append(entry)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                errors[entry.seq.id] = f"the model failed on this request: {reason}"
        return tuple(survivors), joined(outputs), errors


def _scored_rows(entries: Sequence[Entry], trees: dict[str, DraftTree]) -> list[int]:
    """The rows of a forward pass that `Entry.scored_rows` of its entries name."""
    if not any(entry.seq.is_scored for entry in entries):
        return []
    scored: list[int] = []
    first = 0
    for entry in entries:
        scored += [first + row for row in entry.scored_rows]
        first += entry.num_prefill + (len(trees[entry.seq.id]) if entry.num_nodes else 0)
    return scored
