"""Models with weights in panels: one native call against layer by layer; when each serves."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from exact_kernels import EXACT_KERNELS, each_exact_kernels
from gguf import GGMLQuantizationType as Kind
from gguf_models import write_gguf
from safetensors.torch import load_file
from tiny import write_tiny_llama
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from specserve.batch import ModelOutput
from specserve.cache.storage import KVStorage
from specserve.hub import resolve
from specserve.models.checkpoint import read_checkpoint
from specserve.models.fields import ModelError
from specserve.models.fused_cpu import FusedModel, NotFusedError
from specserve.models.llama import LlamaModel
from specserve.models.loader import load_model
from specserve.models.model import Model
from specserve.models.quantization.choice import choose_quantization
from specserve.models.shape import ModelShape
from specserve.types import Quantization
from specserve_kernels.dispatch import fused_models
from specserve_kernels.ops import Kernels
from specserve_kernels.torch_ref import TorchKernels

CPU = torch.device("cpu")
TABLE = [2, 0, 3, 1]
LoadLayers = Callable[..., LlamaModel]
RunRows = Callable[..., ModelOutput]

FLOATS = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    tie_word_embeddings=True,
    initializer_range=0.2,
)
FUSING_KERNELS = [kernels for kernels in EXACT_KERNELS if fused_models(kernels) is not None]
each_fusing_kernels = pytest.mark.parametrize(
    "kernels", FUSING_KERNELS, ids=[kernels.name for kernels in FUSING_KERNELS]
)


def _load(directory: Path, kernels: Kernels, quantization: Quantization, **options: Any) -> Model:
    return load_model(
        directory,
        kernels=kernels,
        dtype=torch.float32,
        device=CPU,
        exact=True,
        quantization=quantization,
        **options,
    )


def _gguf(directory: Path, arch: str, kind: Kind) -> Path:
    path = write_gguf(directory / "tiny.gguf", arch=arch, kind=kind)
    return resolve(str(path), cache_dir=directory / "cache")


def _run(model: Model, run_rows: RunRows, prefill: Sequence[Any]) -> tuple[ModelOutput, Tensor]:
    """A prompt, then a tree after it; the output of the tree, and all K and V."""
    kv = KVStorage(model.kv_spec, 64, CPU)
    run_rows(model, kv, prefill)
    tree = [(TABLE, 20, [7, 8, 9, 10], [-1, 0, 0, 2])]
    return run_rows(model, kv, tree, aux_layers=(0, 1, 2)), kv.data[:, :, _slots(24)]


def _slots(count: int) -> list[int]:
    return [TABLE[i // 16] * 16 + i % 16 for i in range(count)]


def _assert_close(ours: Tensor, theirs: Tensor, kv_dtype: torch.dtype) -> None:
    """An activation halfway between two integers may round either way: a step of 1/127 of its
    group. The same holds for a softmax weight halfway between two bfloat16."""
    ours, theirs = ours.float(), theirs.float()
    assert (ours - theirs).abs().max() < 0.03 * theirs.abs().max()
    mean = 0.003 if kv_dtype == torch.float32 else 0.015
    assert (ours - theirs).abs().mean() < mean * theirs.abs().mean()


@each_fusing_kernels
@pytest.mark.parametrize("kv_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("arch", "kind", "quantization"),
    [
        ("llama", Kind.Q4_0, "auto"),
        ("llama", Kind.Q5_1, "auto"),
        ("qwen3", Kind.Q8_0, "auto"),
        ("qwen3", Kind.F32, "int4"),
        ("qwen3", Kind.F32, "none"),
        ("llama", Kind.F16, "none"),
        ("llama", Kind.BF16, "none"),
    ],
)
def test_one_call_agrees_with_layer_by_layer(
    tmp_path: Path,
    load_layers: LoadLayers,
    run_rows: RunRows,
    prefill_rows: Callable[..., list[Any]],
    kernels: Kernels,
    arch: str,
    kind: Kind,
    quantization: Quantization,
    kv_dtype: torch.dtype,
) -> None:
    """Both have the same weights; norms, SwiGLU and attention sum in another order."""
    directory = _gguf(tmp_path, arch, kind)
    fused = _load(directory, kernels, quantization, packed_kv_dtype=kv_dtype)
    assert isinstance(fused, FusedModel)
    prefill = prefill_rows(TABLE, 0, list(range(20)))
    ours, our_kv = _run(fused, run_rows, prefill)
    for other in (kernels, TorchKernels()):
        layers = load_layers(directory, other, quantization, kv_dtype=kv_dtype)
        assert (layers.num_bytes, layers.kv_spec) == (fused.num_bytes, fused.kv_spec)
        theirs, their_kv = _run(layers, run_rows, prefill)
        assert ours.aux_hidden_states is not None
        assert theirs.aux_hidden_states is not None
        _assert_close(ours.logits, theirs.logits, kv_dtype)
        _assert_close(ours.aux_hidden_states, theirs.aux_hidden_states, kv_dtype)
        _assert_close(our_kv, their_kv, kv_dtype)


@each_fusing_kernels
def test_a_layer_kept_in_floats_is_not_fused_but_served(
    tmp_path: Path,
    load_layers: LoadLayers,
    run_rows: RunRows,
    prefill_rows: Callable[..., list[Any]],
    kernels: Kernels,
) -> None:
    directory = write_tiny_llama(tmp_path, seed=1, head_dim=16)
    mixed = load_layers(directory, kernels, "int8", dense=("model.layers.1.mlp",))
    with pytest.raises(NotFusedError, match=r"weight of layers\.1\.gate_up is not packed"):
        FusedModel(mixed)
    quantised = load_layers(directory, kernels, "int8")
    assert mixed.num_bytes > quantised.num_bytes
    prefill = prefill_rows(TABLE, 0, list(range(20)))
    ours, theirs = (_run(model, run_rows, prefill)[0] for model in (mixed, quantised))
    assert not torch.equal(ours.logits, theirs.logits)
    assert (ours.logits - theirs.logits).abs().max() < 0.05 * theirs.logits.abs().max()


@each_exact_kernels
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.float32])
def test_what_cannot_be_fused_is_served_layer_by_layer(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    run_rows: RunRows,
    prefill_rows: Callable[..., list[Any]],
    kernels: Kernels,
    quantization: Quantization,
    kv_dtype: torch.dtype,
) -> None:
    """The fused kernels take no heads of 8 and no float16."""
    directory = write_tiny_llama(tmp_path, seed=1, head_dim=8)
    with caplog.at_level(logging.WARNING):
        model = _load(directory, kernels, quantization, packed_kv_dtype=kv_dtype)
    assert isinstance(model, LlamaModel)
    assert "layer by layer, which is slower: " in caplog.text
    args = (ModelShape.from_dir(directory), read_checkpoint(directory), kernels, CPU)
    assert (
        "layer by layer: "
        in choose_quantization(quantization, *args, torch.float32, kv_dtype).reason
    )
    floats = _load(directory, kernels, "none")
    prefill = prefill_rows(TABLE, 0, list(range(20)))
    ours, theirs = (_run(each, run_rows, prefill)[0] for each in (model, floats))
    error = (ours.logits - theirs.logits).norm() / theirs.logits.norm()
    assert error < (0.05 if quantization == "int8" else 0.3)


@each_exact_kernels
def test_auto_keeps_the_stored_formats_where_one_call_runs_them(
    tmp_path: Path, kernels: Kernels
) -> None:
    directory = _gguf(tmp_path, "llama", Kind.Q8_0)
    fuses = fused_models(kernels) is not None
    assert isinstance(_load(directory, kernels, "auto"), FusedModel if fuses else LlamaModel)
    args = (ModelShape.from_dir(directory), read_checkpoint(directory), kernels, CPU)
    assert choose_quantization("auto", *args, torch.float32, torch.float32).quantized == fuses
    assert not choose_quantization("auto", *args, torch.float32, torch.float16).quantized
    floats = choose_quantization("none", *args, torch.float32, torch.float32)
    assert (floats.quantized, floats.packed) == (False, fuses)


@each_fusing_kernels
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_floats_in_one_call_agree_with_transformers(
    tmp_path: Path,
    save_reference: Callable[..., PreTrainedModel],
    run_rows: RunRows,
    prefill_rows: Callable[..., list[Any]],
    kernels: Kernels,
    stored: torch.dtype,
) -> None:
    """The weights keep their dtype; the activations are float32."""
    saved = save_reference(FLOATS)
    torch.nn.Module.to(saved, stored)
    saved.save_pretrained(tmp_path)
    reference = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = _load(tmp_path, kernels, "none")
    assert isinstance(model, FusedModel)
    num_weights = sum(p.numel() for p in reference.parameters() if p.ndim == 2)
    assert model.num_bytes == num_weights * stored.itemsize
    tokens = list(range(40))
    kv = KVStorage(model.kv_spec, 64, CPU)
    ours = run_rows(model, kv, prefill_rows(TABLE, 0, tokens)).logits
    with torch.no_grad():
        theirs = reference(torch.tensor([tokens])).logits[0]
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@each_fusing_kernels
def test_floats_wider_than_dtype_are_rounded(
    tmp_path: Path, save_reference: Callable[..., PreTrainedModel], kernels: Kernels
) -> None:
    save_reference(FLOATS)
    model = load_model(tmp_path, kernels=kernels, dtype=torch.bfloat16, device=CPU, exact=True)
    ids = torch.arange(FLOATS.vocab_size)
    stored = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    assert torch.equal(model.embed(ids), stored.bfloat16().float())


def test_a_shape_without_groups_of_32_is_refused(tmp_path: Path) -> None:
    directory = write_tiny_llama(tmp_path, seed=1, head_dim=6)
    with pytest.raises(ModelError, match=r"'int4' is not possible: .*head_dim 24 is no multiple"):
        _load(directory, TorchKernels(), "int4")


def test_a_gpu_is_refused(tmp_path: Path) -> None:
    directory = write_tiny_llama(tmp_path, seed=1)
    args = (ModelShape.from_dir(directory), read_checkpoint(directory), TorchKernels())
    with pytest.raises(ModelError, match="int8 and int4 weights need device cpu, not cuda"):
        choose_quantization("int8", *args, torch.device("cuda"), torch.float32, torch.float32)
