"""Runs one forward pass of the target for the entries of a step.

No other module of the engine runs the target model.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from specserve.batch import ModelOutput, build_batch, plan_segments
from specserve.cache.storage import KVStorage
from specserve.models.model import Model
from specserve.step import Entry
from specserve.tree import DraftTree


class Runner:
    def __init__(
        self,
        model: Model,
        storage: KVStorage,
        block_size: int,
        device: torch.device,
        num_top: int = 1,
        aux_layers: tuple[int, ...] = (),
    ) -> None:
        self._model = model
        self._storage = storage
        self._block_size = block_size
        self._device = device
        self._num_top = num_top  # top tokens wanted per logits row, see `Model`
        self.aux_layers = aux_layers  # layers whose hidden states are wanted, see `Model`

    def forward(self, entries: Sequence[Entry], trees: dict[str, DraftTree]) -> ModelOutput:
        """Run the prompt chunks and the trees (by sequence id) of `entries` in one forward pass.

        Returns one logits row per tree node, in entry order, and one row of auxiliary hidden
        states per token of the pass, without padding.
        """
        rows = list(plan_segments(entries, trees))
        batch = build_batch(rows, self._block_size, self._model.row_multiple, self._device)
        out = self._model(batch, self._storage, aux_layers=self.aux_layers, num_top=self._num_top)
        num_rows = batch.segments.cu_rows[-1]
        if out.aux_hidden_states is None or len(out.aux_hidden_states) == num_rows:
            return out
        return replace(out, aux_hidden_states=out.aux_hidden_states[:num_rows])
