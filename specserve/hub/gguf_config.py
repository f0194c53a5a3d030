"""config.json out of GGUF metadata.

Owns the translation of names and of rope scaling. Knows nothing of weights beyond which are there.
"""

import math
from typing import Any

import numpy as np

from specserve.hub.errors import HubError
from specserve.hub.gguf_file import GgufFile

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_REQUIRED = object()


class GgufFields:
    """Metadata of one file, with errors that name the key."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self.architecture = self.text("general.architecture")

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = _REQUIRED) -> Any:
        """A value of `kind`; `{arch}` in the key is the architecture. Raises `HubError`."""
        key = key.replace("{arch}.", f"{getattr(self, 'architecture', '')}.")
        value = self._file.metadata.get(key, default)
        if value is _REQUIRED:
            raise HubError(f"{self._file.path}: {key} is missing; fetch a complete file")
        if value is not default and not isinstance(value, kind):
            raise HubError(f"{self._file.path}: {key} = {value!r} is not usable")
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        return self.get(key, str, default)

    def integer(self, key: str, default: Any = _REQUIRED) -> Any:
        return self.get(key, int, default)

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.get(key, (int, float), default)
        return _short(value) if isinstance(value, float) else value

    def texts(self, key: str) -> list[str]:
        values: list[str] = self.get(key, list)
        if not all(isinstance(value, str) for value in values):
            raise self.refuse(f"{key} is not a list of strings")
        return values

    def refuse(self, reason: str) -> HubError:
        return HubError(f"{self._file.path}: {reason}")


def read_config(file: GgufFile) -> dict[str, Any]:
    """The content of config.json. Raises `HubError` for models that cannot be run."""
    fields = GgufFields(file)
    if fields.architecture not in ARCHITECTURES:
        raise fields.refuse(
            f"architecture {fields.architecture!r} is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}; a directory with safetensors may be"
        )
    if fields.integer("split.count", 1) > 1:
        raise fields.refuse("it is one part of several; merge them with llama-gguf-split first")
    if fields.integer("{arch}.expert_count", 0):
        raise fields.refuse("mixtures of experts are not supported")
    hidden_size = fields.integer("{arch}.embedding_length")
    num_heads = fields.integer("{arch}.attention.head_count")
    head_dim = fields.integer("{arch}.attention.key_length", hidden_size // max(num_heads, 1))
    if num_heads < 1 or head_dim < 2 or head_dim % 2:
        raise fields.refuse(f"{num_heads} heads of size {head_dim} are not usable")
    if fields.integer("{arch}.rope.dimension_count", head_dim) != head_dim:
        raise fields.refuse("rotary positions on a part of each head are not supported")
    return {
        "architectures": [ARCHITECTURES[fields.architecture]],
        "model_type": fields.architecture,
        "vocab_size": _vocab_size(file, fields),
        "hidden_size": hidden_size,
        "intermediate_size": fields.integer("{arch}.feed_forward_length"),
        "num_hidden_layers": fields.integer("{arch}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.integer("{arch}.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": fields.number("{arch}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": fields.integer("{arch}.context_length"),
        "rope_theta": fields.number("{arch}.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, fields),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "bos_token_id": fields.integer("tokenizer.ggml.bos_token_id", None),
        "eos_token_id": fields.integer("tokenizer.ggml.eos_token_id", None),
        "pad_token_id": fields.integer("tokenizer.ggml.padding_token_id", None),
        "torch_dtype": "bfloat16",
    }


def _vocab_size(file: GgufFile, fields: GgufFields) -> int:
    if "token_embd.weight" not in file.tensors:
        raise fields.refuse("token_embd.weight is missing; fetch a complete file")
    return file.tensors["token_embd.weight"].shape[0]


def _rope_scaling(file: GgufFile, fields: GgufFields) -> dict[str, Any] | None:
    if "rope_freqs.weight" in file.tensors:
        return _llama3_scaling(file, fields)
    kind = fields.text("{arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": fields.number("{arch}.rope.scaling.factor")}
    if kind == "linear":
        return scaling
    if kind != "yarn":
        raise fields.refuse(f"rope scaling {kind!r} is not supported (linear and yarn are)")
    for key in ("{arch}.rope.scaling.attn_factor", "{arch}.rope.scaling.yarn_attn_factor"):
        if fields.number(key, 1.0) != 1.0:
            raise fields.refuse(f"{key.split('.')[-1]} other than 1 is not supported")
    original = fields.integer("{arch}.rope.scaling.original_context_length")
    scaling["original_max_position_embeddings"] = original
    for theirs, ours in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        value = fields.number(f"{{arch}}.rope.scaling.{theirs}", None)
        if value is not None:
            scaling[ours] = value
    return scaling


def _llama3_scaling(file: GgufFile, fields: GgufFields) -> dict[str, Any]:
    """Llama 3's smoothing is stored as the divisors it leads to; find the factor that does.

    Its other parameters have one value in every published model.
    """
    divisors = np.concatenate([*file.float_rows(file.tensors["rope_freqs.weight"])], axis=None)
    factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
    theta = fields.number("{arch}.rope.freq_base", 10000.0)
    turns = original / (2 * math.pi) * theta ** -(np.arange(len(divisors)) / len(divisors))
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    known = factor >= 1.0 and np.allclose(divisors * ((1.0 - keep) / factor + keep), 1.0, rtol=1e-3)
    if not known:
        raise fields.refuse("rope_freqs.weight follows no known rope scaling; use safetensors")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _short(value: float) -> float:
    """The shortest number with the same float32 value: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))
