"""Weights packed in panels for the native kernels of the CPU: int4, int8 or floats.

Quantised weights are in groups of 32 inputs, made from floats or as a GGUF file stores them: Q4_0,
Q4_1 and Q8_0 matrices are held as stored; other matrices of a GGUF file become int8. The kernels
quantise the activations, which are float32, to 8 bits in groups of 32 too, but not for products
with float weights.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from specserve.models.checkpoint import Checkpoint
from specserve.models.layers.linear import Linear
from specserve.types import Quantization
from specserve_kernels.huge_pages import Arena
from specserve_kernels.ops import Kernels
from specserve_kernels.packed_weight import (
    PackedWeight,
    WeightFormat,
    pack_floats,
    quantize_int4,
    quantize_int8,
    unpack,
    unpack_rows,
)


class PanelMethod:
    """A `QuantMethod` of one or several weights, which may have different formats.

    `parts` are [outputs of the part, num_inputs]; their outputs follow one another.
    """

    def __init__(self, parts: Sequence[PackedWeight], kernels: Kernels) -> None:
        self.parts = tuple(parts)
        self.num_bytes = sum(part.num_bytes for part in parts)
        self._kernels = kernels

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `QuantMethod.apply`; `bias` is float32."""
        rows = x.float().contiguous()
        outputs = [self._kernels.packed_linear(rows, part) for part in self.parts]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return (y if bias is None else y + bias).to(x.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """See `EmbeddingMethod.rows`; the weight has one part."""
        (weight,) = self.parts
        return unpack_rows(weight, ids)


class PanelScheme:
    """A `QuantScheme` for a model on the CPU: the setting `int8`, `int4`, `auto` (as stored), or
    `none`: floats as stored, or in `dtype` if the stored ones are wider.

    With `int4`, embedding and head are int8, because int4 would cost the most quality there.
    """

    activation_dtype = torch.float32
    row_multiple = 1

    def __init__(
        self,
        checkpoint: Checkpoint,
        kernels: Kernels,
        setting: Quantization,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.exact = kernels.exact
        self._checkpoint = checkpoint
        self._kernels = kernels
        self._dtype = None if setting != "none" else dtype
        self._arena = Arena()
        formats = {"int8": WeightFormat.INT8, "int4": WeightFormat.INT4}
        self._layer_format = formats.get(setting)
        self._head_format = None if setting == "auto" else WeightFormat.INT8

    def linear(self, names: Sequence[str], *, with_bias: bool = False) -> Linear:
        """See `QuantScheme.linear`."""
        wanted = self._head_format if list(names) == ["lm_head"] else self._layer_format
        parts = [self._read(name, wanted) for name in names]
        bias = None
        if with_bias:
            bias = torch.cat([self._checkpoint.floats(f"{name}.bias").float() for name in names])
        return Linear(PanelMethod(parts, self._kernels), bias)

    def embedding(self, name: str) -> PanelMethod:
        """See `QuantScheme.embedding`."""
        return PanelMethod([self._read(name, self._head_format)], self._kernels)

    def _read(self, module: str, wanted: WeightFormat | None) -> PackedWeight:
        name = f"{module}.weight"
        weight = self._quantised(name, wanted) if self._dtype is None else self._floats(name)
        return replace(weight, panels=self._arena.copy(weight.panels))

    def _floats(self, name: str) -> PackedWeight:
        floats = self._checkpoint.floats(name)
        assert self._dtype is not None
        wider = floats.dtype.itemsize > self._dtype.itemsize
        return pack_floats(floats.to(self._dtype) if wider else floats)

    def _quantised(self, name: str, wanted: WeightFormat | None) -> PackedWeight:
        """The weight, quantised again unless it is stored in the `wanted` format.

        None keeps the stored format, or selects int8 if that is neither Q4_0, Q4_1 nor Q8_0.
        """
        weight = self._checkpoint.quantized_weight(name)
        if weight is not None and wanted in (None, weight.format):
            return weight
        floats = self._checkpoint.floats(name) if weight is None else unpack(weight)
        return quantize_int4(floats) if wanted is WeightFormat.INT4 else quantize_int8(floats)
