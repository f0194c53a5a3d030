"""Builds the content of config.json from GGUF metadata."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from specserve.files import quoted, short
from specserve.hub.errors import HubError
from specserve.hub.gguf_file import GgufFile

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_REQUIRED = object()
_MAX_INTEGER = 2**31 - 1
_MAX_NUMBER = 1e12
# Metadata keys that may stay unread: these at any value, those of `_NEUTRAL` at the listed value
# only. Some of these matter to certain configurations, which read them explicitly.
_NAMES = """
    vocab_size expert_used_count tensor_data_layout use_parallel_residual pooling_type
    decoder_start_token_id attention.layer_norm_epsilon rope.scaling.finetuned
    rope.scaling.original_context_length rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
"""
_HARMLESS = frozenset(_NAMES.split())
_NEUTRAL: Mapping[str, Any] = {
    "logit_scale": 1.0,
    "residual_scale": 1.0,
    "embedding_scale": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.yarn_attn_factor": 1.0,
    "rope.scaling.yarn_ext_factor": 1.0,
}
_SAMPLING: Mapping[str, str] = {  # field of generation_config.json -> key
    "temperature": "temp",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "penalty_repeat",
}


class GgufFields:
    """Typed access to the metadata of one file, which records the keys that were read.

    In a key `{arch}` stands for the architecture. Getters raise `HubError`, naming the file and the
    key, if the value has another type or is absent without a default.
    """

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        self._read: set[str] = set()
        self.architecture = self.text("general.architecture")

    def get(self, key: str, kinds: tuple[type, ...], default: Any = _REQUIRED) -> Any:
        key = self._full(key)
        self._read.add(key)
        value = self._file.metadata.get(key, default)
        if value is _REQUIRED:
            raise self.error(f"{key} is missing; fetch a complete file")
        if value is not default and type(value) not in kinds:
            raise self.value_error(key)
        return value

    def text(self, key: str, default: Any = _REQUIRED) -> Any:
        return self.get(key, (str,), default)

    def integer(
        self, key: str, default: Any = _REQUIRED, *, low: int = 0, high: int = _MAX_INTEGER
    ) -> Any:
        """An integer from `low` to `high`, or a list per layer whose elements all are the same."""
        value = self.get(key, (int, list), default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is not default and (type(value) is not int or not low <= value <= high):
            raise self.value_error(key, f"expected an integer from {low} to {high}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        value = self.get(key, (int, float), default)
        if value is not default and not 0 <= value <= _MAX_NUMBER:  # also rejects NaN
            raise self.value_error(key, f"expected a number from 0 to {_MAX_NUMBER:g}")
        # The shortest decimal with the same float32 value: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    def texts(self, key: str) -> list[str]:
        values: list[str] = self.get(key, (list,))
        if not all(isinstance(value, str) for value in values):
            raise self.error(f"{key} is not a list of strings")
        return values

    def error(self, reason: str) -> HubError:
        return HubError(f"{self._file.path}: {reason}")

    def value_error(self, key: str, reason: str = "it is of another type") -> HubError:
        key = self._full(key)
        value = quoted(self._file.metadata.get(key))
        return self.error(f"{key} = {value} is not usable: {reason}")

    def reject_unread(self) -> None:
        """Raise `HubError` for a key of the architecture that was not read.

        Exempt are harmless keys, and values that are neutral, zero, false or empty.
        """
        prefix = f"{self.architecture}."
        for key, value in self._file.metadata.items():
            name = key.removeprefix(prefix)
            if (
                key.startswith(prefix)
                and key not in self._read
                and name not in _HARMLESS
                and value
                and _NEUTRAL.get(name) != value
            ):
                raise self.error(
                    f"{short(key)} = {quoted(value)}: not supported, and may change what the "
                    f"model computes; use a directory with safetensors"
                )

    def _full(self, key: str) -> str:
        return key.replace("{arch}.", f"{getattr(self, 'architecture', '')}.")


def read_config(file: GgufFile) -> dict[str, Any]:
    """The content of config.json. Raises `HubError` for a model that is not supported."""
    fields = GgufFields(file)
    if fields.architecture not in ARCHITECTURES:
        raise fields.error(
            f"architecture {quoted(fields.architecture)} is not supported; supported: "
            f"{', '.join(ARCHITECTURES)}; a directory with safetensors may be"
        )
    if fields.integer("split.count", 1) > 1:
        raise fields.error("it is one part of several; merge them with llama-gguf-split first")
    if fields.integer("{arch}.expert_count", 0):
        raise fields.error("mixtures of experts are not supported")
    if not fields.get("{arch}.attention.causal", (bool,), True):
        raise fields.value_error("{arch}.attention.causal", "only true is supported")
    num_heads = fields.integer("{arch}.attention.head_count", low=1)
    head_dim = _head_dim(fields, num_heads)
    if "token_embd.weight" not in file.tensors:
        raise fields.error("token_embd.weight is missing; fetch a complete file")
    config = {
        "architectures": [ARCHITECTURES[fields.architecture]],
        "model_type": fields.architecture,
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": fields.integer("{arch}.embedding_length", low=1),
        "intermediate_size": fields.integer("{arch}.feed_forward_length", low=1),
        "num_hidden_layers": fields.integer("{arch}.block_count", low=1),
        "num_attention_heads": num_heads,
        "num_key_value_heads": fields.integer("{arch}.attention.head_count_kv", num_heads, low=1),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": fields.number("{arch}.attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": fields.integer("{arch}.context_length", low=2),
        "rope_theta": fields.number("{arch}.rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, fields, head_dim),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_output.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in file.tensors,
        "bos_token_id": fields.integer("tokenizer.ggml.bos_token_id", None),
        "eos_token_id": fields.integer("tokenizer.ggml.eos_token_id", None),
        "pad_token_id": fields.integer("tokenizer.ggml.padding_token_id", None),
        "torch_dtype": "bfloat16",
    }
    fields.reject_unread()
    return config


def read_sampling(file: GgufFile) -> dict[str, float]:
    """The sampling parameters that the file recommends, by their names in generation_config.json.

    Raises `HubError` for one of the wrong type.
    """
    fields = GgufFields(file)
    found = {
        name: fields.number(f"general.sampling.{key}", None) for name, key in _SAMPLING.items()
    }
    found["top_k"] = fields.integer("general.sampling.top_k", None, low=-1)
    return {name: value for name, value in found.items() if value is not None}


def _head_dim(fields: GgufFields, num_heads: int) -> int:
    default = fields.integer("{arch}.embedding_length", low=1) // num_heads
    head_dim: int = fields.integer("{arch}.attention.key_length", default, low=2)
    if head_dim < 2 or head_dim % 2:
        raise fields.error(f"{num_heads} heads of size {head_dim} are not usable")
    if fields.integer("{arch}.attention.value_length", head_dim) != head_dim:
        raise fields.value_error("{arch}.attention.value_length", f"keys have size {head_dim}")
    if fields.integer("{arch}.rope.dimension_count", head_dim) != head_dim:
        raise fields.error("rotary positions on a part of each head are not supported")
    scale = fields.number("{arch}.attention.scale", 0.0)
    if scale and not math.isclose(scale, head_dim**-0.5, rel_tol=1e-3):
        raise fields.value_error("{arch}.attention.scale", f"{head_dim**-0.5:g} is supported")
    return head_dim


def _rope_scaling(file: GgufFile, fields: GgufFields, head_dim: int) -> dict[str, Any] | None:
    """The `rope_scaling` section of config.json, or None.

    As in llama.cpp, a factor without a type means linear scaling, and `rope.scale_linear` is an
    older key for the factor.
    """
    kind = fields.text("{arch}.rope.scaling.type", "linear")
    factor = fields.number("{arch}.rope.scaling.factor", 0.0)
    older = fields.number("{arch}.rope.scale_linear", 0.0)
    factor = factor or older or 1.0
    if "rope_freqs.weight" in file.tensors:
        if factor != 1.0 and kind != "none":
            key = "{arch}.rope.scaling.factor"
            raise fields.value_error(key, "rope_freqs.weight scales as well")
        return _llama3_scaling(file, fields, head_dim)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    scaling = {"rope_type": kind, "factor": factor}
    if kind == "linear":
        return scaling
    if kind != "yarn":
        raise fields.error(f"rope scaling {quoted(kind)} is not supported (linear and yarn are)")
    for key in ("attn_factor", "yarn_attn_factor", "yarn_ext_factor"):
        if fields.number(f"{{arch}}.rope.scaling.{key}", 1) != 1:
            raise fields.error(f"{key} other than 1 is not supported")
    original = fields.integer("{arch}.rope.scaling.original_context_length", low=1)
    scaling["original_max_position_embeddings"] = original
    for name in ("beta_fast", "beta_slow"):
        if (value := fields.number(f"{{arch}}.rope.scaling.yarn_{name}", None)) is not None:
            scaling[name] = value
    return scaling


def _llama3_scaling(file: GgufFile, fields: GgufFields, head_dim: int) -> dict[str, Any]:
    """Recover the parameters of Llama 3's RoPE scaling from rope_freqs.weight.

    It has the divisor of each frequency; the largest one is the factor. The other parameters are
    those of all published models. Raises `HubError` if they do not reproduce the divisors.
    """
    tensor = file.tensors["rope_freqs.weight"]
    divisors = file.dequantized(file.rows(tensor), tensor.kind).reshape(-1)
    if len(divisors) != head_dim // 2:
        raise fields.error(f"rope_freqs.weight has {len(divisors)} values, not {head_dim // 2}")
    factor, low, high, original = float(divisors.max()), 1.0, 4.0, 8192
    theta = fields.number("{arch}.rope.freq_base", 10000.0)
    turns = original / (2 * math.pi) * theta ** -(np.arange(len(divisors)) / len(divisors))
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    known = factor >= 1.0 and np.allclose(divisors * ((1.0 - keep) / factor + keep), 1.0, rtol=1e-3)
    if not known:
        raise fields.error("rope_freqs.weight follows no known rope scaling; use safetensors")
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }
