"""Weights as tools write them: what is missing, what is too many, whose word counts."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_weights import weights_by_name
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from specserve.models.fields import ModelError
from specserve.models.llama import LlamaModel

Load = Callable[..., LlamaModel]
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.fixture
def tensors(save_reference: Callable[..., PreTrainedModel], tmp_path: Path) -> dict[str, Tensor]:
    """Those of a model of two layers; its config.json is in tmp_path, its weights no longer."""
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
    file = tmp_path / "model.safetensors"
    tensors: dict[str, Tensor] = load_file(file)
    file.unlink()
    return tensors


def _save(directory: Path, tensors: dict[str, Tensor], **config: Any) -> Path:
    save_file(
        {name: value.clone() for name, value in tensors.items()}, directory / "model.safetensors"
    )
    _set_config(directory, **config)
    return directory


def _set_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def _shards(
    directory: Path, tensors: dict[str, Tensor], again: dict[str, Tensor] | None = None
) -> dict[str, str]:
    """Two files, the second one with the tensors `again`, and what an index would say of them."""
    names = sorted(tensors)
    parts = [names[:10], names[10:]]
    for file, part, more in zip(SHARDS, parts, ({}, again or {}), strict=True):
        save_file({**{name: tensors[name].clone() for name in part}, **more}, directory / file)
    return {name: file for file, part in zip(SHARDS, parts, strict=True) for name in part}


def _index(directory: Path, weight_map: dict[str, str]) -> Path:
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text)
    return directory


def _assert_holds(model: LlamaModel, tensors: dict[str, Tensor]) -> None:
    weights = weights_by_name(model)
    assert weights.keys() <= tensors.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, tensors[name]), name


def test_a_head_that_is_not_the_embedding_is_kept(
    tensors: dict[str, Tensor], load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model = load(_save(tmp_path, tensors, tie_word_embeddings=True))
    _assert_holds(model, tensors)
    assert not model.shape.tied_head
    assert f"{HEAD} differs from {EMBED}" in caplog.text


@pytest.mark.parametrize("kept", [(EMBED,), (HEAD,), (EMBED, HEAD)])
def test_a_head_that_is_the_embedding_may_be_under_either_name(
    tensors: dict[str, Tensor], load: Load, tmp_path: Path, kept: tuple[str, ...]
) -> None:
    tensors[HEAD] = tensors[EMBED]
    left = {name: t for name, t in tensors.items() if name in kept or name not in (EMBED, HEAD)}
    model = load(_save(tmp_path, left, tie_word_embeddings=True))
    _assert_holds(model, tensors)
    assert model.head.method is model.embedding


@pytest.mark.parametrize(
    "extra",
    [
        {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)},
        {"model.rotary_emb.inv_freq": torch.ones(2)},
        {"model.layers.1.self_attn.rotary_emb.cos_cached": torch.ones(1, 1, 32, 4)},
        {"model.layers.1.self_attn.rotary_emb.sin_cached": torch.ones(32, 4).bfloat16()},
        {"model.position_ids": torch.arange(32)[None]},
        {"model.embeddings.position_ids": torch.arange(32.0)},
        {"model.layers.0.self_attn.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool)},
        {"model.causal_mask": torch.ones(8, 8, dtype=torch.uint8)},
        {"model.layers.0.self_attn.masked_bias": torch.tensor(-1e4)},
        {"model.layers.2.mlp.down_proj.weight": torch.ones(16, 24)},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_what_makes_no_difference_is_left_out(
    tensors: dict[str, Tensor], load: Load, tmp_path: Path, extra: dict[str, Tensor]
) -> None:
    _assert_holds(load(_save(tmp_path, {**tensors, **extra})), tensors)


def test_layers_beyond_the_config_are_left_out_and_said(
    tensors: dict[str, Tensor], load: Load, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model = load(_save(tmp_path, tensors, num_hidden_layers=1))
    _assert_holds(model, tensors)
    assert "2 layers, num_hidden_layers is 1" in caplog.text


def test_a_model_saved_without_its_head_has_no_prefix(
    tensors: dict[str, Tensor], load: Load, tmp_path: Path
) -> None:
    bare = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    _assert_holds(load(_save(tmp_path, bare)), tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.scale": torch.ones(())}, r"1 unexpected: model\.scale"),
        ({"model.layers.0.self_attn.q_norm.weight": torch.ones(4)}, "1 unexpected: .*q_norm"),
        ({Q_PROJ: torch.ones(16, 16, dtype=torch.int8)}, f"{Q_PROJ} has dtype I8, .*float16"),
        ({Q_PROJ: torch.ones(16, 16).to(torch.float8_e4m3fn)}, f"{Q_PROJ} has dtype F8_E4M3"),
        ({HEAD: None}, f"1 missing: {HEAD}; set tie_word_embeddings to true"),
        ({Q_PROJ: None}, f"1 missing: {Q_PROJ}; fetch the checkpoint again"),
        (
            {
                Q_PROJ: None,
                Q_PROJ.replace("weight", "qweight"): torch.ones(2, 16, dtype=torch.int32),
                Q_PROJ.replace("weight", "scales"): torch.ones(1, 16),
            },
            "1 missing: .*they are quantised: use the float16 or bfloat16 checkpoint",
        ),
    ],
)
def test_what_would_change_the_answers_is_refused_with_the_fix(
    tensors: dict[str, Tensor],
    load: Load,
    tmp_path: Path,
    change: dict[str, Tensor | None],
    message: str,
) -> None:
    changed = {name: t for name, t in {**tensors, **change}.items() if t is not None}
    with pytest.raises(ModelError, match=message):
        load(_save(tmp_path, changed))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_a_prefix_of_a_tool_is_named(
    tensors: dict[str, Tensor], load: Load, tmp_path: Path, prefix: str
) -> None:
    with pytest.raises(ModelError, match=f"names begin with '{prefix}': save .* without it"):
        load(_save(tmp_path, {prefix + name: tensor for name, tensor in tensors.items()}))


def test_a_tensor_in_two_files(tensors: dict[str, Tensor], load: Load, tmp_path: Path) -> None:
    """Tools do not agree on which one counts: it may be there twice only if both are the same."""
    weight_map = _shards(tmp_path, tensors, {HEAD: tensors[HEAD].clone()})
    _assert_holds(load(_index(tmp_path, weight_map)), tensors)
    _shards(tmp_path, tensors, {HEAD: tensors[HEAD] * 2})
    message = f"{SHARDS[1]}: {HEAD} is also in {SHARDS[0]}, with other values; the index says "
    with pytest.raises(ModelError, match=message + SHARDS[0]):
        load(tmp_path)


def test_tensors_that_the_index_leaves_out_or_puts_elsewhere(
    tensors: dict[str, Tensor], load: Load, tmp_path: Path
) -> None:
    """One that the model needs is used; another was not meant to be."""
    weight_map = _shards(tmp_path, tensors, {"extra.weight": torch.ones(2)})
    _assert_holds(load(_index(tmp_path, {**weight_map, HEAD: SHARDS[1]})), tensors)
    del weight_map[HEAD]
    _assert_holds(load(_index(tmp_path, weight_map)), tensors)


def test_a_tensor_that_its_file_lacks(
    tensors: dict[str, Tensor], load: Load, tmp_path: Path
) -> None:
    weight_map = _shards(tmp_path, tensors)
    second = load_file(tmp_path / SHARDS[1])
    del second[Q_PROJ]
    save_file(second, tmp_path / SHARDS[1])
    message = f"1 missing: {Q_PROJ}; the index says that {SHARDS[1]} has what is missing: fetch it"
    with pytest.raises(ModelError, match=message):
        load(_index(tmp_path, weight_map))


def test_a_lone_file_of_another_name_is_named(
    tensors: dict[str, Tensor], load: Load, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "model.fp16.safetensors")
    with pytest.raises(
        ModelError, match=r"no model\.safetensors.*; if model\.fp16\.safetensors has"
    ):
        load(tmp_path)
