"""Bit for bit: a row's result does not depend on the rows it shares a pass with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_kernels import each_exact_kernels
from transformers import LlamaConfig, PreTrainedModel, Qwen3Config

from specserve.batch import ModelOutput
from specserve.cache.storage import KVStorage
from specserve.models.llama import LlamaModel
from specserve_kernels.ops import Kernels

CPU = torch.device("cpu")
# The width of a real model (MKL and oneDNN choose kernels by size), and an awkward one.
SIZES = {
    "real": LlamaConfig(
        vocab_size=1500,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        initializer_range=0.05,
    ),
    "awkward": Qwen3Config(
        vocab_size=101,
        hidden_size=42,
        intermediate_size=101,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=14,
        max_position_embeddings=512,
        initializer_range=0.2,
        attention_bias=True,
    ),
}
QUANTISABLE = LlamaConfig(
    vocab_size=100,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    max_position_embeddings=512,
    attention_bias=True,
    initializer_range=0.2,
)
MINE, OTHERS = [4, 1, 7, 6], [[10, 11, 12, 13, 14, 15], [20, 21, 22, 23], [30, 31]]


@pytest.fixture(params=SIZES)
def directory(
    request: pytest.FixtureRequest,
    save_reference: Callable[..., PreTrainedModel],
    tmp_path: Path,
) -> Path:
    save_reference(SIZES[request.param])
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_alone_and_in_company(
    directory: Path,
    dtype: torch.dtype,
    load: Callable[..., LlamaModel],
    run_rows: Callable[..., ModelOutput],
    prefill_rows: Callable[..., list[Any]],
) -> None:
    _assert_rows_are_independent(load(directory, dtype), run_rows, prefill_rows)


@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dense_mlp", [False, True])
@each_exact_kernels
def test_quantised_layers_alone_and_in_company(
    save_reference: Callable[..., PreTrainedModel],
    load_layers: Callable[..., LlamaModel],
    kernels: Kernels,
    kv_dtype: torch.dtype,
    dense_mlp: bool,
    run_rows: Callable[..., ModelOutput],
    prefill_rows: Callable[..., list[Any]],
    tmp_path: Path,
) -> None:
    save_reference(QUANTISABLE)
    dense = ("model.layers.1.mlp",) if dense_mlp else ()
    model = load_layers(tmp_path, kernels, "int4", kv_dtype=kv_dtype, dense=dense)
    assert model.row_multiple == (8 if dense_mlp else 1)
    _assert_rows_are_independent(model, run_rows, prefill_rows)


def _assert_rows_are_independent(
    model: LlamaModel,
    run_rows: Callable[..., ModelOutput],
    prefill_rows: Callable[..., list[Any]],
) -> None:
    assert model.exact
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 100, (200,), generator=generator).tolist()

    # One token at a time, alone.
    alone = KVStorage(model.kv_spec, 640, CPU)
    rows = [
        run_rows(model, alone, prefill_rows(MINE, i, tokens[i : i + 1])).logits[0]
        for i in range(20)
    ]

    # The same prompt in one chunk behind the long prompt of another, and before a third.
    together = KVStorage(model.kv_spec, 640, CPU)
    crowd = [
        *prefill_rows(OTHERS[0], 0, tokens[20:95]),
        *prefill_rows(MINE, 0, tokens[:17]),
        *prefill_rows(OTHERS[1], 0, tokens[100:141]),
    ]
    out = run_rows(model, together, crowd).logits
    assert torch.equal(out[75:92], torch.stack(rows[:17]))

    # The last tokens as a branch of a tree, off the straight line, beside another tree.
    branching = [tokens[17], 55, tokens[18], 56, tokens[19]]
    trees = [
        (OTHERS[2], 0, tokens[150:155], [-1, 0, 1, 1, 0]),
        (MINE, 17, branching, [-1, 0, 0, 1, 2]),
    ]
    out = run_rows(model, together, trees).logits[5:]
    assert torch.equal(out[[0, 2, 4]], torch.stack(rows[17:20]))

    written = [MINE[i // 16] * 16 + i % 16 for i in range(18)]
    assert torch.equal(alone.data[:, :, written], together.data[:, :, written])


def test_fast_mode_takes_any_number_of_rows_and_agrees_closely(
    directory: Path,
    load: Callable[..., LlamaModel],
    run_rows: Callable[..., ModelOutput],
    prefill_rows: Callable[..., list[Any]],
) -> None:
    exact, fast = load(directory), load(directory, exact=False)
    assert (exact.row_multiple, fast.row_multiple) == (8, 1)
    segments = prefill_rows(MINE, 0, list(range(11)))
    outs = [
        run_rows(model, KVStorage(model.kv_spec, 640, CPU), segments).logits
        for model in (exact, fast)
    ]
    torch.testing.assert_close(*outs, atol=1e-4, rtol=0)
