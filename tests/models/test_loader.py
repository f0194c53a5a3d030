"""Checkpoints: sharded and fused right, and refused with all that is wrong in one message."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_weights import dense, weights_by_name
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from specserve.models.fields import ModelError
from specserve.models.llama import LlamaModel

Load = Callable[..., LlamaModel]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def directory(save_reference: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
    """A small checkpoint of one file."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    save_reference(config)
    return tmp_path


def _tensors(directory: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(directory / "model.safetensors")
    return tensors


def _write(directory: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def test_weights_are_fused_in_order_and_cast(directory: Path, load: Load) -> None:
    tensors = _tensors(directory)
    model = load(directory, torch.bfloat16)
    attention = model.layers[1].attention
    parts = [tensors[Q_PROJ.replace("q_proj", f"{p}_proj")] for p in "qkv"]
    assert torch.equal(dense(attention.qkv), torch.cat(parts).bfloat16())
    parts = [tensors[f"model.layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")]
    assert torch.equal(dense(model.layers[0].mlp.gate_up), torch.cat(parts).bfloat16())
    assert torch.equal(model.norm.weight, tensors["model.norm.weight"])  # norms stay float32


def test_shards_load_like_one_file(directory: Path, load: Load) -> None:
    whole = weights_by_name(load(directory))
    tensors = _tensors(directory)
    (directory / "model.safetensors").unlink()
    names = sorted(tensors)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    index = {"weight_map": {name: file for file, part in shards.items() for name in part}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    sharded = weights_by_name(load(directory))
    assert sharded.keys() == whole.keys()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


def test_all_missing_and_unexpected_tensors_in_one_error(directory: Path, load: Load) -> None:
    tensors = _tensors(directory)
    del tensors[Q_PROJ], tensors["lm_head.weight"]
    tensors |= {"extra.one": torch.ones(1), "extra.two": torch.ones(1)}
    _write(directory, tensors)
    with pytest.raises(ModelError) as error:
        load(directory)
    assert f"2 missing: lm_head.weight, {Q_PROJ}" in str(error.value)
    assert "2 unexpected: extra.one, extra.two" in str(error.value)


def test_a_shape_that_config_does_not_say(directory: Path, load: Load) -> None:
    tensors = _tensors(directory)
    tensors[Q_PROJ] = torch.ones(16, 12)
    _write(directory, tensors)
    with pytest.raises(ModelError, match=rf"{Q_PROJ} has shape \[16, 12\].*\[16, 16\]"):
        load(directory)


def test_quantised_tensors_are_refused(directory: Path, load: Load) -> None:
    tensors = _tensors(directory)
    tensors[Q_PROJ] = torch.ones(16, 16, dtype=torch.int8)
    _write(directory, tensors)
    with pytest.raises(ModelError, match=f"{Q_PROJ} has dtype I8"):
        load(directory)


@pytest.mark.parametrize("suffix", ["bin", "pt", "pth"])
def test_pickled_weights_are_refused(directory: Path, load: Load, suffix: str) -> None:
    (directory / "model.safetensors").rename(directory / f"pytorch_model.{suffix}")
    with pytest.raises(ModelError, match=f"pytorch_model.{suffix}.*convert.*safetensors"):
        load(directory)


def test_no_weights_at_all(directory: Path, load: Load) -> None:
    (directory / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no model\.safetensors"):
        load(directory)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("gone.safetensors", "gone.safetensors is listed but not there"),
        ("../model.safetensors", f"{Q_PROJ} = '../model.safetensors': .* no.* plain file name"),
        (7, f"{Q_PROJ} = 7: .* no.* plain file name"),
    ],
)
def test_an_index_that_points_elsewhere(
    directory: Path, load: Load, file: Any, message: str
) -> None:
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {Q_PROJ: file}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=message):
        load(directory)


def _raw(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def _entry(start: int, end: int, shape: tuple[int, ...] = (2,)) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": (start, end)}


def _file(data: int, **entries: dict[str, Any]) -> bytes:
    return _raw(json.dumps(entries).encode(), bytes(data))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes but the file has 0"),
        (b"PK\x03\x04zipped pickle", "claims .* bytes but the file has 17"),
        ((10**7).to_bytes(8, "little") + b"{}", "claims 10000000 bytes but the file has 10"),
        (_raw(b"not json"), "not a safetensors header"),
        (_raw(b'{"a": 1}'), "not a safetensors header"),
        (_file(8, a=_entry(0, 8), b=_entry(8, 16)), "take 16 bytes but 8 follow"),
        (_file(24, a=_entry(0, 8), b=_entry(8, 16)), "take 16 bytes but 24 follow"),
        (_file(12, a=_entry(0, 8), b=_entry(4, 12)), r"b \[2\] F32 lies at bytes 4 to 12"),
        (_file(20, a=_entry(0, 8), b=_entry(12, 20)), "expected 8 to 16"),
        (_file(8, a=_entry(0, 8, (3,))), r"a \[3\] F32 lies at bytes 0 to 8; expected 0 to 12"),
        (_file(0, a=_entry(0, -8, (-2,))), r"a \[-2\]"),
    ],
)
def test_damaged_files_are_refused_before_mapping(
    directory: Path, load: Load, content: bytes, message: str
) -> None:
    (directory / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match=message) as error:
        load(directory)
    assert "model.safetensors" in str(error.value)


def test_a_file_cut_short_is_refused(directory: Path, load: Load) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(ModelError, match="cut short"):
        load(directory)
