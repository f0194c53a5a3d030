"""The target as a head's teacher: auxiliary hidden states of whole texts, and token probabilities.

It has a copy of the target's weights beside the engine's: the engine generates answers, this one
runs forward passes over the finished texts. On a CPU such a pass takes as long as a training step,
so the hidden states of the latest texts stay in memory, including those that the engine computed
while it answered; a GPU has memory for more. They are not written to disk: for SmolLM2-135M they
take 7 KB a token.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from specserve.batch import SegmentRows, build_batch, prefill_segments
from specserve.cache.storage import KVStorage
from specserve.cache.table import BlockTable
from specserve.engine.device import Platform
from specserve.models.loader import load_model
from specserve.models.memory import free_memory
from specserve.types import Quantization
from specserve_drafts.tune.texts import Ids, Text

_BLOCK: Final = 16  # tokens of a KV block
# KV slots of one forward pass; more if a single text needs more.
_PASS_ROWS: Final = {"cpu": 1024, "cuda": 16384}
# Rows whose logits over the whole vocabulary exist at once; on a CPU so few that they stay in its
# cache.
_LOGIT_ROWS: Final = {"cpu": 32, "cuda": 2048}
_KEPT_BYTES: Final = 2**29  # bytes of hidden states kept in memory on a CPU
_KEPT_SHARE: Final = 0.5  # fraction of the free GPU memory for the same


@dataclass(frozen=True, slots=True)
class Lesson:
    """The target's hidden states for some texts: N draft inputs, M answer tokens (`ChainBatch`)."""

    aux_hidden_states: Tensor  # [N, num_aux_layers * hidden_size] float32
    # [M, hidden_size], output of the last layer at the positions that predict the answer tokens.
    last: Tensor


class Teacher:
    """aux_layers: the layers whose input hidden states the head reads, in the head's order.
    max_len: the longest text in tokens."""

    def __init__(
        self,
        target: Path,
        platform: Platform,
        quantization: Quantization,
        aux_layers: tuple[int, ...],
        max_len: int,
    ) -> None:
        self.model = load_model(
            target,
            kernels=platform.kernels,
            dtype=platform.dtype,
            device=platform.device,
            exact=platform.exact,
            quantization=quantization,
            packed_kv_dtype=platform.packed_kv_dtype,
        )
        self.device = platform.device
        shape = self.model.shape
        # The layers whose hidden states are kept: `aux_layers`, and the output of the last layer.
        self.layers = tuple(sorted({*aux_layers, shape.num_layers}))
        places = [self.layers.index(layer) for layer in aux_layers]
        self._places = torch.tensor(places, device=self.device)
        num_slots = max(_PASS_ROWS[self.device.type], max_len + _BLOCK)
        self._storage = KVStorage(self.model.kv_spec, num_slots, self.device)
        self._kept: dict[bytes, Tensor] = {}  # by `_key`, the oldest first
        self._num_kept_bytes, self._most_kept_bytes = 0, _KEPT_BYTES
        if self.device.type == "cuda":
            self._most_kept_bytes = int(_KEPT_SHARE * free_memory(self.device))

    def embed(self, ids: Tensor) -> Tensor:
        """The target's embeddings, [n] int64 -> [n, hidden_size] float32, usable with autograd."""
        return self.model.embed(ids).float().clone()

    def normed(self, last: Tensor) -> Tensor:
        """`Lesson.last` [M, hidden_size] after the target's final norm: float32 of the same shape,
        usable with autograd."""
        return self.model.final_norm(last).float().clone()

    def read(self, texts: Sequence[Text]) -> Lesson:
        """The hidden states of `texts`, from memory or by forward passes."""
        rows = {key: self._kept[key] for key in map(_key, texts) if key in self._kept}
        unread = [text for text in texts if _key(text) not in rows]
        for part in _passes(unread, _PASS_ROWS[self.device.type]):
            lengths = [len(text.tokens) for text in part]
            read = self._pass(part)[: sum(lengths)]
            for text, own in zip(part, torch.split(read, lengths), strict=True):
                rows[_key(text)] = own[:-1]
                self.keep(text.tokens[:-1], own[:-1])
        layers = (-1, len(self.layers), self.model.shape.hidden_size)
        pairs = [(text, rows[_key(text)].view(layers)) for text in texts]
        states = [own[: text.num_draft_inputs, self._places].flatten(1) for text, own in pairs]
        last = [own[text.num_prompt - 1 :, -1] for text, own in pairs]
        return Lesson(torch.cat(states).float(), torch.cat(last))

    def keep(self, tokens: Ids, rows: Tensor) -> None:
        """Keep hidden states in memory; the oldest ones are dropped beyond the limit.

        tokens: a text without its last token. rows: [len(tokens), len(layers) * hidden_size], the
        hidden states of `layers`.
        """
        key = tokens.tobytes()
        if key not in self._kept and rows.nbytes <= self._most_kept_bytes:
            self._kept[key] = rows.clone()
            self._num_kept_bytes += rows.nbytes
        while self._num_kept_bytes > self._most_kept_bytes:
            self._num_kept_bytes -= self._kept.pop(next(iter(self._kept))).nbytes

    def likely(self, last: Tensor, token_ids: Tensor | None) -> Tensor:
        """`Lesson.last` [M, hidden_size] -> [M, draft_vocab] float32, the target's probabilities of
        `token_ids`, or of all tokens."""
        parts = []
        for rows in torch.split(last, _LOGIT_ROWS[last.device.type]):
            p = self.model.logits(rows).softmax(-1)
            parts.append(p if token_ids is None else p.index_select(1, token_ids))
        return torch.cat(parts)

    def _pass(self, texts: Sequence[Text]) -> Tensor:
        """The hidden states of `layers` [num_rows, len(layers) * hidden_size] in one forward pass,
        one text after the other; rows past the texts are padding."""
        segments: list[SegmentRows] = []
        first = 0
        for text in texts:
            num_blocks = _num_slots(text) // _BLOCK
            table = BlockTable(_BLOCK, list(range(first, first + num_blocks)))
            first += num_blocks
            segments += prefill_segments(table, 0, text.tokens.tolist())
        batch = build_batch(segments, _BLOCK, self.model.row_multiple, self.device)
        out = self.model(batch, self._storage, aux_layers=self.layers)
        assert out.aux_hidden_states is not None
        return out.aux_hidden_states


def _passes(texts: Sequence[Text], most_slots: int) -> Iterator[list[Text]]:
    """Texts in groups that need `most_slots` KV slots at most, or one text that needs more."""
    part: list[Text] = []
    for text in texts:
        if part and sum(map(_num_slots, part)) + _num_slots(text) > most_slots:
            yield part
            part = []
        part.append(text)
    if part:
        yield part


def _key(text: Text) -> bytes:
    """The text's tokens but the last, as the hidden state of the last one is never used."""
    return text.tokens[:-1].tobytes()


def _num_slots(text: Text) -> int:
    return -(-len(text.tokens) // _BLOCK) * _BLOCK
