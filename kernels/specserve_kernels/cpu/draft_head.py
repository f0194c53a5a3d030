"""The native draft head. Defines the C structures, field by field as in draft_head.h."""

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor

from specserve_kernels.cpu.decoder import CacheView, CLinear, CpuDecoder
from specserve_kernels.cpu.native import num_threads
from specserve_kernels.decoder import DecoderPass
from specserve_kernels.draft_head import (
    MAX_BRANCHING,
    DraftHeadWeights,
    Growing,
    Grown,
    GrowShape,
)

_ADDRESS = ctypes.c_void_p
_SIZE = ctypes.c_int64
_FLOAT = ctypes.c_float
_MAX_NODES: Final = 64  # bits of an ancestor word


class _DraftHead(ctypes.Structure):
    _fields_ = [
        ("decoder", _ADDRESS),
        ("fc", CLinear),
        ("tap_norms", _ADDRESS),
        ("num_norms", _SIZE),
        ("norm_output", _SIZE),
        ("logit_scale", _FLOAT),
        ("token_ids", _ADDRESS),
        ("vocab_size", _SIZE),
    ]


class _GrowShape(ctypes.Structure):
    _fields_ = [
        ("branching", _SIZE),
        ("beam", _SIZE),
        ("max_depth", _SIZE),
        ("min_probability", ctypes.c_double),
    ]


class _Growing(ctypes.Structure):
    _fields_ = [
        ("lane", _ADDRESS),
        ("num_context", _SIZE),
        ("num_waiting", _SIZE),
        ("waiting", _ADDRESS),
        ("taps", _ADDRESS),
        ("root", _SIZE),
        ("position", _SIZE),
        ("budget", _SIZE),
        ("temperature", _FLOAT),
        ("top_p", _FLOAT),
        ("min_p", _FLOAT),
        ("top_k", _SIZE),
        ("seed", ctypes.c_uint64),
        ("draw_position", _SIZE),
        ("num_passes", _SIZE),
        ("num_nodes", _SIZE),
        ("tokens", _ADDRESS),
        ("parents", _ADDRESS),
        ("path_probs", _ADDRESS),
    ]


class _DraftCache(ctypes.Structure):
    _fields_ = [("kv", _ADDRESS), ("num_slots", _SIZE), ("wide", _SIZE)]


class _Output:
    """The buffers that one expanded tree is written to."""

    def __init__(self) -> None:
        self.tokens, self.parents = (_SIZE * _MAX_NODES)(), (_SIZE * _MAX_NODES)()
        self.path_probs = (ctypes.c_double * _MAX_NODES)()
        parts = (self.tokens, self.parents, self.path_probs)
        self.addresses = tuple(ctypes.addressof(part) for part in parts)


class CpuDraftHead:
    """Implements `PackedDraftHead`."""

    def __init__(self, library: ctypes.CDLL, weights: DraftHeadWeights) -> None:
        self._library = library
        self._weights = weights
        self._decoder = decoder = CpuDecoder(library, weights.decoder)
        norms = torch.cat([norm.float() for norm in weights.tap_norms] or [torch.empty(0)])
        self._head = _DraftHead(
            ctypes.addressof(decoder.structure),
            decoder.linear(weights.fc),
            decoder.floats(norms),
            len(weights.tap_norms),
            weights.norm_output,
            weights.logit_scale,
            weights.token_ids.data_ptr(),
            len(weights.token_ids),
        )
        # Created once: right after a forward pass the CPU caches are cold and Python is slow.
        self._shape: tuple[GrowShape, _GrowShape] | None = None
        self._cache: tuple[Tensor, _DraftCache] | None = None
        self._outputs: list[_Output] = []

    def fuse(self, taps: Tensor) -> Tensor:
        """See `PackedDraftHead.fuse`."""
        taps = taps.float().contiguous()
        rows = torch.empty(len(taps), self._head.fc.weight.num_outputs)
        self._library.specserve_fuse(
            ctypes.byref(self._head), taps.data_ptr(), len(taps), rows.data_ptr(), num_threads()
        )
        return rows[:, : self._weights.fc.weight.num_outputs]

    def __call__(self, batch: DecoderPass) -> Tensor:
        """See `PackedDraftHead`."""
        weights = self._weights
        taps = (len(weights.decoder.layers),)
        rows = self._decoder(replace(batch, taps=taps)).tapped[:, 0]
        return self._norm(rows) if weights.norm_output else rows

    def take_in(self, batch: DecoderPass) -> None:
        """See `PackedDraftHead.take_in`."""
        self._decoder(batch)

    def logits(self, rows: Tensor) -> Tensor:
        """See `PackedDraftHead.logits`."""
        normed = rows if self._weights.norm_output else self._norm(rows)
        return self._decoder.unembed(normed) * self._weights.logit_scale

    def grow(self, shape: GrowShape, kv: Tensor, trees: Sequence[Growing]) -> list[Grown]:
        """See `PackedDraftHead.grow`."""
        if self._shape is None or self._shape[0] != shape:
            assert 1 <= shape.branching <= MAX_BRANCHING, "branching is out of range"
            of_shape = (shape.branching, shape.beam, shape.max_depth, shape.min_probability)
            self._shape = shape, _GrowShape(*of_shape)
        if self._cache is None or self._cache[0] is not kv:
            view = CacheView.of(kv)
            self._cache = kv, _DraftCache(view.address, view.num_slots, view.wide)
        while len(self._outputs) < len(trees):
            self._outputs.append(_Output())
        kept: list[Any] = []
        tasks = (_Growing * len(trees))(
            *(self._task(*each, kept) for each in zip(trees, self._outputs, strict=False))
        )
        self._library.specserve_grow(
            ctypes.byref(self._head),
            ctypes.byref(self._shape[1]),
            ctypes.byref(self._cache[1]),
            tasks,
            len(trees),
            num_threads(),
        )
        return [
            Grown(
                output.tokens[: task.num_nodes],
                output.parents[: task.num_nodes],
                output.path_probs[: task.num_nodes],
                task.num_passes,
            )
            for task, output in zip(tasks, self._outputs, strict=False)
        ]

    def _task(self, tree: Growing, output: "_Output", kept: list[Any]) -> _Growing:
        """The C structure of `tree`; appends to `kept` what only the structure refers to."""
        drawing, taps, num_waiting = tree.drawing, tree.taps, len(tree.waiting)
        assert taps.is_contiguous(), "taps must follow one another in memory"
        assert taps.dtype == torch.float32, f"taps are float32, not {taps.dtype}"
        assert len(taps) == num_waiting + 1, "every waiting pair has taps, and the root's"
        assert len(tree.lane) >= tree.num_context + tree.budget - 1, "the lane is too short"
        assert tree.lane.dtype == torch.int32, f"lanes are int32, not {tree.lane.dtype}"
        assert tree.budget <= _MAX_NODES, "the budget is out of range"
        waiting = (_SIZE * num_waiting)(*tree.waiting)
        kept.append(waiting)
        return _Growing(
            tree.lane.data_ptr(),
            tree.num_context,
            num_waiting,
            ctypes.addressof(waiting),
            taps.data_ptr(),
            tree.root,
            tree.position,
            tree.budget,
            drawing.temperature,
            drawing.top_p,
            drawing.min_p,
            drawing.top_k,
            drawing.seed % 2**64,
            tree.draw_position,
            0,
            0,
            *output.addresses,
        )

    def _norm(self, x: Tensor) -> Tensor:
        weight = self._weights.decoder.norm
        return F.rms_norm(x, weight.shape, weight, self._weights.decoder.rms_norm_eps)
