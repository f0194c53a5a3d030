"""config.json to ModelShape: both spellings of rope, windows by layer, and every refusal."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from specserve.models.fields import ModelError
from specserve.models.rope import RopeShape, rotary_table
from specserve.models.shape import ModelShape

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def _read(directory: Path, generation: dict[str, Any] | None = None, **config: Any) -> ModelShape:
    (directory / "config.json").write_text(json.dumps({**LLAMA, **config}))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return ModelShape.from_dir(directory)


def test_what_a_bare_llama_config_means(tmp_path: Path) -> None:
    shape = _read(tmp_path)
    assert (shape.num_kv_heads, shape.head_dim, shape.group_size) == (4, 8, 1)
    assert shape.windows == (0, 0, 0)
    assert shape.rope == RopeShape(10000.0)
    assert [shape.tied_head, shape.qkv_bias, shape.o_bias, shape.mlp_bias] == [False] * 4


@pytest.mark.parametrize(
    "old",
    [
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ],
)
def test_both_spellings_of_rope_mean_the_same(tmp_path: Path, old: dict[str, Any]) -> None:
    new = {**old, "rope_theta": 5e5}
    shape = _read(tmp_path, rope_theta=5e5, rope_scaling=old)
    assert shape == _read(tmp_path, rope_parameters=new)
    assert (shape.rope.kind, shape.rope.theta) == (old.get("rope_type", "yarn"), 5e5)


@pytest.mark.parametrize("kind", ["llama3", "yarn", "linear"])
def test_rotary_frequencies_equal_the_reference(tmp_path: Path, kind: str) -> None:
    rope = {
        "rope_type": kind,
        "rope_theta": 1e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 4096,
    }
    sizes: dict[str, Any] = {
        "num_attention_heads": 1,
        "hidden_size": 128,
        "max_position_embeddings": 32768,
    }
    shape = _read(tmp_path, rope_parameters=rope, **sizes)
    inverse, factor = ROPE_INIT_FUNCTIONS[kind](LlamaConfig(rope_parameters=rope, **sizes))
    cos, sin = rotary_table(shape.rope, 128, 3000)
    angles = inverse * 2999.0
    assert (cos[2999] - angles.cos() * factor).abs().max() < 1e-4
    assert (sin[2999] - angles.sin() * factor).abs().max() < 1e-4


def test_yarn_extends_the_declared_context(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
    assert _read(tmp_path, rope_scaling=scaling).max_position_embeddings == 512


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 16}, (16, 16, 16)),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, (0, 0, 0)),
        ({"architectures": ["MistralForCausalLM"]}, (4096, 4096, 4096)),
        ({"sliding_window": 16}, (0, 0, 0)),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 16}, (0, 0, 0)),
        (
            {
                "architectures": ["Qwen2ForCausalLM"],
                "sliding_window": 16,
                "use_sliding_window": True,
                "max_window_layers": 2,
            },
            (0, 0, 16),
        ),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "sliding_window": 16,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
            (16, 0, 0),
        ),
    ],
)
def test_windows_by_layer(tmp_path: Path, config: dict[str, Any], windows: tuple[int, ...]) -> None:
    assert _read(tmp_path, **{"num_key_value_heads": 2, **config}).windows == windows


def test_end_tokens_come_from_both_files(tmp_path: Path) -> None:
    more = {"bos_token_id": 1, "pad_token_id": -1}  # early Llama models have such a padding
    shape = _read(tmp_path, {"eos_token_id": [7, 5]}, eos_token_id=5, **more)
    assert shape.eos_token_ids == (7, 5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel.*supported: Llama"),
        ({"architectures": None}, "architectures = None"),
        ({"auto_map": {"AutoModel": "evil.py"}}, "auto_map.*never"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config.*awq"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"vocab_size": "64"}, "vocab_size = '64': expected an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3.*divide"),
        ({"num_attention_heads": 5}, "num_attention_heads = 5.*hidden_size"),
        ({"head_dim": 7}, "head_dim = 7.*even"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0"),
        ({"rope_theta": 0.5}, "rope_theta = 0.5"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope.*default, linear, llama3, yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings = 1"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id.*token id"),
        (
            {
                "architectures": ["Qwen3ForCausalLM"],
                "num_key_value_heads": 2,
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["full_attention"],
            },
            "layer_types.*expected 3",
        ),
    ],
)
def test_refusals_name_the_field(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message) as error:
        _read(tmp_path, **config)
    assert str(tmp_path / "config.json") in str(error.value)


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe", b'{"a":' * 100_000])
def test_a_config_that_is_no_json_object(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match="not a JSON object"):
        ModelShape.from_dir(tmp_path)


def test_a_directory_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=re.escape(str(tmp_path / "config.json"))):
        ModelShape.from_dir(tmp_path)
