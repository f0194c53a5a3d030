"""Every field of a config.json is understood, known to be harmless, or refused by its name."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import (
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from specserve.models.fields import ModelError
from specserve.models.shape import ModelShape

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **SIZES}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SIZES}
FULL, SLIDING = "full_attention", "sliding_attention"


def _read(directory: Path, config: dict[str, Any]) -> ModelShape:
    (directory / "config.json").write_text(json.dumps(config))
    return ModelShape.from_dir(directory)


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_what_transformers_writes_is_read(tmp_path: Path, kind: type[PretrainedConfig]) -> None:
    """The whole of it, defaults too, and beside it how its generation is set by default."""
    names = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}
    config = kind(architectures=[f"{names[kind.model_type]}ForCausalLM"], **SIZES)
    generation: Any = GenerationConfig
    written = {**generation(temperature=0.7).to_dict(), **config.to_dict()}
    shape = _read(tmp_path, written)
    assert (shape.num_layers, shape.num_kv_heads) == (3, 2)


# As published files have them, beside the sizes.
PUBLISHED: dict[str, dict[str, Any]] = {
    "an early Llama": {
        **LLAMA,
        "_name_or_path": "llama",
        "max_sequence_length": 2048,
        "initializer_range": 0.02,
        "torch_dtype": "float16",
        "transformers_version": "4.28.0",
        "use_cache": True,
    },
    "SmolLM2": {
        **LLAMA,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "is_llama_config": True,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "a Llama 3 that was tuned": {
        **LLAMA,
        "_attn_implementation_autoset": True,
        "head_dim": 8,
        "pad_token_id": 5,
        "rope_scaling": {
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 64,
            "rope_type": "llama3",
        },
        "unsloth_fixed": True,
        "unsloth_version": "2024.9",
        "temperature": 0.6,
        "max_length": 4096,
        "do_sample": True,
    },
    "a Qwen2.5": {
        **QWEN2,
        "max_window_layers": 28,
        "sliding_window": 131072,
        "use_sliding_window": False,
        "use_mrope": False,
        "layer_types": [FULL] * 3,
    },
    "a YaRN of its authors": {
        **MISTRAL,
        "sliding_window": 4096,
        "rope_scaling": {
            "factor": 2.0,
            "finetuned": True,
            "original_max_position_embeddings": 64,
            "type": "yarn",
        },
    },
    "parts that are switched off": {
        **LLAMA,
        "no_rope_layers": [],
        "num_local_experts": 0,
        "attn_logit_softcapping": None,
        "use_qk_norm": False,
        "logits_scaling": 1.0,
        "is_causal": True,
        "quantization_config": None,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(tmp_path: Path, name: str) -> None:
    assert _read(tmp_path, PUBLISHED[name]).num_layers == 3


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        (LLAMA, {"embedding_multiplier": 12.0}),
        (LLAMA, {"logits_scaling": 8}),
        (LLAMA, {"logit_scale": 0.0625}),
        (LLAMA, {"attention_multiplier": 0.015}),
        (LLAMA, {"residual_multiplier": 0.22}),
        (LLAMA, {"attn_logit_softcapping": 50.0}),
        (LLAMA, {"final_logit_softcapping": 30.0}),
        (LLAMA, {"no_rope_layers": [1, 1, 0]}),
        (LLAMA, {"num_local_experts": 8}),
        (LLAMA, {"rope_interleaved": True}),
        (LLAMA, {"is_causal": False}),
        (LLAMA, {"per_layer_config": {"1": {"num_key_value_heads": 4}}}),
        (LLAMA, {"use_qk_norm": True}),
        (LLAMA, {"original_max_position_embeddings": 64}),
        (LLAMA, {"quantization": {"bits": 4}}),
        (LLAMA, {"model_type": "granite"}),
        (LLAMA, {"layer_types": [FULL, SLIDING, FULL], "sliding_window": 16}),
        (MISTRAL, {"attention_bias": True}),
        (MISTRAL, {"use_sliding_window": False, "sliding_window": 16}),
        (MISTRAL, {"layer_types": [FULL, SLIDING, FULL], "sliding_window": None}),
        (MISTRAL, {"layer_types": [FULL, "chunked_attention", FULL]}),
        (MISTRAL, {"layer_types": [FULL]}),
        (MISTRAL, {"layer_types": "full"}),
        (QWEN2, {"layer_types": [SLIDING] * 3, "use_sliding_window": False}),
        (QWEN2, {"mlp_bias": True}),
        (QWEN2, {"dual_chunk_attention_config": {"chunk_size": 64}}),
        (LLAMA, {"rope_scaling": {"factor": 4.0}}),
        (LLAMA, {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "alpha": 2.0}}),
        (LLAMA, {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 1e6}}}),
        (
            LLAMA,
            {
                "rope_scaling": {"rope_type": "linear", "factor": 4.0},
                "rope_parameters": {"rope_type": "linear", "factor": 2.0},
            },
        ),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    tmp_path: Path, family: dict[str, Any], fields: dict[str, Any]
) -> None:
    with pytest.raises(ModelError, match=next(iter(fields))) as error:
        _read(tmp_path, {**family, **fields})
    assert str(error.value).startswith(f"{tmp_path / 'config.json'}: ")


def test_only_some_of_very_many_fields_are_named(tmp_path: Path) -> None:
    config = {**LLAMA, **{f"odd_{i}": "x" * 1000 for i in range(1000)}}
    with pytest.raises(
        ModelError, match=r"odd_0 = 'x+\.\.\.x+', .* and 995 more: not supp"
    ) as error:
        _read(tmp_path, config)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("config", "windows"),
    [
        ({**MISTRAL, "sliding_window": 16, "layer_types": [FULL, SLIDING, FULL]}, (0, 16, 0)),
        ({**MISTRAL, "sliding_window": 16, "layer_types": [SLIDING] * 3}, (16, 16, 16)),
        ({**MISTRAL, "sliding_window": None, "layer_types": [FULL] * 3}, (0, 0, 0)),
        ({**MISTRAL, "sliding_window": None, "use_sliding_window": False}, (0, 0, 0)),
        ({**QWEN2, "use_sliding_window": True, "max_window_layers": 2}, (0, 0, 4096)),
        ({**QWEN2, "use_sliding_window": True, "sliding_window": None}, (0, 0, 0)),
        ({**LLAMA, "sliding_window": 16, "layer_types": [FULL] * 3}, (0, 0, 0)),
    ],
)
def test_each_layer_has_the_window_the_config_says(
    tmp_path: Path, config: dict[str, Any], windows: tuple[int, ...]
) -> None:
    assert _read(tmp_path, config).windows == windows


def test_the_type_names_a_model_whose_architecture_is_not_said(tmp_path: Path) -> None:
    config = {name: value for name, value in QWEN2.items() if name != "architectures"}
    assert _read(tmp_path, config).architecture == "Qwen2ForCausalLM"
    assert _read(tmp_path, {**config, "architectures": None}).qkv_bias


def test_no_number_of_kv_heads_and_null(tmp_path: Path) -> None:
    """Null stands for as many as query heads; a family has its own number for nothing at all."""
    config = {**MISTRAL, "num_attention_heads": 16}
    del config["num_key_value_heads"]
    assert _read(tmp_path, config).num_kv_heads == 8
    assert _read(tmp_path, {**config, "num_key_value_heads": None}).num_kv_heads == 16
