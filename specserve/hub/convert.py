"""A GGUF file turned into a model directory: configs, tokenizer, bfloat16 safetensors.

Owns the names of the tensors and the order of their rows. Everything that can be refused is
refused before the first weight is written.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from specserve.hub.bf16_file import Bf16Tensor, write_bf16
from specserve.hub.errors import HubError
from specserve.hub.gguf_config import end_tokens, read_config
from specserve.hub.gguf_file import GgufFile, GgufTensor
from specserve.hub.gguf_tokenizer import read_tokenizer

CONVERTER_VERSION = 1  # raise it when the output changes: cached conversions are made again
Progress = Callable[[str, float], None]  # what is being done, and how much of it: 0 to 1

_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
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
_COMPUTED = {"rope_freqs.weight"}  # became part of config.json


def convert_gguf(path: Path, output: Path, report: Progress) -> None:
    """Fill the empty directory `output`. Raises `HubError`."""
    file = GgufFile(path)
    config = read_config(file)
    tokenizer, tokenizer_config = read_tokenizer(file)
    names = dict(_tensor_names(file))
    generation = {"bos_token_id": config["bos_token_id"], "eos_token_id": end_tokens(file)}
    _write_json(output / "config.json", config)
    _write_json(output / "generation_config.json", generation)
    _write_json(output / "tokenizer_config.json", tokenizer_config)
    tokenizer.save(str(output / "tokenizer.json"))
    tensors = {
        ours: Bf16Tensor(
            file.tensors[theirs].shape,
            file.float_rows(file.tensors[theirs], _row_order(file.tensors[theirs], config)),
        )
        for theirs, ours in names.items()
    }
    total = 2 * sum(np.prod(tensor.shape, dtype=np.int64) for tensor in tensors.values())
    for written in write_bf16(output / "model.safetensors", tensors):
        report(f"converting {path.name}", float(written / total))


def _tensor_names(file: GgufFile) -> Iterator[tuple[str, str]]:
    """Pairs of GGUF name and checkpoint name. Raises `HubError` for unknown tensors, all at once.

    What is missing or has another shape than config.json says, the loader finds.
    """
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
            f"{file.path}: {len(unknown)} tensors are unknown: {', '.join(sorted(unknown))}; "
            f"use a directory with safetensors"
        )


def _row_order(tensor: GgufTensor, config: dict[str, Any]) -> npt.NDArray[np.int64] | None:
    """Which row of a GGUF tensor comes when, None: as they are.

    GGUF's llama keeps the rows of q and k so that rotary pairs are neighbours; here the pairs
    are half a head apart.
    """
    heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
    part = tensor.name.split(".")[-2]
    if config["model_type"] != "llama" or part not in heads:
        return None
    num_heads, head_dim = config[heads[part]], config["head_dim"]
    if tensor.shape[0] != num_heads * head_dim:
        raise HubError(
            f"{tensor.name} has shape {list(tensor.shape)}, which is not {num_heads} heads of "
            f"size {head_dim}; fetch the file again"
        )
    pairs = np.arange(num_heads * head_dim).reshape(num_heads, head_dim // 2, 2)
    return pairs.swapaxes(1, 2).reshape(-1)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    present = {key: value for key, value in content.items() if value is not None}
    path.write_bytes(msgspec.json.format(msgspec.json.encode(present), indent=2))
