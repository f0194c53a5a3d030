"""Passes over a model without an engine, and tiny checkpoints of transformers models."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MinistralConfig,
    MinistralForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from specserve.batch import ForwardBatch, ModelOutput
from specserve.cache.storage import KVStorage
from specserve.models.checkpoint import read_checkpoint
from specserve.models.layers.linear import Linear
from specserve.models.llama import LlamaModel
from specserve.models.loader import load_model
from specserve.models.model import Model
from specserve.models.quantization.dense import DenseScheme
from specserve.models.quantization.method import EmbeddingMethod
from specserve.models.quantization.panels import PanelScheme
from specserve.models.quantization.scheme import QuantScheme
from specserve.models.row_tiles import BASE_ROWS
from specserve.models.shape import ModelShape
from specserve.types import Quantization
from specserve_kernels.ops import Kernels
from specserve_kernels.segments import Segments
from specserve_kernels.torch_ref import TorchKernels

CPU = torch.device("cpu")
BLOCK_SIZE = 16
REFERENCES: dict[type[PretrainedConfig], Callable[..., PreTrainedModel]] = {
    LlamaConfig: LlamaForCausalLM,
    MinistralConfig: MinistralForCausalLM,
    MistralConfig: MistralForCausalLM,
    Qwen2Config: Qwen2ForCausalLM,
    Qwen3Config: Qwen3ForCausalLM,
}


@pytest.fixture
def run_rows() -> Callable[..., ModelOutput]:
    """run_rows(model, kv, [(block table, context_len, tokens, parents), ...], aux_layers=())."""
    return _run_rows


@pytest.fixture
def prefill_rows() -> Callable[..., list[Any]]:
    """prefill_rows(table, context_len, tokens): the segments of known tokens."""
    return _prefill_rows


@pytest.fixture
def load() -> Callable[..., LlamaModel]:
    """load(directory, dtype=float32, exact=True) on the CPU."""
    return _load


@pytest.fixture
def save_reference(tmp_path: Path) -> Callable[..., PreTrainedModel]:
    """save_reference(config): a random transformers model, also written to tmp_path."""

    def save(config: PretrainedConfig) -> PreTrainedModel:
        torch.manual_seed(0)
        model: PreTrainedModel = REFERENCES[type(config)](config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:  # norms and biases start as ones and zeros
                    parameter.copy_(0.2 * torch.randn_like(parameter) + ("norm" in name))
        model.save_pretrained(tmp_path)
        return model

    return save


@pytest.fixture
def load_layers() -> Callable[..., LlamaModel]:
    """load_layers(directory, kernels, quantization, kv_dtype=float32, dense=()): with quantised
    weights, layer by layer. Modules whose names begin with one of `dense` are kept in floats."""
    return _load_layers


class MixedScheme:
    """A scheme that quantises all but the modules whose names begin with one of `dense`."""

    activation_dtype = torch.float32
    exact = True
    row_multiple = BASE_ROWS

    def __init__(self, floats: QuantScheme, groups: QuantScheme, dense: tuple[str, ...]) -> None:
        self._floats, self._groups, self._dense = floats, groups, dense

    def linear(self, names: Sequence[str], *, with_bias: bool = False) -> Linear:
        scheme = self._floats if names[0].startswith(self._dense) else self._groups
        return scheme.linear(names, with_bias=with_bias)

    def embedding(self, name: str) -> EmbeddingMethod:
        return self._groups.embedding(name)


def _load_layers(
    directory: Path,
    kernels: Kernels,
    quantization: Quantization,
    *,
    kv_dtype: torch.dtype = torch.float32,
    dense: tuple[str, ...] = (),
) -> LlamaModel:
    shape, checkpoint = ModelShape.from_dir(directory), read_checkpoint(directory)
    scheme: QuantScheme = PanelScheme(checkpoint, kernels, quantization)
    if dense:
        floats = DenseScheme(checkpoint, dtype=torch.bfloat16, device=CPU, exact=True)
        scheme = MixedScheme(floats, scheme, dense)
    return LlamaModel(shape, checkpoint, scheme, kernels, kv_dtype=kv_dtype, device=CPU)


def _load(directory: Path, dtype: torch.dtype = torch.float32, exact: bool = True) -> LlamaModel:
    kernels = TorchKernels()  # the native ones run the model in one call
    model = load_model(directory, kernels=kernels, dtype=dtype, device=CPU, exact=exact)
    assert isinstance(model, LlamaModel)
    return model


def _prefill_rows(table: Sequence[int], context_len: int, tokens: Sequence[int]) -> list[Any]:
    return [
        (table, context_len + i, tokens[i : i + 64], range(-1, len(tokens[i : i + 64]) - 1))
        for i in range(0, len(tokens), 64)
    ]


def _run_rows(
    model: Model, kv: KVStorage, segments: Sequence[Any], *, aux_layers: tuple[int, ...] = ()
) -> ModelOutput:
    """Logits for every row, segments one after the other."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    ancestors: list[int] = []
    cu_rows = [0]
    for table, context_len, tokens, parents in segments:
        words: list[int] = []
        for node, parent in enumerate(parents):
            words.append((words[parent] if parent >= 0 else 0) | 1 << node)
            positions.append(context_len + words[-1].bit_count() - 1)
            slot = context_len + node
            slots.append(table[slot // BLOCK_SIZE] * BLOCK_SIZE + slot % BLOCK_SIZE)
        ids += tokens
        ancestors += words
        cu_rows.append(len(ids))
    num_used = len(ids)
    padding = -num_used % model.row_multiple
    width = max(len(table) for table, *_ in segments)
    tables = np.array([[*table, *[0] * (width - len(table))] for table, *_ in segments], np.int32)
    batch = ForwardBatch(
        input_ids=torch.tensor(ids + [0] * padding),
        positions=torch.tensor(positions + [0] * padding),
        slots=torch.tensor(slots + [-1] * padding),
        logit_rows=torch.arange(num_used),
        segments=Segments(
            cu_rows=np.array(cu_rows, np.int32),
            context_lens=np.array([context_len for _, context_len, *_ in segments], np.int32),
            first_nodes=np.zeros(len(segments), np.int32),
            ancestors=np.array(ancestors, np.uint64),
            block_tables=tables,
            num_rows=num_used + padding,
            block_size=BLOCK_SIZE,
        ),
    )
    return model(batch, kv, aux_layers=aux_layers)
