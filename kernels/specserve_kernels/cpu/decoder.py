"""A forward pass in one native call. Defines the C structures, field by field as in decoder.h."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from specserve_kernels.cpu.attention import CSegments
from specserve_kernels.cpu.linear import packed_linear
from specserve_kernels.cpu.native import num_threads
from specserve_kernels.decoder import (
    MAX_TOP,
    DecoderOutput,
    DecoderPass,
    DecoderWeights,
    LayerWeights,
    PackedLinear,
)
from specserve_kernels.packed_weight import PANEL, PackedWeight

_ADDRESS = ctypes.c_void_p
_SIZE = ctypes.c_int64


class _Weight(ctypes.Structure):
    _fields_ = [
        ("panels", _ADDRESS),
        ("format", ctypes.c_int32),
        ("num_inputs", _SIZE),
        ("num_outputs", _SIZE),
    ]


class CLinear(ctypes.Structure):
    _fields_ = [("weight", _Weight), ("bias", _ADDRESS)]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("attention_norm", _ADDRESS),
        ("mlp_norm", _ADDRESS),
        ("q_norm", _ADDRESS),
        ("k_norm", _ADDRESS),
        *((name, CLinear) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        ("window", _SIZE),
    ]


class _Decoder(ctypes.Structure):
    _fields_ = [
        ("num_layers", _SIZE),
        ("hidden_size", _SIZE),
        ("intermediate_size", _SIZE),
        ("num_heads", _SIZE),
        ("num_kv_heads", _SIZE),
        ("head_dim", _SIZE),
        ("eps", ctypes.c_double),
        ("cos", _ADDRESS),
        ("sin", _ADDRESS),
        ("layers", ctypes.POINTER(_Layer)),
        ("norm", _ADDRESS),
        ("embed", _Weight),
        ("head", CLinear),
        ("hidden_norm", _ADDRESS),
        ("normed_residual", _SIZE),
    ]


class CCache(ctypes.Structure):
    """The C structure of the tensor that holds K and V."""

    _fields_ = [("address", _ADDRESS), ("num_slots", _SIZE), ("is_float", _SIZE)]

    def __init__(self, kv: Tensor) -> None:
        assert kv.is_contiguous(), "the cache must be contiguous"
        assert kv.dtype in (torch.float32, torch.bfloat16), f"K and V are {kv.dtype}"
        super().__init__(kv.data_ptr(), kv.shape[2], kv.dtype == torch.float32)
        self.kv = kv


class _Pass(ctypes.Structure):
    _fields_ = [
        ("segments", CSegments),
        ("num_rows", _SIZE),
        ("input_ids", _ADDRESS),
        ("positions", _ADDRESS),
        ("slots", _ADDRESS),
        ("hidden_in", _ADDRESS),
        ("cache", CCache),
        ("aux_layers", _ADDRESS),
        ("num_aux_layers", _SIZE),
        ("aux_hidden", _ADDRESS),
    ]


class _Head(ctypes.Structure):
    _fields_ = [
        ("num_rows", _SIZE),
        ("rows", _ADDRESS),
        ("vocab_size", _SIZE),
        ("logits", _ADDRESS),
        ("num_top", _SIZE),
        ("top", _ADDRESS),
    ]


class CpuDecoder:
    """Implements `FusedDecoder`; a row's bits do not depend on the other rows."""

    def __init__(self, library: ctypes.CDLL, weights: DecoderWeights) -> None:
        self._library = library
        self._weights = weights
        self._kept: list[Tensor] = []  # keeps alive what the structures point to
        # Created once: right after a forward pass the CPU caches are cold and torch calls are slow.
        self._cache: CCache | None = None
        self._aux_layers: dict[tuple[int, ...], Tensor] = {}
        self._residual = torch.empty(0, weights.hidden_size)
        self._layers = (_Layer * len(weights.layers))(*map(self._layer, weights.layers))
        self.structure = _Decoder(
            len(weights.layers),
            weights.hidden_size,
            weights.layers[0].down.weight.num_inputs,
            weights.num_heads,
            weights.num_kv_heads,
            weights.head_dim,
            weights.rms_norm_eps,
            self.floats(weights.cos),
            self.floats(weights.sin),
            self._layers,
            self.floats(weights.norm),
            self._weight(weights.embed),
            self.linear(weights.head),
            self.floats(weights.hidden_norm),
            weights.normed_residual,
        )

    def __call__(self, batch: DecoderPass) -> DecoderOutput:
        weights, segments = self._weights, batch.segments
        num_rows = batch.input_ids.shape[0]
        assert num_rows == segments.num_rows == segments.cu_rows[-1], "every row has a segment"
        assert 0 <= batch.num_top <= min(MAX_TOP, weights.vocab_size), "num_top is out of range"
        if self._cache is None or self._cache.kv is not batch.kv:
            self._cache = CCache(batch.kv)
        if batch.aux_layers not in self._aux_layers:
            self._aux_layers[batch.aux_layers] = torch.tensor(batch.aux_layers, dtype=torch.int64)
        if num_rows > len(self._residual):
            self._residual = torch.empty(num_rows, weights.hidden_size)
        states = torch.empty(num_rows, len(batch.aux_layers), weights.hidden_size)
        logits, top, head = self._head(batch.logit_rows, batch.num_top)
        task = _Pass(
            CSegments.of(segments),
            num_rows,
            batch.input_ids.data_ptr(),
            batch.positions.data_ptr(),
            batch.slots.data_ptr(),
            None if batch.hidden_in is None else batch.hidden_in.data_ptr(),
            self._cache,
            self._aux_layers[batch.aux_layers].data_ptr(),
            len(batch.aux_layers),
            states.data_ptr(),
        )
        self._library.specserve_decode(
            ctypes.byref(self.structure),
            ctypes.byref(task),
            ctypes.byref(head),
            self._residual.data_ptr(),
            num_threads(),
        )
        return DecoderOutput(logits, top, states)

    def head(self, x: Tensor) -> Tensor:
        """See `FusedDecoder.head`."""
        residual = x.float().contiguous()
        rows = torch.arange(x.shape[0])
        logits, _, head = self._head(rows, 0)
        self._library.specserve_decode_head(
            ctypes.byref(self.structure), ctypes.byref(head), residual.data_ptr(), num_threads()
        )
        return logits

    def unembed(self, x: Tensor) -> Tensor:
        """See `FusedDecoder.unembed`."""
        head = self._weights.head
        logits = packed_linear(self._library, x.contiguous(), head.weight)
        return logits if head.bias is None else logits + head.bias

    def _head(self, rows: Tensor, num_top: int) -> tuple[Tensor, Tensor, _Head]:
        """Buffers for logits and top tokens, and the C structure that points to both."""
        num_rows = rows.shape[0]
        logits = torch.empty(num_rows, self.structure.head.weight.num_outputs)
        top = torch.empty(num_rows, num_top, dtype=torch.int64)
        vocab_size = self._weights.vocab_size
        head = _Head(
            num_rows, rows.data_ptr(), vocab_size, logits.data_ptr(), num_top, top.data_ptr()
        )
        if logits.shape[1] > vocab_size:
            logits = logits[:, :vocab_size]
        return logits, top, head

    def _layer(self, layer: LayerWeights) -> _Layer:
        linears = (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)
        return _Layer(
            self.floats(layer.attention_norm),
            self.floats(layer.mlp_norm),
            self.floats(layer.q_norm),
            self.floats(layer.k_norm),
            *map(self.linear, linears),
            layer.window,
        )

    def linear(self, linear: PackedLinear) -> CLinear:
        bias = linear.bias
        if bias is not None:
            bias = torch.nn.functional.pad(bias.float(), (0, -bias.shape[0] % PANEL))
        return CLinear(self._weight(linear.weight), self.floats(bias))

    def _weight(self, weight: PackedWeight) -> _Weight:
        self._kept.append(weight.panels)
        return _Weight(
            weight.panels.data_ptr(),
            weight.format,
            weight.num_inputs,
            weight.panels.shape[0] * PANEL,
        )

    def floats(self, x: Tensor | None) -> Any:
        """The address of a float32 copy of `x` that is kept alive; None for None."""
        if x is None:
            return None
        self._kept.append(x.float().contiguous())
        return self._kept[-1].data_ptr()
