"""int4 and int8 weights in groups of 32 inputs: made from floats, or as a GGUF file stores them.

Q4_0, Q4_1 and Q8_0 matrices are held as stored; other matrices of a GGUF file become int8. The
kernels quantise the activations, which are float32, to 8 bits in groups of 32 too.
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
from specserve_kernels.quantized_weight import (
    QuantizedWeight,
    WeightFormat,
    dequantize,
    dequantize_rows,
    quantize_int4,
    quantize_int8,
)


class IntGroupMethod:
    """A `QuantMethod` of one or several weights, which may have different formats.

    `parts` are [outputs of the part, num_inputs]; their outputs follow one another.
    """

    def __init__(self, parts: Sequence[QuantizedWeight], kernels: Kernels) -> None:
        self.parts = tuple(parts)
        self.num_bytes = sum(part.num_bytes for part in parts)
        self._kernels = kernels

    def apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `QuantMethod.apply`; `bias` is float32."""
        rows = x.float().contiguous()
        outputs = [self._kernels.quantized_linear(rows, part) for part in self.parts]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return (y if bias is None else y + bias).to(x.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """See `EmbeddingMethod.rows`; the weight has one part."""
        (weight,) = self.parts
        return dequantize_rows(weight, ids)


class IntGroupScheme:
    """A `QuantScheme` for a model on the CPU: the setting `int8`, `int4`, or `auto` (as stored).

    With `int4`, embedding and head are int8, because int4 would cost the most quality there.
    """

    activation_dtype = torch.float32
    row_multiple = 1

    def __init__(self, checkpoint: Checkpoint, kernels: Kernels, setting: Quantization) -> None:
        self.exact = kernels.exact
        self._checkpoint = checkpoint
        self._kernels = kernels
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
        return Linear(IntGroupMethod(parts, self._kernels), bias)

    def embedding(self, name: str) -> IntGroupMethod:
        """See `QuantScheme.embedding`."""
        return IntGroupMethod([self._read(name, self._head_format)], self._kernels)

    def _read(self, module: str, wanted: WeightFormat | None) -> QuantizedWeight:
        """The weight of a module, quantised again unless it is stored in the `wanted` format.

        None keeps the stored format, or selects int8 if that is neither Q4_0, Q4_1 nor Q8_0.
        """
        name = f"{module}.weight"
        weight = self._checkpoint.quantized_weight(name)
        if weight is None or wanted not in (None, weight.format):
            floats = self._checkpoint.floats(name) if weight is None else dequantize(weight)
            weight = quantize_int4(floats) if wanted is WeightFormat.INT4 else quantize_int8(floats)
        return replace(weight, panels=self._arena.copy(weight.panels))
