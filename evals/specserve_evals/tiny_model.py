"""A tiny random Llama on disk: a target that needs no download and loads at once."""

import json
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as HfTokenizer
from tokenizers import models as hf_models
from tokenizers import pre_tokenizers

TINY_VOCAB: Final = 97
TINY_EOS: Final = 96


def write_tiny_llama(
    directory: Path,
    *,
    seed: int,
    vocab_size: int = TINY_VOCAB,
    num_layers: int = 2,
    context: int = 512,
    sharpness: float = 6.0,
    head_dim: int = 8,
) -> Path:
    """A random Llama with GQA 2. `sharpness` scales the head: how far from uniform it is."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner, heads, kv_heads = 32, 64, 4, 2

    def weights(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).mul(shape[-1] ** -0.5)

    tensors = {
        "model.embed_tokens.weight": weights(vocab_size, hidden) * hidden**0.5,
        "model.norm.weight": torch.ones(hidden),
        "lm_head.weight": weights(vocab_size, hidden) * sharpness,
    }
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        tensors |= {
            prefix + "input_layernorm.weight": torch.ones(hidden),
            prefix + "post_attention_layernorm.weight": torch.ones(hidden),
            prefix + "self_attn.q_proj.weight": weights(heads * head_dim, hidden) * 2,
            prefix + "self_attn.k_proj.weight": weights(kv_heads * head_dim, hidden) * 2,
            prefix + "self_attn.v_proj.weight": weights(kv_heads * head_dim, hidden),
            prefix + "self_attn.o_proj.weight": weights(hidden, heads * head_dim),
            prefix + "mlp.gate_proj.weight": weights(inner, hidden),
            prefix + "mlp.up_proj.weight": weights(inner, hidden),
            prefix + "mlp.down_proj.weight": weights(hidden, inner),
        }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": context,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 0,
        "eos_token_id": vocab_size - 1,
    }
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    write_tiny_tokenizer(directory, [f"w{i}" for i in range(vocab_size)])
    return directory


def write_tiny_tokenizer(directory: Path, words: list[str]) -> None:
    tokenizer = HfTokenizer(
        hf_models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
