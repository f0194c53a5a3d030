"""The native draft head. Defines the C structures, field by field as in draft_head.h."""

import ctypes
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from specserve_kernels.cpu.decoder import CCache, CLinear, CpuDecoder
from specserve_kernels.cpu.native import num_threads
from specserve_kernels.draft_head import (
    MAX_BRANCHING,
    DraftHeadWeights,
    ExpandedTree,
    ExpansionLimits,
    ExpansionTask,
)
from specserve_kernels.torch_ref.draft_head import TorchDraftHead

_ADDRESS = ctypes.c_void_p
_SIZE = ctypes.c_int64
_FLOAT = ctypes.c_float
_MAX_NODES: Final = 64  # bits of an ancestor word


class _DraftHead(ctypes.Structure):
    _fields_ = [
        ("decoder", _ADDRESS),
        ("fc", CLinear),
        ("aux_norms", _ADDRESS),
        ("num_norms", _SIZE),
        ("norm_output", _SIZE),
        ("logit_scale", _FLOAT),
        ("token_ids", _ADDRESS),
        ("vocab_size", _SIZE),
    ]


class _ExpansionLimits(ctypes.Structure):
    _fields_ = [
        ("branching", _SIZE),
        ("beam", _SIZE),
        ("max_depth", _SIZE),
        ("min_probability", ctypes.c_double),
    ]


class _ExpansionTask(ctypes.Structure):
    _fields_ = [
        ("slot_list", _ADDRESS),
        ("num_context", _SIZE),
        ("num_pending", _SIZE),
        ("pending_tokens", _ADDRESS),
        ("aux_hidden", _ADDRESS),
        ("root", _SIZE),
        ("position", _SIZE),
        ("budget", _SIZE),
        ("temperature", _FLOAT),
        ("top_p", _FLOAT),
        ("min_p", _FLOAT),
        ("top_k", _SIZE),
        ("seed", ctypes.c_uint64),
        ("noise_position", _SIZE),
        ("num_passes", _SIZE),
        ("num_nodes", _SIZE),
        ("tokens", _ADDRESS),
        ("parents", _ADDRESS),
        ("path_probs", _ADDRESS),
    ]


class _Output:
    """The buffers that one expanded tree is written to."""

    def __init__(self) -> None:
        self.tokens, self.parents = (_SIZE * _MAX_NODES)(), (_SIZE * _MAX_NODES)()
        self.path_probs = (ctypes.c_double * _MAX_NODES)()
        parts = (self.tokens, self.parents, self.path_probs)
        self.addresses = tuple(ctypes.addressof(part) for part in parts)


class CpuDraftHead(TorchDraftHead):
    """Implements `QuantizedDraftHead`; forward passes, `fuse` and `expand` are native."""

    def __init__(self, library: ctypes.CDLL, weights: DraftHeadWeights) -> None:
        super().__init__(weights)
        self._library = library
        self._decoder = decoder = CpuDecoder(library, weights.decoder)
        norms = torch.cat([norm.float() for norm in weights.aux_norms] or [torch.empty(0)])
        self._head = _DraftHead(
            ctypes.addressof(decoder.structure),
            decoder.linear(weights.fc),
            decoder.floats(norms),
            len(weights.aux_norms),
            weights.norm_output,
            weights.logit_scale,
            weights.token_ids.data_ptr(),
            len(weights.token_ids),
        )
        # Created once: right after a forward pass the CPU caches are cold and Python is slow.
        self._limits: tuple[ExpansionLimits, _ExpansionLimits] | None = None
        self._cache: CCache | None = None
        self._outputs: list[_Output] = []

    def fuse(self, aux_hidden_states: Tensor) -> Tensor:
        """See `QuantizedDraftHead.fuse`."""
        x = aux_hidden_states.float().contiguous()
        fused = torch.empty(len(x), self._head.fc.weight.num_outputs)
        self._library.specserve_fuse(
            ctypes.byref(self._head), x.data_ptr(), len(x), fused.data_ptr(), num_threads()
        )
        return fused[:, : self._weights.fc.weight.num_outputs]

    def expand(
        self, limits: ExpansionLimits, kv: Tensor, tasks: Sequence[ExpansionTask]
    ) -> list[ExpandedTree]:
        """See `QuantizedDraftHead.expand`."""
        if self._limits is None or self._limits[0] != limits:
            assert 1 <= limits.branching <= MAX_BRANCHING, "branching is out of range"
            fields = (limits.branching, limits.beam, limits.max_depth, limits.min_probability)
            self._limits = limits, _ExpansionLimits(*fields)
        if self._cache is None or self._cache.kv is not kv:
            self._cache = CCache(kv)
        while len(self._outputs) < len(tasks):
            self._outputs.append(_Output())
        kept: list[Any] = []
        c_tasks = (_ExpansionTask * len(tasks))(
            *(self._task(*each, kept) for each in zip(tasks, self._outputs, strict=False))
        )
        self._library.specserve_expand(
            ctypes.byref(self._head),
            ctypes.byref(self._limits[1]),
            ctypes.byref(self._cache),
            c_tasks,
            len(tasks),
            num_threads(),
        )
        return [
            ExpandedTree(
                output.tokens[: task.num_nodes],
                output.parents[: task.num_nodes],
                output.path_probs[: task.num_nodes],
                task.num_passes,
            )
            for task, output in zip(c_tasks, self._outputs, strict=False)
        ]

    def _task(self, task: ExpansionTask, output: _Output, kept: list[Any]) -> _ExpansionTask:
        """The C structure of `task`; appends to `kept` what only the structure refers to."""
        sampling, aux, num_pending = task.sampling, task.aux_hidden_states, len(task.pending_tokens)
        assert aux.is_contiguous(), "aux_hidden_states must be contiguous"
        assert aux.dtype == torch.float32, f"aux_hidden_states are float32, not {aux.dtype}"
        assert len(aux) == num_pending + 1, "one row per pending token, and the root's"
        assert len(task.slot_list) >= task.num_context + task.budget - 1, "slot_list is too short"
        assert task.slot_list.dtype == torch.int32, (
            f"slot_list is int32, not {task.slot_list.dtype}"
        )
        assert task.budget <= _MAX_NODES, "the budget is out of range"
        pending_tokens = (_SIZE * num_pending)(*task.pending_tokens)
        kept.append(pending_tokens)
        return _ExpansionTask(
            task.slot_list.data_ptr(),
            task.num_context,
            num_pending,
            ctypes.addressof(pending_tokens),
            aux.data_ptr(),
            task.root,
            task.position,
            task.budget,
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.top_k,
            sampling.seed % 2**64,
            task.noise_position,
            0,
            0,
            *output.addresses,
        )
