"""Tiny GGUF files, and what transformers makes of one: all by the gguf package, none by ours."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

Tensors = dict[str, np.ndarray[Any, Any]]
CONTROL = gguf.TokenType.CONTROL
# 256 bytes, three merges, then what text spells whole
MERGES = ["h e", "l l", "he ll"]
TOKENS = [
    *sorted(ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
    "<|end|>",
    "<think>",
]
END = TOKENS.index("<|end|>")
_SIZES: dict[str, Any] = {
    "vocab_size": len(TOKENS),
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "eos_token_id": END,
    "initializer_range": 0.2,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**_SIZES),
    "llama with biases": LlamaConfig(attention_bias=True, mlp_bias=True, **_SIZES),
    "qwen3": Qwen3Config(**_SIZES),
}


def write_gguf(
    path: Path,
    metadata: dict[str, Any] | None = None,
    tensors: Tensors | None = None,
    *,
    arch: str = "llama",
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
) -> Path:
    """A file of a random model, its matrices in `kind`. A key whose metadata is None is left out.

    A tensor of bytes has the shape of the rows of `kind` as it stands in the file.
    """
    writer = gguf.GGUFWriter(path, arch)
    for key, value in {**_metadata(arch), **(metadata or {})}.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None and 0 <= value < 2**32:
            writer.add_uint32(key, value)
        elif value is not None:
            writer.add_int64(key, value)
    for name, tensor in (random_tensors(CONFIGS[arch]) if tensors is None else tensors).items():
        if tensor.ndim == 2 and kind != GGMLQuantizationType.F32:
            data = tensor if tensor.dtype == np.uint8 else gguf.quants.quantize(tensor, kind)
            writer.add_tensor(name, data, raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _metadata(arch: str) -> dict[str, Any]:
    return {
        f"{arch}.block_count": 2,
        f"{arch}.context_length": 64,
        f"{arch}.embedding_length": 64,
        f"{arch}.feed_forward_length": 96,
        f"{arch}.attention.head_count": 4,
        f"{arch}.attention.head_count_kv": 2,
        f"{arch}.attention.key_length": 16,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [1] * END + [CONTROL, gguf.TokenType.USER_DEFINED],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": END,
    }


def random_tensors(config: PretrainedConfig) -> Tensors:
    """A random transformers model as GGUF has it."""
    torch.manual_seed(0)
    reference: Any = AutoModelForCausalLM
    state = reference.from_config(config).state_dict()
    tensors = {}
    for name, theirs in _names(config, list(state)).items():
        tensor = state[name] if state[name].ndim > 1 else torch.randn_like(state[name])
        heads = _num_heads(config, name)
        if heads:  # rotary pairs side by side
            tensor = tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        tensors[theirs] = tensor.contiguous().numpy()
    return tensors


def load_reference(path: Path, config: PretrainedConfig) -> PreTrainedModel:
    """The model in the file as transformers runs it, in float32."""
    build: Any = AutoModelForCausalLM
    model: PreTrainedModel = build.from_config(config, dtype=torch.float32)
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    state = {}
    for name, theirs in _names(config, list(model.state_dict())).items():
        if theirs == "output.weight" and config.tie_word_embeddings:
            continue
        tensor = torch.tensor(gguf.quants.dequantize(found[theirs].data, found[theirs].tensor_type))
        heads = _num_heads(config, name)
        if heads:
            tensor = torch.unflatten(tensor, 0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
        state[name] = tensor
    model.load_state_dict(state, strict=not config.tie_word_embeddings)
    return model


def _names(config: PretrainedConfig, ours: list[str]) -> dict[str, str]:
    arch = getattr(gguf.MODEL_ARCH, config.model_type.upper())
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    return {name: str(names.get_name(name, (".weight", ".bias"))) for name in ours}


def _num_heads(config: PretrainedConfig, name: str) -> int:
    """How many heads' rows stand in another order in GGUF; 0: none."""
    if config.model_type != "llama":
        return 0
    parts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return int(parts.get(name.split(".")[-2], 0))
