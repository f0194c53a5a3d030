"""Maps the tensors of a GGUF file to checkpoint names and row order."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from specserve.files import listed
from specserve.hub.errors import HubError
from specserve.hub.gguf_file import GgufFile, GgufTensor

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_COMPUTED = {"rope_freqs.weight"}  # `gguf_config` converts it to rope_scaling in config.json


class SourceTensor(Struct, frozen=True):
    """A tensor of the file. Row i of the checkpoint's tensor is its row `row_order[i]`."""

    tensor: GgufTensor
    row_order: npt.NDArray[np.int64] | None  # None: the same order


def source_tensors(file: GgufFile, config: dict[str, Any]) -> dict[str, SourceTensor]:
    """The tensors of `file` by checkpoint name. `config` is the result of `read_config(file)`.

    Raises `HubError` naming the unknown tensors, or a query or key weight whose number of rows is
    not num_heads * head_dim.
    """
    return {
        ours: SourceTensor(file.tensors[theirs], _row_order(file, theirs, config))
        for theirs, ours in dict(_names(file)).items()
    }


def _names(file: GgufFile) -> Iterator[tuple[str, str]]:
    """Yield pairs of GGUF name and checkpoint name."""
    unknown = []
    for name in file.tensors:
        if name in _COMPUTED:
            continue
        base, _, kind = name.rpartition(".")
        prefix, _, part = base.rpartition(".")
        layer = prefix.removeprefix("blk.")
        if base in _TOP and kind == "weight":
            yield name, f"{_TOP[base]}.{kind}"
        elif part in _LAYER and prefix == f"blk.{layer}" and layer.isdecimal():
            yield name, f"model.layers.{layer}.{_LAYER[part]}.{kind}"
        else:
            unknown.append(name)
    if unknown:
        raise HubError(
            f"{file.path}: {len(unknown)} tensors are unknown: {listed(sorted(unknown))}; "
            f"use a directory with safetensors"
        )


def _row_order(file: GgufFile, name: str, config: dict[str, Any]) -> npt.NDArray[np.int64] | None:
    """See `SourceTensor`.

    In the query and key weights of the llama architecture GGUF stores the two rows of a rotary pair
    next to each other; in a checkpoint they are head_dim / 2 rows apart.
    """
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    part, shape = name.split(".")[-2], file.tensors[name].shape
    if config["model_type"] != "llama" or part not in heads:
        return None
    num_heads, head_dim = config[heads[part]], config["head_dim"]
    if shape[0] != num_heads * head_dim:
        raise HubError(
            f"{file.path}: {name} has shape {list(shape)}, which is not {num_heads} heads of "
            f"size {head_dim}; fetch the file again"
        )
    pairs = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return pairs.swapaxes(1, 2).reshape(-1)
