"""Weights of a GGUF file: floats as the gguf package reads them, quantised values, damage."""

import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_models import CONFIGS, load_reference, random_tensors
from gguf_models import write_gguf as write_gguf_to
from model_weights import weights_by_name
from safetensors.torch import save_file

from specserve.hub import gguf_file, resolve
from specserve.models.checkpoint import Checkpoint, read_checkpoint
from specserve.models.fields import ModelError
from specserve.models.llama import LlamaModel
from specserve_kernels.packed_weight import WeightFormat, unpack

Load = Callable[..., LlamaModel]
Write = Callable[..., Path]
FORMATS = {Kind.Q4_0: WeightFormat.INT4, Kind.Q4_1: WeightFormat.INT4, Kind.Q8_0: WeightFormat.INT8}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """write(metadata, tensors, arch, kind): see `gguf_models`."""
    return partial(write_gguf_to, tmp_path / "tiny.gguf")


def _directory(path: Path) -> Path:
    return resolve(str(path), cache_dir=path.parent / "cache")


def _matrices(checkpoint: Checkpoint) -> list[str]:
    return [name for name, entry in checkpoint.entries.items() if len(entry.shape) == 2]


@pytest.mark.parametrize(("config", "arch"), [(name, name.split()[0]) for name in CONFIGS])
def test_a_gguf_model_is_the_model_it_was_made_of(
    write: Write, load: Load, config: str, arch: str
) -> None:
    path = write(tensors=random_tensors(CONFIGS[config]), arch=arch)
    theirs = load_reference(path, CONFIGS[config]).state_dict()
    weights = weights_by_name(load(_directory(path)))
    assert weights.keys() == theirs.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q4_0, Kind.Q4_1, Kind.Q5_1, Kind.Q8_0])
def test_weights_are_those_of_gguf_rounded_once(
    write: Write, load: Load, monkeypatch: pytest.MonkeyPatch, kind: Kind, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(gguf_file, "_CHUNK_VALUES", 1000)  # many chunks, the last one smaller
    path = write(kind=kind)
    theirs = load_reference(path, CONFIGS["llama"]).state_dict()
    model = load(_directory(path), dtype, exact=False)
    for name, weight in weights_by_name(model).items():
        assert torch.equal(weight, theirs[name].to(weight.dtype)), name


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_quantized_weights_dequantize_to_the_same_floats(
    write: Write, kind: Kind, arch: str
) -> None:
    path = write(kind=kind, arch=arch)
    theirs = load_reference(path, CONFIGS[arch]).state_dict()
    checkpoint = read_checkpoint(_directory(path))
    assert checkpoint.quantized
    for name in _matrices(checkpoint):
        weight = checkpoint.quantized_weight(name)
        assert weight is not None
        assert weight.format == FORMATS[kind]
        assert torch.equal(unpack(weight), theirs[name]), name
    assert checkpoint.quantized_weight("model.norm.weight") is None


@pytest.mark.parametrize(
    ("kind", "dtype", "quantized"),
    [
        (Kind.F32, torch.float32, False),
        (Kind.F16, torch.float16, False),
        (Kind.BF16, torch.bfloat16, False),
        (Kind.Q5_1, torch.float32, True),
    ],
)
def test_other_kinds_have_no_quantized_weight(
    write: Write, kind: Kind, dtype: torch.dtype, quantized: bool
) -> None:
    checkpoint = read_checkpoint(_directory(write(kind=kind)))
    assert checkpoint.quantized == quantized
    for name in _matrices(checkpoint):
        assert checkpoint.entries[name].dtype == kind.name
        assert checkpoint.quantized_weight(name) is None
        assert checkpoint.floats(name).dtype == dtype


def test_safetensors_have_no_quantized_weight_and_come_first(write: Write, tmp_path: Path) -> None:
    directory = _directory(write())
    save_file({"a": torch.ones(2, 32)}, directory / "model.safetensors")
    checkpoint = read_checkpoint(directory)
    assert checkpoint.entries.keys() == {"a"}
    assert checkpoint.quantized_weight("a") is None
    assert not checkpoint.quantized


def test_a_link_to_a_file_that_is_gone(write: Write, load: Load) -> None:
    path = write()
    directory = _directory(path)
    path.unlink()
    with pytest.raises(ModelError, match=r"model\.gguf: the weights are in .*/tiny\.gguf, which"):
        load(directory)


def _without(name: str) -> dict[str, Any]:
    return {key: value for key, value in random_tensors(CONFIGS["llama"]).items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {**_without(""), "blk.0.ssm_in.weight": np.ones(4, np.float32)},
            r"1 tensors are unknown: blk\.0\.ssm_in\.weight",
        ),
        (
            _without("blk.1.attn_v.weight"),
            r"1 missing: model\.layers\.1\.self_attn\.v_proj\.weight",
        ),
        (
            {**_without(""), "blk.1.attn_v.weight": np.ones((32, 32), np.float32)},
            r"tiny\.gguf: .*v_proj\.weight has shape \[32, 32\]; config\.json says \[32, 64\]",
        ),
        (
            {**_without(""), "blk.1.attn_v.weight": np.ones((32, 64), np.int8)},
            r"blk\.1\.attn_v\.weight is quantised as I8, which cannot be read; use .* Q8_0",
        ),
    ],
)
def test_what_does_not_fit_is_found_before_the_first_copy(
    write: Write, load: Load, tensors: dict[str, Any], message: str
) -> None:
    directory = _directory(write())
    write(tensors=tensors)
    with pytest.raises(ModelError, match=message):
        load(directory)


def test_a_damaged_file_never_ends_in_another_error(write: Write, load: Load) -> None:
    path = write(kind=Kind.Q4_1)
    directory = _directory(path)
    whole = path.read_bytes()
    for size in [0, 3, 20, *range(24, len(whole), len(whole) // 20), len(whole) - 64]:
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"tiny\.gguf"):
            load(directory)
    chance = random.Random(0)
    header = whole.index(b"output_norm.weight") + 2000  # the list of tensors, and some of them
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[chance.randrange(header)] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        with suppress(ModelError):
            checkpoint = read_checkpoint(directory)
            for name in checkpoint.entries:
                checkpoint.floats(name)
                checkpoint.quantized_weight(name)
